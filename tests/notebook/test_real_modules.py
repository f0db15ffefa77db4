"""Files beside the notebook, variables of the first cell, and imports: what a notebook's folder does to it."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow  # each test starts kernels or processes; make test-quick leaves them out


def test_helpers_with_names_as_common_as_model_and_utils(book: Any) -> None:
    """`model.py` and `utils.py` beside the notebook travel as files, with what they import in turn, and nothing beside."""
    book.write("model.py", "import utils\nclass Net:\n    def __call__(self, x): return utils.twice(x)\n")
    book.write("utils.py", "import json\nfrom constants import TWO\ndef twice(x): return TWO * x\n")
    book.write("constants.py", "TWO = 2\n")
    book.write("unused.py", "raise RuntimeError('nobody imports me')\n")
    card = book.deploy(
        "import model\nnet = model.Net()\ndef predict(net, x): return net(x)",
        "deploy(net, predict, sample={'x': 4}, names=('net', 'predict'))",
    )
    assert card["parity"]["state"] == "equal"
    assert [row["name"] for row in card["receipt"]["modules"]] == ["constants", "model", "utils"]


def test_a_package_with_relative_and_lazy_imports_and_resources(book: Any) -> None:
    """A package beside the notebook works as at home: relative and lazy imports, data files, class identity."""
    book.write("kit/__init__.py", "from .shapes import Square\n")
    book.write("kit/shapes.py", "class Square:\n    def __init__(self, a): self.a = a\n")
    book.write(
        "kit/lazy.py",
        "from importlib.resources import files\ndef label(): return files('kit').joinpath('data/name.txt').read_text()\n",
    )
    book.write("kit/data/name.txt", "quadratum")
    book.write("kit/__pycache__/left.pyc", "")
    card = book.deploy(
        "import kit\nsquare = kit.Square(3)\n"
        "def predict(x):\n"
        "    from kit.lazy import label\n"
        "    return [label(), isinstance(square, kit.Square), square.a * x]",
        "deploy(predict, sample={'x': 2})",
    )
    assert card["parity"]["state"] == "equal"
    assert card["receipt"]["modules"] == [{"name": "kit", "files": 4, "bytes": card["receipt"]["modules"][0]["bytes"]}]


def test_a_module_imported_in_the_body_only(book: Any) -> None:
    """An import that stands only inside predict is found before it runs."""
    book.write("late.py", "def f(x): return x + 100\n")
    card = book.deploy("def predict(x):\n    import late\n    return late.f(x)", "deploy(predict, sample={'x': 1})")
    assert [row["name"] for row in card["receipt"]["modules"]] == ["late"]


def test_a_folder_that_a_cell_put_on_the_path(book: Any) -> None:
    """Modules of a folder that a cell added to sys.path travel like those beside the notebook."""
    book.write("lib/deep.py", "def f(x): return -x\n")
    card = book.deploy(
        "import sys; sys.path.append('lib')\nimport deep\ndef predict(x): return deep.f(x)",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["parity"]["state"] == "equal"
    assert [row["name"] for row in card["receipt"]["modules"]] == ["deep"]


def test_a_module_made_by_hand_is_what_the_clean_process_lacks(book: Any) -> None:
    """A module without a file cannot travel: the message names it, and nothing is deployed."""
    said = book.refusal(
        "import sys, types\nghost = types.ModuleType('ghost'); ghost.f = lambda x: x; sys.modules['ghost'] = ghost\n"
        "def predict(x):\n    import ghost\n    return ghost.f(x)",
        "deploy(predict, sample={'x': 1})",
    )
    assert said.startswith("VerificationError")
    assert "ghost" in said


def test_neither_the_standard_library_nor_packages_are_shipped(book: Any) -> None:
    """What is installed is pinned, not copied; nbdeploy itself, here an editable install, is not copied either."""
    card = book.deploy(
        "import json, numpy, nbdeploy\nfrom nbdeploy import errors\n"
        "def predict(x):\n    assert errors\n    return json.loads(numpy.array2string(numpy.array([x])))",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["receipt"]["modules"] == []
    assert card["receipt"]["distributions"] >= 2


def test_variables_of_the_first_cell_decide_how_imports_work(start_kernel: Callable[..., Any], book: Any) -> None:
    """os.environ as the notebook changed it is there before the first import of the clean process."""
    book.write("backend.py", "import os\nNAME = os.environ.get('MY_BACKEND', 'slow')\n")
    card = book.deploy(
        "import os\nos.environ['MY_BACKEND'] = 'fast'; os.environ['TOKENIZERS_PARALLELISM'] = 'false'",
        "import backend\nwhich = backend.NAME\ndef predict(x): return [backend.NAME, which, x]",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["parity"]["state"] == "equal"
    assert card["receipt"]["variables"] == ["MY_BACKEND", "TOKENIZERS_PARALLELISM"]


def test_secrets_of_the_first_cell_stay_home_and_are_named(book: Any) -> None:
    """A variable that looks like a secret stays home, by name; its value in reach of predict stops the deploy."""
    book.run("import os\nos.environ['SOME_API_KEY'] = 'sk-' + '1234567890'")
    card = book.deploy("def predict(x): return x", "deploy(predict, sample={'x': 1})")
    assert (card["receipt"]["variables"], card["receipt"]["notes"]) == ([], [])  # predict reads no variable
    card = book.deploy("def predict(x): return x or os.getenv('OTHER')", "deploy(predict, sample={'x': 1})")
    assert card["receipt"]["notes"] == [
        "SOME_API_KEY was set in this notebook and looks like a secret: it stays home; --secret SOME_API_KEY hands it over"
    ]
    said = book.refusal(
        "class Client:\n    def __init__(self): self.headers = {'auth': 'Bearer ' + os.environ['SOME_API_KEY']}\n"
        "client = Client()\ndef predict(x): return len(client.headers)",
        "deploy(predict, sample={'x': 1})",
    )
    assert said.startswith("SecretError: The value of $SOME_API_KEY stands in what predict needs: predict → globals")
    assert "client" in said
    assert "--secret SOME_API_KEY" in said
    assert "1234567890" not in said
    card = book.deploy(
        "def predict(x): return len(os.environ['SOME_API_KEY'])",
        "deploy(predict, sample={'x': 1}, secrets=('SOME_API_KEY',))",
    )
    assert card["receipt"]["secrets"] == ["SOME_API_KEY"]
    assert card["parity"]["state"] == "equal"


def test_two_kernels_in_one_folder_need_no_path_of_the_machine(book: Any) -> None:
    """The clean process sees neither the notebook's folder nor its own start folder: a file opened there must be named."""
    book.write("labels.txt", "cat\ndog\n")
    cell = "def predict(i): return open('labels.txt').read().split()[i]"
    said = book.refusal(cell, "deploy(predict, sample={'i': 1})")
    assert "FileNotFoundError" in said
    assert "--file PATH" in said
    card = book.deploy(cell, "deploy(predict, sample={'i': 1}, files=('labels.txt',))")
    assert card["receipt"]["files"] == ["labels.txt"]


def test_the_magic_finds_sample_and_names_by_itself(book: Any) -> None:
    """`%deploy` after a cell that called predict takes that call as its sample, the model left out."""
    book.write("model.py", "class Net:\n    def __call__(self, x): return [v + 1 for v in x]\n")
    output = book.run(
        "%load_ext nbdeploy",
        "import model\nclf = model.Net()\nX = [list(range(40)), [2]]\ndef predict(net, x): return net(x)\npredict(clf, X[0])",
        "%deploy clf predict --name magic --dry-run\nprint(sys.executable if 'sys' in dir() else 'done')",
    )
    assert output.splitlines()[-1] in {"done", sys.executable}


def test_nothing_of_the_capture_touches_the_folder(book: Any) -> None:
    """A deploy leaves the notebook's folder as it was."""
    book.write("utils.py", "def f(x): return x\n")
    book.run("import sys; sys.dont_write_bytecode = True\nimport utils\ndef predict(x): return utils.f(x)")
    before = _files(book.folder)
    book.deploy("deploy(predict, sample={'x': 1})")
    assert _files(book.folder) == before


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
