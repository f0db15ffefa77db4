"""Which kinds of object travel: made in `__main__` of one process, written, loaded in another that has no nbdeploy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbdeploy_server
import pytest

import nbdeploy

SERVER = Path(nbdeploy_server.__file__).parents[1]
KERNEL = Path(nbdeploy.__file__).parents[1]


@dataclass(frozen=True)
class Kind:
    """One row: how the object is made, and what must be equal on both sides, as expressions over `o`."""

    name: str
    make: str
    check: str = "describe(o)"


PLAIN_NOTEBOOK = """
import abc, asyncio, collections, contextvars, dataclasses, enum, functools, io, logging, queue, socket, sqlite3
import subprocess, sys, tempfile, threading, types, typing, weakref
import concurrent.futures as futures

G = 41
HERE = sys.argv[1]

@dataclasses.dataclass
class Cfg:
    a: int
    b: list
class Colour(enum.Enum):
    RED = 1
NT = collections.namedtuple("NT", "a b")
class Base(abc.ABC):
    @abc.abstractmethod
    def f(self): ...
class Impl(Base):
    def f(self): return super().__class__.__name__ and 3
@functools.lru_cache(maxsize=8)
def cached(x): return x + 1
@functools.lru_cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
@functools.singledispatch
def sd(x): return "any"
@sd.register
def _(x: int): return "int"
@sd.register
def _(x: list): return [sd(y) for y in x]
def uses_global(x): return x + G
T = typing.TypeVar("T")
P = typing.ParamSpec("P")
UserId = typing.NewType("UserId", int)
class Gen(typing.Generic[T]):
    def __init__(self, v): self.v = v
class Lazy:
    @functools.cached_property
    def value(self): return 42
class Client:
    def __init__(self): self.connection = sqlite3.connect(":memory:")
class Counted:
    n = 0
    @classmethod
    def up(cls): cls.n += 1; return cls.n
    @staticmethod
    def two(): return 2
    @property
    def p(self): return self.n
class Slots:
    __slots__ = ("a", "b")
    def __init__(self): self.a, self.b = 1, self
def recursive(n): return 1 if n == 0 else n * recursive(n - 1)
def imports_inside(x):
    import json as j
    return j.dumps(x)
def make_closure():
    data = {"w": [1, 2]}
    def inner(x): return data["w"][0] + x
    return inner
shared = [1]
db = {"connection": sqlite3.connect(":memory:")}
client = Client()
def asks_db(x): return db
def asks_client(x, c=client): return c
def make_asking():
    handle = open(__file__)
    return lambda: handle
class Deep:
    next = None
def chain(n):
    first = last = Deep()
    for _ in range(n):
        last.next = Deep(); last = last.next
    return first
def length(o):
    n = 0
    while o.next is not None: o = o.next; n += 1
    return n
async def co(): return 1
def gen_function():
    yield from (1, 2)
if MODE == "write":
    import numpy as np, pandas as pd
    def sk():
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, StandardScaler
        from sklearn.linear_model import LogisticRegression
        X = np.random.default_rng(0).normal(size=(50, 3)); y = X[:, 0] > 0
        return make_pipeline(FunctionTransformer(lambda x: x * G), StandardScaler(), LogisticRegression()).fit(X, y)
    mm = np.memmap(HERE + "/mm.bin", np.float32, "w+", shape=(5000,)); mm[:] = 7; mm.flush()
    def pyd():
        import pydantic
        class In(pydantic.BaseModel):
            a: int; b: str = "x"
        return In
    def readonly():
        a = np.arange(4000.); a.flags.writeable = False; return a
"""

DESCRIBE = """
def describe(o):
    import sys
    if isinstance(o, (list, tuple)): return [describe(x) for x in o]
    np, pd, torch = (sys.modules.get(n) for n in ("numpy", "pandas", "torch"))
    if np is not None and isinstance(o, np.ndarray):
        strides = o.strides if o.size > 1 else 0
        return f"{type(o).__name__} {o.dtype} {o.shape} {strides} {o.flags.writeable} {o.tolist()}"
    if pd is not None and isinstance(o, pd.DataFrame): return o.to_json() + str(o.dtypes.tolist())
    if torch is None: return repr(o)
    if isinstance(o, torch.Tensor):
        if o.is_meta: return f"meta{tuple(o.shape)}"
        t, strides = o.detach(), ""
        if t.is_quantized: t = t.dequantize()
        elif t.layout in (torch.sparse_coo, torch.sparse_csr): t = t.to_dense()
        elif t.layout is not torch.strided: t = torch.cat(list(t.unbind()))
        elif t.numel() > 1: strides = str(tuple(o.stride()))
        values = t.resolve_conj().resolve_neg().to(torch.complex128 if t.is_complex() else torch.float64).tolist()
        return f"{type(o).__name__} {o.dtype} {o.requires_grad} {strides} {tuple(t.shape)} {values}"
    if isinstance(o, torch.nn.Module):
        x = torch.arange(4) if type(o).__name__ == "Net" else torch.ones(2, 4)
        return f"{type(o).__name__} {o(x).detach().sum().item():.5f}"
    return repr(o)
"""

PLAIN = [
    Kind("closure", "make_closure()", "o(1)"),
    Kind("function with a global", "uses_global", "o(1)"),
    Kind("recursive function", "recursive", "o(5)"),
    Kind("function that imports inside", "imports_inside", "o([1])"),
    Kind("generator function", "gen_function", "list(o())"),
    Kind("coroutine function", "co", "__import__('asyncio').run(o())"),
    Kind("partial", "functools.partial(uses_global, 1)", "o()"),
    Kind("lru_cache", "cached", "[o(1), o.cache_info().maxsize, o.__name__, o.__wrapped__(1)]"),
    Kind("recursive lru_cache", "fib", "[o(20), o.cache_parameters()['maxsize']]"),
    Kind("singledispatch", "sd", "[o(1), o('x'), o.__name__, o.__module__]"),
    Kind("recursive singledispatch", "sd", "o([1, 'x', [2]])"),
    Kind("cached_property", "Lazy()", "[o.value, o.value]"),
    Kind("dataclass", "Cfg(1, shared)", "[o.a, o.b, o == type(o)(1, [1])]"),
    Kind("enum", "[Colour.RED, Colour.RED]", "[o[0].name, o[0] is o[1], o[0] is type(o[0])(1)]"),
    Kind("namedtuple", "NT(1, 2)", "[o.a, o._asdict()]"),
    Kind("abstract class", "Impl()", "[o.f(), type(o).__mro__[1].__name__]"),
    Kind("generic class", "Gen[int](3)", "o.v"),
    Kind("NewType", "[UserId, {'u': UserId(3)}]", "[o[0](4), o[0].__name__, o[1]['u']]"),
    Kind("ParamSpec", "P", "o.__name__"),
    Kind("class with methods", "Counted", "[o.up(), o.two(), o().p]"),
    Kind("slots and a cycle", "Slots()", "[o.a, o.b is o]"),
    Kind("bound method", "Impl().f", "o()"),
    Kind("shared list", "[shared, {'x': shared}]", "o[0] is o[1]['x']"),
    Kind("logger", "logging.getLogger('x')", "o.name"),
    Kind("standard output", "lambda: sys.stdout", "o() is __import__('sys').stdout"),
    Kind("module", "functools", "o.__name__"),
    Kind("notebook-made module", "types.ModuleType('dyn')", "o.__name__"),
    Kind("deep list", "chain(20_000)", "sum(1 for _ in iter(lambda s=[o]: s.__setitem__(0, s[0].next) or s[0], None))"),
    Kind("unlocked asyncio.Semaphore", "asyncio.Semaphore(8)", "o._value"),
    Kind("numpy orders and slices", "[np.arange(12.).reshape(3, 4), np.asfortranarray(np.arange(12.).reshape(3, 4)), "
         "np.arange(100.)[::3], np.arange(9)[::-2], np.empty((0, 3)), np.array(3.)]"),
    Kind("large numpy orders", "[np.arange(4000.).reshape(40, 100).T, np.arange(4000.)[::-3], "
         "np.arange(8000.).reshape(20, 20, 20)[3:9, ::-2, 1:]]"),
    Kind("numpy views of one array", "(lambda a: [a[:5000], a[2500:7500]])(np.arange(10000.))",
         "[o[0].__setitem__(2500, -1), o[1][0], __import__('numpy').shares_memory(o[0], o[1]), o[1][-1]]"),
    Kind("numpy views of one small array", "(lambda a: [a[:5], a[2:7]])(np.arange(10))",
         "[o[0].__setitem__(2, -1), o[1].tolist()]"),
    Kind("numpy broadcast", "np.broadcast_to(np.arange(1000.), (50, 1000))"),
    Kind("numpy as_strided", "np.lib.stride_tricks.sliding_window_view(np.arange(2000.), 3)"),
    Kind("read-only numpy", "readonly()"),
    Kind("numpy structured", "np.zeros(3, dtype=[('a', 'i4'), ('b', 'f8')])"),
    Kind("numpy objects", "np.array([{'a': 1}, None], dtype=object)"),
    Kind("field beside objects",
         "np.zeros(600, dtype=[('a', 'i8'), ('b', object)])['a']", "o.tolist()"),
    Kind("numpy strings and times", "[np.array(['x', 'yy']), np.array(['2024-01-01'], 'M8[D]'), np.float32(3)]"),
    Kind("memmap", "np.memmap(HERE + '/mm.bin', np.float32, 'r', shape=(5000,))",
         "[type(o).__name__.replace('memmap', 'ndarray'), o.sum().item()]"),
    Kind("pandas", "pd.DataFrame({'a': [1., 2], 'b': ['x', None], 'c': pd.Categorical(['u', 'v']), "
         "'d': pd.date_range('2024', periods=2, tz='UTC')})"),
    Kind("sklearn pipeline with a lambda", "sk()",
         "o.predict(__import__('numpy').array([[1., 0, 0], [-1, 0, 0]])).tolist()"),
    Kind("pydantic model", "pyd()", "[sorted(o.model_json_schema()['properties']), o(a=3).b]"),
]  # fmt: skip

REFUSED = [
    Kind("connection in a global", "asks_db", 'model → globals["db"] → ["connection"] is a database connection'),
    Kind("connection in a default", "asks_client", 'model → default "c" → connection is a database connection'),
    Kind("file in a closure", "make_asking()", 'model → closure "handle" is an open file'),
    Kind("open file", "open(__file__)", "model is an open file"),
    Kind("temporary file", "tempfile.NamedTemporaryFile()", "model is an open file"),
    Kind("generator", "[1, (i for i in range(3))]", "model → [1] is a generator"),
    Kind("coroutine", "co()", "model is a coroutine"),
    Kind("lock", "{'a': threading.Lock()}", 'model → ["a"] is a lock'),
    Kind("event", "threading.Event()", "model is a lock"),
    Kind("thread pool", "futures.ThreadPoolExecutor(1)", "model is a pool of workers"),
    Kind("thread local", "threading.local()", "model is a thread or its local state"),
    Kind("queue", "queue.Queue()", "model is a queue between threads"),
    Kind("socket", "Cfg(1, [socket.socket()])", "model → b → [0] is a network connection"),
    Kind("process", "subprocess.Popen(['true'])", "model is a process"),
    Kind("context variable", "contextvars.ContextVar('x')", "model is a context variable"),
    Kind("http client", "NT(1, __import__('httpx').Client())", "model → b is an HTTP client"),
    Kind("weak dictionary", "weakref.WeakValueDictionary()", "model is a weak reference"),
    Kind("weak reference", "weakref.ref(client)", "model is a weak reference"),
    Kind("event loop", "asyncio.new_event_loop()", "model is an event loop"),
    Kind("ufunc of the notebook", "np.frompyfunc(lambda x: x, 1, 1)", "model (numpy.ufunc) cannot leave this process"),
    Kind("base class", "type('Foo', (type('Bar', (), {'c': client}),), {})",
         "model → base Bar → c → connection is a database connection"),
    Kind("shell", "__import__('IPython').core.interactiveshell.InteractiveShell().get_ipython",
         "model → __self__ is the notebook's shell"),
]  # fmt: skip

TORCH_NOTEBOOK = """
import torch, torch.nn as nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 8); self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("pers", torch.arange(4.))
        self.register_buffer("nonpers", torch.arange(5.), persistent=False)
        self.plain = torch.arange(6.)
    def forward(self, x):
        return self.head(self.emb(x)) + self.pers.sum() + self.nonpers.sum() + self.plain.sum()
class Locked(nn.Module):
    def __init__(self):
        super().__init__(); self.fc = nn.Linear(2, 2); self.fc.guard = threading.Lock()
def tied_by_data():
    m = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    m[1].weight = nn.Parameter(m[0].weight.data); return m
def hooked():
    m = nn.Linear(4, 4); m.register_forward_hook(lambda a, b, c: c * 2); return m
def with_grad():
    t = torch.ones(3, requires_grad=True); t.sum().backward(); return t
def inference():
    with torch.inference_mode(): return torch.ones(3)
def attributed():
    t = torch.ones(3); t.label = "x"; return [t, t]
def tensor_closure():
    t = torch.arange(3.); dct = {"w": torch.ones(2, 2)}
    return lambda x: (t.sum() + dct["w"].sum() + x).item()
def over_numpy():
    import numpy as np
    a = np.arange(1000.); return [a, torch.from_numpy(a), torch.from_numpy(a[10:])]
def tok():
    from tokenizers import Tokenizer, models, trainers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE(unk_token="[UNK]")); t.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    t.train_from_iterator(["hello world, some text to train on"] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", pad_token="[PAD]")
def tokpy():
    from tokenizers import Tokenizer, models, pre_tokenizers
    class Pre:
        def pre_tokenize(self, p): p.split(lambda i, s: s.split(" "))
    t = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    t.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Pre()); return t
def hfpipe():
    from transformers import GPT2Config, GPT2LMHeadModel, pipeline
    m = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300))
    return pipeline("text-generation", model=m, tokenizer=tok())
base = torch.arange(2000.)
big = torch.zeros(2_500_000)
"""

TORCH = [
    Kind("tied parameters and buffers", "Net().eval()",
         "[describe(o), o.head.weight is o.emb.weight, sorted(o.state_dict()), describe(o.nonpers)]"),
    Kind("two views of one storage", "[base[:10], base[5:15]]",
         "[o[0].__setitem__(5, -1), o[1][0].item(), o[1][1].item()]"),
    Kind("small view of a large storage", "big[10:20]"),
    Kind("transpose", "torch.arange(12.).view(3, 4).t()"),
    Kind("expanded", "torch.ones(1, 4).expand(1000, 4)"),
    Kind("tied by .data", "tied_by_data()",
         "[o[0].weight.untyped_storage().data_ptr() == o[1].weight.untyped_storage().data_ptr(), "
         "o[0].weight is o[1].weight, o[0].weight.sum().item()]"),
    Kind("bf16", "torch.randn(4).bfloat16()"),
    Kind("fp8", "torch.randn(5000).to(torch.float8_e4m3fn)"),
    Kind("complex64", "torch.randn(4, dtype=torch.complex64)"),
    Kind("conjugate view", "torch.randn(4, dtype=torch.complex64).conj()"),
    Kind("negative view", "torch.randn(4, dtype=torch.complex64).conj().imag"),
    Kind("bool and unsigned", "[torch.tensor([True, False]), torch.tensor([1, 2], dtype=torch.uint16), "
         "torch.tensor([1, 2], dtype=torch.uint32)]"),
    Kind("per-tensor qint8", "torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)"),
    Kind("per-channel qint8", "torch.quantize_per_channel(torch.randn(4, 4), torch.ones(4) * .1, "
         "torch.zeros(4, dtype=torch.long), 0, torch.qint8)"),
    Kind("dynamically quantised",
         "torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})"),
    Kind("sparse COO", "torch.eye(4).to_sparse()"),
    Kind("sparse CSR", "torch.eye(4).to_sparse_csr()"),
    Kind("jagged", "torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)"),
    Kind("meta", "torch.empty(4, device='meta')"),
    Kind("0-dim and empty", "[torch.tensor(3.), torch.empty(0, 3), base[10:10]]"),
    Kind("leaf with grad", "with_grad()"),
    Kind("non-leaf", "torch.ones(3, requires_grad=True) * 2"),
    Kind("inference tensor", "inference()"),
    Kind("tensor attributes", "attributed()", "[o[0].label, o[0] is o[1]]"),
    Kind("weight norm", "nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))",
         "[describe(o), sorted(o.state_dict()), describe(o.weight)]"),
    Kind("forward hook", "hooked()"),
    Kind("compiled module", "torch.compile(nn.Linear(4, 4))", "type(o).__name__"),
    Kind("script", "torch.jit.script(nn.Linear(4, 4))"),
    Kind("export", "torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),))",
         "round(o.module()(__import__('torch').ones(2, 4)).sum().item(), 5)"),
    Kind("tensors in a closure", "tensor_closure()", "o(1)"),
    Kind("dataclass with a tensor", "Cfg(1, [torch.ones(2)])", "describe([o.a, o.b])"),
    Kind("tensor over a numpy array", "over_numpy()",
         "[o[0].__setitem__(slice(None), 5), o[1][0].item(), o[2][0].item(), o[2].shape[0]]"),
    Kind("bound method of a model", "Net().eval().forward", "describe(o.__self__)"),
    Kind("fast tokenizer", "tok()", "o('hello text')['input_ids']"),
    Kind("transformers pipeline", "hfpipe()",
         "[type(o).__name__, o.model.lm_head.weight is o.model.transformer.wte.weight]"),
    Kind("dtype and device", "[torch.float16, torch.device('cpu'), torch.Size([1])]"),
]  # fmt: skip

TORCH_REFUSED = [
    Kind("lock in a module", "Locked()", "model → fc → guard is a lock"),
    Kind("custom python pre-tokenizer", "tokpy()", "model (tokenizers.Tokenizer) cannot leave this process"),
]

WRITER = """
import hashlib, json, traceback
from pathlib import Path
from nbdeploy.codec import encode, write
from nbdeploy.errors import CannotTravelError
from nbdeploy.store import Store
store, rows = Store(Path(HERE) / "store"), []
for number, (make, check, travels) in enumerate(KINDS):
    o = eval(make)
    if not travels:
        try: encode({"model": o}); rows.append({"error": "it was captured"})
        except CannotTravelError as error: rows.append({"refused": str(error)})
        except Exception: rows.append({"error": traceback.format_exc()})
        continue
    try:
        encoded = encode({"model": o})
        skeleton, blobs, _ = write(encoded, store)
        cells = {n: store.put_bytes(s.encode()).to_json() for n, s in encoded.cells.items()}
    except Exception:
        rows.append({"error": traceback.format_exc()}); continue
    manifest = {"format_version": 1, "requires": {"python": "%d.%d" % sys.version_info[:2], "implementation": "cpython",
        "platform": "any"}, "made_with": {}, "skeleton": skeleton.to_json(), "blobs": blobs, "files": [],
        "cells": cells,
        "variables": {}, "secrets": [], "distributions": [], "predict": {"name": "p", "kind": "function", "model": None,
        "how": "none", "variable": None, "source": "none"}, "signature": {}, "sample": None, "answer": None, "seed": 0,
        "globals": list(encoded.globals)}
    rows.append({"bundle": store.put_bundle(manifest), "bytes": sum(b["size"] for b in blobs),
                 "skeleton": len(encoded.skeleton), "expected": repr(eval(check))})
Path(HERE, "rows.json").write_text(json.dumps(rows))
"""

READER = """
import json, sys, traceback
from pathlib import Path
from nbdeploy_server.bundle import Bundle
HERE, out = sys.argv[1], []
for row, (make, check, travels) in zip(json.loads(Path(HERE, "rows.json").read_text()), KINDS):
    if "bundle" in row:
        try:
            o = Bundle.open(Path(HERE) / "store", row["bundle"]).load()["model"]
            row["found"] = repr(eval(check))
        except Exception:
            row["error"] = traceback.format_exc()
    out.append(row)
assert "nbdeploy" not in sys.modules
Path(HERE, "result.json").write_text(json.dumps(out))
"""


def run_table(folder: Path, notebook: str, travel: list[Kind], refused: list[Kind]) -> dict[str, dict[str, Any]]:
    """Write all kinds in one process, read them in another, and return what became of each."""
    kinds = [(kind.make, kind.check, True) for kind in travel] + [(kind.make, kind.check, False) for kind in refused]
    table = f"KINDS = {kinds!r}\n{DESCRIBE}"
    for mode, paths, text in (("write", [KERNEL, SERVER], notebook + WRITER), ("read", [SERVER], READER)):
        script = folder / f"{mode}.py"
        path = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}; MODE = {mode!r}\n"
        script.write_text(path + table + text)
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", str(script), str(folder)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        )
        assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "result.json").read_text())
    return dict(zip([kind.name for kind in (*travel, *refused)], rows, strict=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The table of kinds without torch."""
    return run_table(tmp_path_factory.mktemp("plain"), PLAIN_NOTEBOOK, PLAIN, REFUSED)


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The table of kinds of torch and transformers."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("torch and transformers are not installed")
    notebook = PLAIN_NOTEBOOK + TORCH_NOTEBOOK
    return run_table(tmp_path_factory.mktemp("torch"), notebook, TORCH, TORCH_REFUSED)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_kind_travels(plain: dict[str, dict[str, Any]], kind: Kind) -> None:
    """An object of the notebook is the same in a fresh process, its sharing included."""
    row = plain[kind.name]
    assert "error" not in row, row["error"]
    assert row["found"] == row["expected"]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_kind_is_refused_with_its_path(plain: dict[str, dict[str, Any]], kind: Kind) -> None:
    """What cannot travel is refused at capture, and the message leads to it."""
    row = plain[kind.name]
    assert "error" not in row, row["error"]
    assert row["refused"].startswith(kind.check)


@pytest.mark.torch
@pytest.mark.parametrize("kind", TORCH, ids=lambda kind: kind.name)
def test_torch_kind_travels(with_torch: dict[str, dict[str, Any]], kind: Kind) -> None:
    """Tensors and modules are the same in a fresh process, ties and views included."""
    row = with_torch[kind.name]
    assert "error" not in row, row["error"]
    assert row["found"] == row["expected"]
    assert row["bytes"] + row["skeleton"] < 1 << 20


@pytest.mark.torch
@pytest.mark.parametrize("kind", TORCH_REFUSED, ids=lambda kind: kind.name)
def test_torch_kind_is_refused_with_its_path(with_torch: dict[str, dict[str, Any]], kind: Kind) -> None:
    """Submodules are named as the attributes they look like."""
    row = with_torch[kind.name]
    assert "error" not in row, row["error"]
    assert row["refused"].startswith(kind.check)
