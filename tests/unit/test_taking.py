"""`take`: what a Capture holds, and what the receipt says of it."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

import asyncio
import types
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.capture import Request, take
from nbdeploy.capture.arguments import LastCall
from nbdeploy.errors import CannotTravelError, CaptureError, SampleError, SecretError, UsageError
from nbdeploy.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from nbdeploy.capture import Capture


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty Store."""
    return Store(tmp_path / "store")


def names(source: str, **given: Any) -> dict[str, Any]:
    """Run a cell; returns the notebook's names."""
    namespace: dict[str, Any] = {"__name__": "__main__", **given}
    exec(compile(source, "<cell>", "exec", dont_inherit=True), namespace)  # noqa: S102 - a cell of the test
    return namespace


def capture(store: Store, source: str, tmp_path: Path | None = None, **request: Any) -> Capture:
    """Capture `predict` of a cell."""
    given = {"folder": tmp_path} if tmp_path else {}
    return take(Request(predict=names(source)["predict"], **given, **request), store)


def test_the_manifest_of_a_function_alone(store: Store) -> None:
    """What the format asks for; the environment is filled in by the worker."""
    taken = capture(store, "K = [2]\ndef predict(x: int, k: int = 1): return x * K[0] * k", sample={"x": 3})
    assert taken.manifest["predict"] == {
        "name": "predict", "kind": "function", "how": "none", "model": None, "variable": None, "source": "none",
    }  # fmt: skip
    assert taken.manifest["format_version"] == 1
    assert taken.manifest["distributions"] == []
    assert [row["name"] for row in taken.manifest["signature"]["parameters"]] == ["x", "k"]
    assert taken.manifest["signature"]["returns"] == {"type": "number"}
    assert (taken.call, taken.sample, taken.runs) == ("predict(x, k=…)", "x=3", 1)
    for part in ("skeleton", "sample", "answer"):
        assert store.has(taken.manifest[part]["digest"])
    assert taken.receipt["globals"] == [{"name": "K", "kind": "list", "bytes": taken.receipt["globals"][0]["bytes"]}]
    assert taken.receipt["model"] is None
    assert taken.seconds > 0


def test_without_a_sample_nothing_runs(store: Store) -> None:
    """No sample, no live run, no answer."""
    taken = capture(store, "def predict(x): raise RuntimeError")
    assert (taken.manifest["sample"], taken.manifest["answer"], taken.runs, taken.sample) == (None, None, 0, "")


def test_blobs_are_new_once(store: Store) -> None:
    """The receipt counts blobs, and how many of them the Store did not have yet; equal ones count once."""
    import numpy as np

    source = "def predict(model, x): return float(model['a'][0]) + x"
    model = {"a": np.arange(5000.0), "b": np.arange(5000.0), "c": np.ones(9000)}
    first = capture(store, source, model=model, has_model=True, variable="w", sample={"x": 1}).receipt["blobs"]
    assert first == {"count": 3, "new": 2, "bytes": 152_000, "new_bytes": 112_000}
    again = capture(store, source + " + 0", model=model, has_model=True, variable="w", sample={"x": 1}).receipt["blobs"]
    assert again == {"count": 3, "new": 0, "bytes": 152_000, "new_bytes": 0}


def test_how_a_model_is_passed(store: Store) -> None:
    """argument, reached, unused, class; only a passed model is a root of its own."""
    model = types.SimpleNamespace(k=2)
    kinds = {
        "def predict(m, x): return m.k * x": ("argument", "m", "live"),
        "def predict(x): return x": ("unused", None, "none"),
        "class predict:\n    def __init__(self, config): self.k = config.k\n    def predict(self, x): return self.k * x": (
            "class", "config", "live",
        ),
        "class predict:\n    def predict(self, x): return x": ("class", None, "none"),
    }  # fmt: skip
    for source, (how, parameter, origin) in kinds.items():
        taken = capture(store, source, model=model, has_model=True, variable="m", sample={"x": 3})
        found = taken.manifest["predict"]
        assert (found["how"], found["model"], found["source"]) == (how, parameter, origin), source
        assert (taken.receipt["model"] is not None) == (origin == "live")
        assert any("stays home" in note for note in taken.receipt["notes"]) == (origin == "none")


def test_a_model_without_a_name_is_not_left_behind(store: Store) -> None:
    """deploy(net, predict) from Python tells no name: the variable that holds the model is not said to stay home."""
    cell = "net = bytearray(2_000_000)\nother = bytearray(3_000_000)\ndef predict(net, x: int): return x"
    found = names(cell)
    taken = take(Request(predict=found["predict"], model=found["net"], has_model=True, sample={"x": 1}), store)
    assert taken.receipt["left_behind"] == ["other (3 MB, never reached by predict)"]


def test_a_reached_model(store: Store) -> None:
    """Reached as a global, a default, an attribute of a library's object, a function, a bound method's object."""
    model = [1, 2]
    function = names("def net(x): return x")["net"]
    cases: list[tuple[Any, dict[str, Any]]] = [
        (model, names("def predict(x): return model[0]", model=model)),
        (model, names("def predict(x, m=model): return m[0]", model=model)),
        (model, names("def predict(x): return box.inner.model[0]", box=types.SimpleNamespace(inner=types.SimpleNamespace(model=model)))),
        (function, names("def predict(x): return net(x)", net=function)),
    ]  # fmt: skip
    for held, namespace in cases:
        request = Request(predict=namespace["predict"], model=held, has_model=True, variable="model", sample={"x": 1})
        taken = take(request, store)
        assert taken.manifest["predict"]["how"] == "reached"
        assert taken.receipt["notes"] == []


def test_the_kind_is_what_the_run_shows(store: Store) -> None:
    """A function that returns a generator streams; a decorator that collects one does not."""
    kinds = {
        "def predict(x): return (i for i in range(x))": ("generator", True),
        "def predict(x): yield x": ("generator", True),
        "async def predict(x): return x": ("coroutine", False),
        "async def predict(x): yield x": ("async_generator", True),
        "async def inner(x): return x\ndef predict(x): return inner(x)": ("coroutine", False),
        "async def inner(x): yield x\ndef predict(x): return inner(x)": ("async_generator", True),
        "import functools\ndef deco(f):\n    @functools.wraps(f)\n    def inner(x): return list(f(x))\n    return inner\n"
        "@deco\ndef predict(x): yield x": ("function", False),
    }
    for source, (kind, streams) in kinds.items():
        taken = capture(store, source, sample={"x": 2})
        assert (taken.manifest["predict"]["kind"], taken.manifest["signature"]["streams"]) == (kind, streams), source


def test_async_functions_beside_a_running_loop(store: Store) -> None:
    """A notebook's main thread has a running loop: a coroutine is run beside it."""

    async def cell() -> Capture:
        return capture(
            store, "import asyncio\nasync def predict(x):\n    await asyncio.sleep(0)\n    return x", sample={"x": 2}
        )

    assert asyncio.run(cell()).manifest["answer"] is not None


def test_the_last_call_keeps_one_row_unless_it_was_one_request(store: Store) -> None:
    """Rows are cut to one; an image, which predict refuses to see a part of, is kept whole."""
    import numpy as np

    rows = LastCall((np.zeros((100, 4)),))
    taken = capture(store, "def predict(x): return x.sum(axis=1).tolist()", sample=rows)
    assert taken.sample == "x=<ndarray (1, 4)>"
    assert taken.receipt["notes"] == ["only the first row of x was kept as the sample (more than fits one request)"]
    taken = capture(store, "def predict(x):\n    assert x.shape == (100, 4)\n    return 1", sample=rows)
    assert taken.sample == "x=<ndarray (100, 4)>"
    assert taken.receipt["notes"] == []
    taken = capture(store, "def predict(x): return x.sum(axis=1).tolist()", sample={"x": np.zeros((100, 4))})
    assert taken.sample == "x=<ndarray (100, 4)>", "a sample that the user chose is never cut"


def test_seeds_are_set_for_the_run_and_put_back(store: Store) -> None:
    """The live run draws what the clean one will; the notebook's own random state is as it was."""
    import random

    from nbdeploy_server import wire

    state = random.getstate()
    taken = [capture(store, "import random\ndef predict(x): return random.random()", sample={"x": 1}) for _ in "ab"]
    assert random.getstate() == state
    digests = {one.manifest["answer"]["digest"] for one in taken}
    assert len(digests) == 1
    assert 0 <= wire.unpack(store.path(digests.pop()).read_bytes()) < 1


def test_setup_makes_the_model_or_only_prepares(store: Store) -> None:
    """Its result is the model; where nobody takes that, it still travels and runs in each Replica."""
    make = names("def connect(): return {'k': 4}")["connect"]
    taken = capture(store, "def predict(db, x): return db['k'] * x", setup=make, sample={"x": 2})
    assert taken.call == "predict(db ← connect(), x)"
    assert taken.manifest["predict"]["source"] == "setup"
    taken = capture(store, "def predict(x): return x", setup=make, sample={"x": 2})
    assert (taken.manifest["predict"]["how"], taken.manifest["predict"]["source"]) == ("none", "setup")
    with pytest.raises(SampleError, match="--setup fails here in the notebook: ZeroDivisionError"):
        capture(store, "def predict(db, x): return x", setup=lambda: 1 / 0, sample={"x": 2})


def test_model_from_a_folder(store: Store, tmp_path: Path) -> None:
    """Files go to the Store by digest, links followed; predict runs only in Replicas; the folder may be relative."""
    hub = tmp_path / "hub"
    (hub / "sub").mkdir(parents=True)
    (hub / "sub/w.bin").write_bytes(b"weights")
    (hub / ".git").mkdir()
    (hub / ".git/config").write_text("")
    (hub / "linked.txt").symlink_to(hub / "sub/w.bin")
    source = "def predict(model, x): return str(model)"
    taken = capture(store, source, tmp_path, model_from="hub", sample={"x": 1})
    assert taken.receipt["files"] == ["linked.txt", "sub/w.bin"]
    assert (taken.runs, taken.manifest["answer"]) == (0, None)
    assert taken.call == "predict(model ← hub, x)"
    (hub / "dead").symlink_to("nowhere")
    with pytest.raises(CaptureError, match="dead in the model's folder is no plain file"):
        capture(store, source, tmp_path, model_from="hub")
    with pytest.raises(UsageError, match="there is no folder"):
        capture(store, source, tmp_path, model_from="none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaptureError, match="holds no file"):
        capture(store, source, tmp_path, model_from="empty")
    with pytest.raises(UsageError, match="no parameter that could receive the model of --model-from hub"):
        capture(store, "def predict(x): return x", tmp_path, model_from="hub", sample={"x": 1})


def test_files_keep_their_path_in_the_notebooks_folder(store: Store, tmp_path: Path) -> None:
    """--file data/labels.txt is opened by that path; one from elsewhere by its name."""
    book = tmp_path / "book"
    (book / "data").mkdir(parents=True)
    (book / "data/labels.txt").write_text("a")
    (tmp_path / "far.txt").write_text("b")
    taken = capture(store, "def predict(x): return x", book, files=("data/labels.txt", str(tmp_path / "far.txt")))
    assert taken.receipt["files"] == ["data/labels.txt", "far.txt"]
    with pytest.raises(UsageError, match=r"--file none\.txt: there is no file"):
        capture(store, "def predict(x): return x", book, files=("none.txt",))


@pytest.fixture
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", "sk-abcdef0123456789")


@pytest.mark.usefixtures("_secret")
def test_secrets_in_objects_variables_samples_and_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is stored may hold a secret's value, whatever part of the Bundle it is."""
    with pytest.raises(SecretError, match="stands in what predict needs"):
        capture(store, "def predict(x, k='sk-abcdef0123456789'): return x", sample={"x": 1})
    with pytest.raises(SecretError, match="stands in the sample"):
        capture(store, "def predict(x): return 1", sample={"x": "sk-abcdef0123456789"})
    with pytest.raises(SecretError, match="stands in the answer to the sample"):
        capture(store, "import os\ndef predict(x): return os.environ['TEST_API_KEY']", sample={"x": 1})
    monkeypatch.setenv("SERVICE_URL", "https://u:sk-abcdef0123456789@host")
    with pytest.raises(SecretError, match=r"the variable SERVICE_URL, which this notebook set.*--secret SERVICE_URL"):
        capture(store, "def predict(x): return 1", sample={"x": 1})


def test_a_refused_capture_leaves_no_bundle(store: Store) -> None:
    """No manifest, no partial file."""
    import threading

    with pytest.raises(CannotTravelError, match=r'globals\["lock"\] is a lock'):
        take(Request(predict=names("def predict(x): return lock", lock=threading.Lock())["predict"]), store)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_live_defaults_cannot_be_set_by_a_sample(store: Store) -> None:
    """The message names the parameter."""
    predict = names("def predict(x, tok=tok): return x", tok=object())["predict"]
    with pytest.raises(SampleError, match="The sample sets tok, but its default in predict is an object"):
        take(Request(predict=predict, sample={"x": 1, "tok": 2}), store)


def test_annotated_classes_are_pickled_without_our_decoders_cache(store: Store) -> None:
    """Enums and dataclasses of annotations travel, the second time too, though our decoder keeps a cache in them."""
    source = (
        "import enum, dataclasses\nclass Size(enum.Enum):\n    S = 's'\n@dataclasses.dataclass\nclass P:\n    size: Size\n"
        "def predict(p: P, size: Size = Size.S): return p.size.value"
    )
    namespace = names(source)
    request = Request(predict=namespace["predict"], sample={"p": namespace["P"](namespace["Size"].S)})
    for _ in "ab":
        assert take(request, store).runs == 1


@pytest.mark.torch
def test_a_predict_that_trains_its_model_is_captured_as_it_was(store: Store) -> None:
    """The weights before the live run are written, though the run changes them."""
    torch = pytest.importorskip("torch")
    import hashlib

    model = torch.zeros(5000)
    before = hashlib.sha256(model.numpy().tobytes()).hexdigest()
    taken = capture(
        store, "def predict(model, x):\n    model += x\n    return float(model[0])", model=model, has_model=True,
        variable="w", sample={"x": 1.0},
    )  # fmt: skip
    assert taken.manifest["blobs"][0]["digest"] == f"sha256:{before}"
