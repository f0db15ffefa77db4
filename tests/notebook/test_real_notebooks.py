"""What public notebooks do: models of any kind, passed in any way, in a namespace that has seen a day of work."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

from typing import Any

import pytest

from nbdeploy.jobs import all_jobs

pytestmark = pytest.mark.slow  # each test starts kernels or processes; make test-quick leaves them out


def test_the_model_is_a_list_a_dict_one_attribute_or_unused(book: Any) -> None:
    """A MODEL may be a list, a dict or an attribute of a trainer; one that predict does not need is named on the card."""
    card = book.deploy(
        "layers = [2, 3]\ndef score(layers, x):\n    for factor in layers: x = x * factor\n    return x",
        "deploy(layers, score, sample={'x': 7}, names=('layers', 'score'))",
    )
    assert card["call"] == "score(layers ← layers, x)"
    assert card["parity"]["state"] == "equal"
    card = book.deploy(
        "weights = {'a': 2.0, 'b': 1.0}\ndef linear(model, features): return sum(model[k] * v for k, v in features.items())",
        "deploy(weights, linear, sample={'features': {'a': 1, 'b': 2}}, names=('weights', 'linear'))",
    )
    assert card["call"] == "linear(model ← weights, features)"
    card = book.deploy(
        "class Trainer:\n    def __init__(self): self.model = {'bias': 5}; self.log = [0] * 10\n"
        "trainer = Trainer()\ndef shifted(net, x): return x + net['bias']",
        "deploy(trainer.model, shifted, sample=(4,), names=('trainer.model', 'shifted'))",
    )
    assert card["call"] == "shifted(net ← trainer.model, x)"
    card = book.deploy(
        "def double(x): return 2 * x",
        "deploy(weights, double, sample={'x': 4}, names=('weights', 'double'))",
    )
    assert card["call"] == "double(x)"
    assert card["receipt"]["model"] is None
    assert "neither takes nor reaches weights" in card["receipt"]["notes"][0]


def test_the_models_parameter_is_called_anything_and_stands_anywhere(book: Any) -> None:
    """The model finds its parameter: `gbm`, last, keyword-only, or none at all where predict reaches it by itself."""
    book.run("from sklearn.linear_model import LinearRegression\ngbm = LinearRegression().fit([[0.], [1.]], [0., 2.])")
    calls = {
        "def predict(gbm, row): return float(gbm.predict([row])[0])": "predict(gbm ← gbm, row)",
        "def predict(row, est): return float(est.predict([row])[0])": "predict(est ← gbm, row)",
        "def predict(row, *, est): return float(est.predict([row])[0])": "predict(est ← gbm, row)",
        "def predict(row): return float(gbm.predict([row])[0])": "predict(row)",
    }
    for code, call in calls.items():
        card = book.deploy(code, "deploy(gbm, predict, sample={'row': [3.0]}, names=('gbm', 'predict'))")
        assert card["call"] == call
        assert card["parity"]["state"] == "equal"
        assert card["receipt"]["model"]["kind"] == "LinearRegression"


def test_a_model_reached_through_an_object_of_a_library_is_not_called_unused(book: Any) -> None:
    """The model may hang inside something else that predict uses, such as a pipeline or an argparse namespace."""
    card = book.deploy(
        "import types\nclass Net:\n    def __call__(self, x): return x + 1\n"
        "net = Net()\nstate = types.SimpleNamespace(parts=types.SimpleNamespace(net=net))\n"
        "def predict(x): return state.parts.net(x)",
        "deploy(net, predict, sample={'x': 1}, names=('net', 'predict'))",
    )
    assert card["receipt"]["model"]["name"] == "net"
    assert card["receipt"]["notes"] == []


def test_defaults_are_live_objects(book: Any) -> None:
    """A default that is an object travels and is no input; a plain default is an optional input."""
    card = book.deploy(
        "class Tok:\n    def split(self, text): return text.split()\n"
        "tok = Tok()\ndef predict(text, tok=tok, top=1): return tok.split(text)[:top]",
        "deploy(predict, sample={'text': 'a b'})",
    )
    assert card["call"] == "predict(text, top=…)"
    assert [row["name"] for row in card["parameters"]] == ["text", "top"]
    said = book.refusal("deploy(predict, sample={'text': 'a b', 'tok': 1})")
    assert said.startswith("SampleError: The sample sets tok")


def test_functions_and_classes_defined_three_times_with_old_instances_alive(book: Any) -> None:
    """The objects as they are travel: an instance keeps the class it was made of, also after that was defined anew."""
    cell = "class Scale:\n    def __call__(self, x): return x * {0}\ndef helper(x): return x + {0}"
    card = book.deploy(
        cell.format(1) + "\nfirst = Scale()",
        cell.format(2) + "\nsecond = Scale()",
        cell.format(3) + "\nthird = Scale()\ndef predict(x): return [first(x), second(x), third(x), helper(x)]",
        "deploy(predict, sample={'x': 10})",
    )
    assert card["parity"]["state"] == "equal"
    assert book.run("print(predict(10))").strip() == "[10, 20, 30, 13]"


def test_builtins_shadowed_by_the_notebook(book: Any) -> None:
    """`list`, `max`, `input` as variables of the notebook are the ones that predict uses."""
    card = book.deploy(
        "max = lambda a: 99\ninput = [1, 2]\nlist = 'abc'\ndef predict(x): return [max(x), len(input), list]",
        "deploy(predict, sample={'x': [1]})",
    )
    assert card["parity"]["state"] == "equal"
    assert {row["name"] for row in card["receipt"]["globals"]} >= {"input", "list"}


def test_what_predict_does_not_use_stays_home(book: Any) -> None:
    """Threads, bars, handles, apps, images and gigabytes in the namespace neither travel nor refuse; locals may bear their names."""
    card = book.deploy(
        "import threading, sqlite3, socket, numpy, sys\n"
        "from PIL import Image\n"
        "worker = threading.Thread(target=print); lock = threading.Lock()\n"
        "handle = open(__import__('os').devnull); db = sqlite3.connect(':memory:'); sock = socket.socket()\n"
        "import fastapi; app = fastapi.FastAPI()\n"
        "image = Image.new('RGB', (8, 8)); X_train = numpy.empty(1 << 30, dtype='u1')\n"
        "class Bar:\n    def __init__(self): self.file = sys.stderr; self.lock = threading.RLock()\n"
        "bar = Bar(); generator = (i for i in range(3))\n"
        "def predict(x):\n    image = x; handle = [image]; lock = bar = db = app = 1\n    return handle",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["receipt"]["globals"] == []
    assert card["receipt"]["blobs"]["bytes"] == 0
    assert card["receipt"]["left_behind"] == ["X_train (1.1 GB, never reached by predict)"]
    book.run("handle.close(); sock.close(); db.close()")


def test_state_outside_the_objects_is_found_by_the_clean_process(book: Any) -> None:
    """A library that a cell changed (a registry) works here and not there: the message says that, and what to do."""
    book.write("plugins.py", "REGISTRY = {}\ndef run(name, x): return REGISTRY[name](x)\n")
    book.run(
        "import plugins\nplugins.REGISTRY['twice'] = lambda x: 2 * x\ndef predict(x): return plugins.run('twice', x)"
    )
    said = book.refusal("deploy(predict, sample={'x': 2})")
    assert "fails in a clean process: KeyError: 'twice'" in said
    assert "state outside its objects, such as a registry" in said
    card = book.deploy(
        "def register():\n    import plugins\n    plugins.REGISTRY['twice'] = lambda x: 2 * x",
        "deploy(predict, sample={'x': 2}, setup=register)",
    )
    assert card["parity"]["state"] == "equal"


def test_a_library_setting_that_a_cell_changed_gives_another_answer(book: Any) -> None:
    """A difference, not only an error, is found: a setting of a library does not travel."""
    book.write("settings.py", "SCALE = 1\ndef scaled(x): return SCALE * x\n")
    book.run("import settings\nsettings.SCALE = 10\ndef predict(x): return settings.scaled(x)")
    said = book.refusal("deploy(predict, sample={'x': 2})")
    assert said.startswith("ParityError: The clean process answered the sample otherwise than the notebook")
    assert "20" in said
    assert "registry" in said


def test_a_function_named_only_in_a_string(book: Any) -> None:
    """A name that only a text holds (a formula) cannot be seen: the clean process finds it, before anything serves."""
    said = book.refusal(
        "import math\ndef half(x): return x / 2\ndef predict(x): return eval('half(x)', globals(), {'x': x})",
        "deploy(predict, sample={'x': 4})",
    )
    assert "NameError: name 'half' is not defined" in said
    assert "fails in a clean process" in said


def test_one_object_reached_two_ways_stays_one(book: Any) -> None:
    """The same list as model, global, attribute and default is one list in the Replica too."""
    card = book.deploy(
        "shared = [0]\nclass Holder: pass\nholder = Holder(); holder.items = shared\n"
        "def predict(model, x, memory=shared):\n"
        "    return [model is shared, holder.items is shared, memory is shared]",
        "deploy(shared, predict, sample={'x': 1}, names=('shared', 'predict'))",
    )
    assert card["parity"]["state"] == "equal"
    assert book.run("print(predict(shared, 1))").strip() == "[True, True, True]"


def test_a_predict_that_counts_its_calls_begins_everywhere_alike(book: Any) -> None:
    """The captured state is that before the live run, arrays included, so a predict with a memory is no false alarm."""
    card = book.deploy(
        "import numpy\ncount = numpy.zeros(5000)\ncalls = []\n"
        "def predict(x):\n    count[0] += 1; calls.append(x)\n    return [float(count[0]), len(calls)]",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["receipt"]["blobs"]["count"] == 1
    assert card["parity"]["places"][:2] == ["live", "clean process"]


def test_sets_whose_order_depends_on_the_hash_seed(book: Any) -> None:
    """A list made of a set of texts has another order in each process: that is explained, not refused."""
    card = book.deploy(
        "words = {f'word{i}' for i in range(40)}\ndef predict(x): return list(words)",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["parity"]["state"] == "differs in order"
    assert "hash seed" in card["parity"]["note"]


def test_random_numbers_are_said(book: Any) -> None:
    """A predict that draws random numbers is equal under equal seeds, and the card says that it is not deterministic."""
    card = book.deploy(
        "import random, numpy\ndef predict(x): return x + random.random() + float(numpy.random.rand())",
        "random.seed(7); expected = random.random(); random.seed(7)",
        "deploy(predict, sample={'x': 1})",
    )
    assert card["parity"]["state"] == "equal"
    assert card["parity"]["note"].startswith("not deterministic: predict's answer changes with the random seed")
    assert book.run("print(random.random() == expected)").strip() == "True"


def test_a_parameter_called_name(book: Any, home: Any) -> None:
    """Parameters may bear the names of our own options: name, sample, model, timeout, self."""
    book.run(
        "def predict(name, timeout, engine='e'): return f'{name}-{timeout}-{engine}'",
        "endpoint = deploy(predict, sample={'name': 'Ada', 'timeout': 3}, dry_run=False)",
    )
    assert book.run("print(endpoint(name='Bob', timeout=1, engine='x'))").strip() == "Bob-1-x"


def test_a_cell_that_fails_by_itself(book: Any, home: Any) -> None:
    """An error of the notebook's own code is shown as that: nothing of nbdeploy's has run."""
    said = book.refusal("def predict(x): return x", "deploy(undefined_model, predict)")
    assert said == "NameError: name 'undefined_model' is not defined"
    said = book.refusal(
        "def setup(): raise RuntimeError('no GPU')\ndef predict(model, x): return x",
        "deploy(predict, setup=setup, sample={'x': 1})",
    )
    assert said.startswith("SampleError: --setup fails here in the notebook: RuntimeError: no GPU")
    assert "line 1" in said
    assert list(all_jobs(home)) == []
