"""What goes in and comes out of predict in real notebooks, and the kinds of function it is."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow  # each test starts kernels or processes; make test-quick leaves them out


def test_inputs_that_are_no_plain_json(book: Any) -> None:
    """Pydantic models, Enums, frames, images and bytes arrive as what the annotation or the sample says they are."""
    book.run(
        "import enum, numpy, pydantic, pandas\nfrom PIL import Image\n"
        "class Size(enum.Enum):\n    SMALL = 's'; LARGE = 'l'\n"
        "class Order(pydantic.BaseModel):\n    item: str\n    size: Size = Size.SMALL\n"
        "frame = pandas.DataFrame({'a': [1, 2], 'b': ['x', 'y']})\nimage = Image.new('RGB', (4, 3), 'red')"
    )
    book.run(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Line:\n    size: Size\n    n: int = 1"
    )
    cells = {
        "def predict(line: Line): return [line.size.name, line.n]": "Line(Size.SMALL)",
        "def predict(x, row): return [x, row]": "{'x': numpy.float32(0.5), 'row': list(numpy.ones(3, 'f4'))}",
        "def predict(order: Order): return [order.item, order.size.name]": "{'order': Order(item='hat', size=Size.LARGE)}",
        "def predict(order): return order.item": "{'order': Order(item='hat')}",
        "def predict(size: Size): return size is Size.LARGE": "{'size': Size.LARGE}",
        "def predict(frame): return int(frame.a.sum())": "{'frame': frame}",
        "def predict(frame: pandas.DataFrame): return frame": "frame",
        "def predict(image): return [image.mode, image.size[0]]": "{'image': image}",
        "def predict(blob: bytes): return blob + b'!'": "b'abc'",
    }
    for code, sample in cells.items():
        card = book.deploy(code, f"deploy(predict, sample={sample})")
        assert card["parity"]["state"] == "equal", code
        assert " at 0x" not in card["sample"]


def test_a_wrong_return_annotation_is_never_enforced(book: Any) -> None:
    """Annotations of what predict returns are often wrong; the answer counts."""
    card = book.deploy("def predict(x: int) -> int: return {'label': str(x)}", "deploy(predict, sample={'x': 1})")
    assert card["parity"]["state"] == "equal"


def test_outputs_of_numpy_and_tuples(book: Any) -> None:
    """Scalars of numpy, 0-d arrays, tuples, nested containers and None come back equal."""
    book.run("import numpy as np, datetime, dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int = 1")
    for source in (
        "np.bool_(True), np.str_('a'), np.float32(0.5), np.int64(3)",
        "np.array(3.5)",
        "(1, (2, [3, {'k': (4,)}])), None",
        "{'when': datetime.datetime(2024, 1, 2), 'set': {1, 2}, 'raw': b'x'}",
        "[float('nan'), float('inf')]",
        "P(), [P(2)]",
    ):
        card = book.deploy(f"def predict(x): return {source}", "deploy(predict, sample={'x': 1})")
        assert card["parity"]["state"] == "equal", source


def test_streams_with_empty_strings(book: Any) -> None:
    """A generator streams what it yields, empty strings included; so do a callable object and a function that returns one."""
    book.run(
        "def words(text):\n    for word in text.split(' '): yield word\n"
        "class Speaker:\n    def __call__(self, text): yield from words(text)\n"
        "def indirect(text): return words(text)\nlisted = lambda text: list(words(text))\n"
        "import functools\nhalf = functools.partial(words)\n"
    )
    for name in ("words", "Speaker()", "indirect", "half"):
        card = book.deploy(f"deploy({name}, sample={{'text': 'a  b '}})")
        assert card["streams"], name
        assert card["parity"]["state"] == "equal"
    assert not book.deploy("deploy(listed, sample={'text': 'a'})")["streams"]
    book.run("endpoint = deploy(indirect, sample={'text': 'a'}, dry_run=False)")
    assert book.run("print(list(endpoint.stream(text='a  b ')))").strip() == "['a', '', 'b', '']"


def test_async_functions_inside_a_running_loop(book: Any) -> None:
    """The kernel's own loop runs while predict is captured: coroutines and async generators are run beside it."""
    book.run(
        "import asyncio\nasync def predict(x):\n    await asyncio.sleep(0)\n    return x + 1\n"
        "async def many(x):\n    for i in range(x): yield i\n"
        "def indirect(x): return predict(x)"
    )
    for name in ("predict", "indirect"):
        card = book.deploy(f"deploy({name}, sample={{'x': 2}})")
        assert card["parity"]["state"] == "equal"
        assert not card["streams"]
    card = book.deploy("deploy(many, sample={'x': 2})")
    assert card["streams"]
    book.run("endpoint = deploy(indirect, sample={'x': 2}, dry_run=False)")
    assert book.run("print(endpoint(x=5))").strip() == "6"


def test_every_kind_of_callable(book: Any) -> None:
    """Partials, bound methods, callable objects, decorated functions, lambdas and classes in Cortex's style."""
    book.run(
        "import functools\n"
        "def scaled(factor, x): return factor * x\n"
        "class Model:\n    def __init__(self): self.k = 3\n    def run(self, x): return self.k * x\n"
        "    def __call__(self, x): return -x\n"
        "def timed(f):\n    @functools.wraps(f)\n    def inner(*a, **k): return f(*a, **k)\n    return inner\n"
        "@timed\ndef wrapped(model, x): return model.run(x)\n"
        "@functools.lru_cache(maxsize=None)\ndef cached(x): return x + 1\n"
        "class Predictor:\n    def __init__(self, config): self.k = config['k']\n    def predict(self, payload): return payload['v'] * self.k\n"
        "model = Model()"
    )
    cells = {
        "functools.partial(scaled, 3)": "scaled(x)",
        "model.run": "run(x)",
        "model": "Model(x)",
        "cached": "cached(x)",
        "lambda x: x": "<lambda>(x)",
        "model, wrapped": "wrapped(model ← Model, x)",
    }
    for objects, call in cells.items():
        card = book.deploy(f"deploy({objects}, sample={{'x': 2}})")
        assert (card["call"], card["parity"]["state"]) == (call, "equal")
    card = book.deploy("deploy({'k': 5}, Predictor, sample={'payload': {'v': 2}}, names=('config', 'Predictor'))")
    assert card["call"] == "Predictor(config ← config).predict(payload)"
    assert card["parity"]["state"] == "equal"
    said = book.refusal("deploy(Predictor, sample={'payload': {'v': 2}})")
    assert said.startswith("SampleError: Predictor cannot be made: TypeError")
    assert "%deploy CONFIG Predictor" in said
    assert "without a predict method" in book.refusal("deploy(Model, sample={'x': 1})")


def test_setup_makes_what_cannot_travel(book: Any) -> None:
    """A client that cannot travel is made by --setup in each Replica; the notebook's own stands in for it here."""
    book.run(
        "import sqlite3\ndef connect():\n    db = sqlite3.connect(':memory:', check_same_thread=False)\n"
        "    db.execute('create table t (a)'); db.execute('insert into t values (7)')\n    return db\n"
        "def predict(db, x): return db.execute('select a from t').fetchone()[0] + x\n"
    )
    card = book.deploy("deploy(predict, setup=connect, sample={'x': 1})")
    assert card["call"] == "predict(db ← connect(), x)"
    assert card["parity"]["state"] == "equal"
    book.run("endpoint = deploy(predict, setup=connect, sample={'x': 1}, dry_run=False)")
    assert book.run("print(endpoint(x=10))").strip() == "17"
