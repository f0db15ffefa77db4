"""Mistakes: each is refused before anything is deployed, names the variable and a next step, and leaves nothing behind."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.jobs import all_jobs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow  # each test starts kernels or processes; make test-quick leaves them out


@pytest.fixture(autouse=True)
def _nothing_is_left(home: Path, book: Any) -> Iterator[None]:
    """A refusal comes before any Job: no worker was started, no Endpoint and no half-written file exists."""
    yield
    assert list(all_jobs(home)) == []
    endpoints = home / "endpoints"
    assert not endpoints.is_dir() or list(endpoints.iterdir()) == []
    assert list(home.rglob("*.part")) == []


def test_undefined_names(book: Any) -> None:
    """A name that is nowhere defined is told with its line and the nearest names."""
    said = book.refusal(
        "vectorizer = len\ndef clean(text): return vectorizr(text)\ndef predict(text):\n    return clean(text)",
        "deploy(predict, sample={'text': 'a'})",
    )
    assert said == (
        "UndefinedNameError: clean uses 'vectorizr' (line 2: def clean(text): return vectorizr(text)), which is not "
        "defined in this notebook. Did you mean 'vectorizer'? Run the cell that defines it, or pass it as an argument."
    )


def test_not_callable(book: Any) -> None:
    """A model in the place of predict is told as that."""
    said = book.refusal("clf = [1]", "deploy(clf, clf)")
    assert said.startswith("UsageError: predict must be a function, but it is a list.")
    assert "%deploy MODEL PREDICT" in said
    assert "takes a model and a function" in book.refusal("deploy(clf, len, clf)")


def test_a_sample_that_does_not_fit(book: Any) -> None:
    """The parameters are shown, with an example of a sample that would fit."""
    book.run("def predict(model, text, top=3): return text")
    assert book.refusal("deploy(object, predict, sample={'text': 'a', 'topp': 1})") == (
        "SampleError: The sample does not fit predict(text, top=…) (without model, which receives the model): it has no "
        "parameter 'topp' (but 'top'). Give one request as a dict of arguments, for example --sample {\"text\": …}"
    )
    assert "too many positional arguments" in book.refusal("deploy(object, predict, sample=(1, 2, 3, 4))")
    said = book.refusal("def typed(model, text: str): return text", "deploy(object, typed, sample={'text': 5})")
    assert said.startswith("SampleError: The sample does not fit predict's own annotations: text must be")


CULPRITS = {
    "threading.Lock()": ("a lock", "predict → globals["),
    "open(os.devnull)": ("an open file", "predict → globals["),
    "socket.socket()": ("a network connection", "predict → globals["),
    "sqlite3.connect(':memory:')": ("a database connection", "predict → globals["),
    "httpx.Client()": ("an HTTP client", "predict → globals["),
    "(i for i in range(3))": ("a generator", "predict → globals["),
}


def test_what_cannot_leave_the_kernel(book: Any) -> None:
    """Locks, files, sockets, connections, clients and generators are named with the path to them and a next step."""
    book.run(
        "import threading, os, socket, sqlite3, httpx\n"
        "class Service:\n    def __init__(self, connection): self.connection = connection\n"
        "def predict(x): return [x, db]"
    )
    for source, (words, path) in CULPRITS.items():
        said = book.refusal(f"culprit = {source}\ndb = culprit", "deploy(predict, sample={'x': 1})")
        assert said.startswith(f'CannotTravelError: {path}"db"] is {words}'), said
        said = book.refusal("db = Service(culprit)", "deploy(predict, sample={'x': 1})")
        assert f'predict → globals["db"] → connection is {words}' in said, said
        assert "--setup" in said or "inside predict" in said or "list" in said
        book.run("getattr(culprit, 'close', lambda: None)(); del culprit")


def test_paths_through_closures_defaults_and_attributes(book: Any) -> None:
    """The path names what the user wrote, however the culprit is reached."""
    book.run("import threading\nlock = threading.Lock()")
    said = book.refusal("def predict(x, guard={'a': lock}): return x", "deploy(predict, sample={'x': 1})")
    assert 'predict → default "guard" → ["a"] is a lock' in said
    said = book.refusal(
        "def make():\n    inner = lock\n    def predict(x): return (x, inner)\n    return predict\nclosed = make()",
        "deploy(closed, sample={'x': 1})",
    )
    assert 'closure "inner" is a lock' in said
    said = book.refusal(
        "class Model: pass\nm = Model(); m.guard = lock\ndef predict(model, x): return x",
        "deploy(m, predict, sample={'x': 1}, names=('m', 'predict'))",
    )
    assert "model → guard is a lock" in said


def test_predict_raises_on_the_sample(book: Any) -> None:
    """The user's own error is shown as such, with the line of the cell and the sample, before anything is deployed."""
    said = book.refusal(
        "def predict(record):\n    table = {'a': 1}\n    return table[record]",
        "deploy(predict, sample={'record': 'zz'})",
    )
    assert said == (
        "SampleError: predict fails here in the notebook, before anything is deployed: KeyError: 'zz' (line 3 of its cell, "
        "in predict: return table[record]). It was called with the sample: record='zz'. Correct predict, or give another "
        "request with --sample."
    )
    assert "SystemExit" in book.refusal("def predict(x): raise SystemExit(3)", "deploy(predict, sample={'x': 1})")


def test_an_answer_that_cannot_be_sent(book: Any) -> None:
    """What predict returns must have a form outside Python."""
    said = book.refusal("class Odd: pass\ndef predict(x): return Odd()", "deploy(predict, sample={'x': 1})")
    assert said.startswith("SampleError: What predict returns cannot be sent over HTTP")
    said = book.refusal("deploy(predict, sample={'x': Odd()})")
    assert said.startswith("SampleError: The sample's x cannot be sent over HTTP: a value of type Odd")


def test_notebook_commands_inside_predict(book: Any) -> None:
    """`!cmd`, magics, get_ipython and display exist only inside Jupyter."""
    for body in ("files = !ls\n    return x", "%pwd\n    return x", "get_ipython()\n    return x"):
        said = book.refusal(f"def predict(x):\n    {body}", "deploy(predict, sample={'x': 1})")
        assert said.startswith("CannotTravelError: predict uses a notebook command (`!cmd`, `%magic` or get_ipython())")
        assert "(line 2" in said
        assert "subprocess" in said
    said = book.refusal("def predict(x):\n    display(x)\n    return x", "deploy(predict, sample={'x': 1})")
    assert said.startswith("CannotTravelError: predict uses 'display' (line 2: display(x)), which exists only inside")


def test_a_module_edited_after_its_import(book: Any) -> None:
    """The file that would travel is not the code that runs here: say so, and what to do."""
    book.write("edited.py", "def f(x): return 1\n")
    book.run("import edited\ndef predict(x): return edited.f(x)")
    book.write("edited.py", "def f(x): return 2\n")
    said = book.refusal("deploy(predict, sample={'x': 1})")
    assert said.startswith("CannotTravelError: edited.py was edited after this notebook imported it: f in the file")
    assert "importlib.reload(edited)" in said


def test_bad_names_files_and_folders(book: Any) -> None:
    """A name that is no DNS label, a missing --file, --model-from or --secret are told before anything is captured."""
    book.run("def predict(model, x): return x")
    assert book.refusal("deploy(predict, name='Not OK!')").startswith("UsageError")
    assert "there is no file" in book.refusal("deploy(1, predict, files=('none.txt',), sample={'x': 1})")
    assert "there is no folder" in book.refusal("deploy(predict, model_from='none', sample={'x': 1})")
    assert "--secret NOPE: it is not set" in book.refusal("deploy(1, predict, secrets=('NOPE',), sample={'x': 1})")
    assert "There is no engine 'moon'" in book.refusal("deploy(1, predict, engine='moon', sample={'x': 1})")
    said = book.refusal(
        "def alone(x): return x",
        "book_file = open('m.bin', 'w').close()",
        "deploy(alone, model_from='.', sample={'x': 1})",
    )
    assert said.startswith("UsageError: alone has no parameter that could receive the model of --model-from")
