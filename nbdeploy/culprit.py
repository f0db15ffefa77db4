"""Which objects cannot leave a process, in a data scientist's words, and the path to one of them.

pickle says `cannot pickle '_thread.RLock' object`; a user needs `predict → globals["client"] → _lock`. Nothing here is
imported to recognise a type: the names are compared.
"""

from __future__ import annotations

import functools
import json
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

LONGEST = 12  # steps of a path that are shown
SETUP = "build it in a function and pass --setup that_function: it runs once in each Replica"
_FILE = "read it into a variable, or open it inside predict and pass --file PATH"
_MAKE = "make a list of it, or create it inside predict"
# words for a data scientist, the next step, the types (module.qualname); subclasses too, unless they pickle themselves
_REFUSALS = (
    ("an open file", _FILE, ("_io.FileIO _io.BufferedReader _io.BufferedWriter _io.BufferedRandom _io.BufferedRWPair "
     "_io.TextIOWrapper tempfile._TemporaryFileWrapper mmap.mmap")),
    ("a network connection", SETUP, "_socket.socket socket.socket _ssl._SSLContext _ssl._SSLSocket"),
    ("a database connection", SETUP, ("sqlite3.Connection sqlite3.Cursor psycopg2.extensions.connection "
     "psycopg.Connection psycopg.AsyncConnection pymysql.connections.Connection sqlalchemy.engine.base.Engine "
     "redis.client.Redis "
     "sqlalchemy.engine.base.Connection sqlalchemy.orm.session.Session duckdb.DuckDBPyConnection "
     "_duckdb.DuckDBPyConnection pymongo.mongo_client.MongoClient pymongo.synchronous.mongo_client.MongoClient")),
    ("an HTTP client", SETUP, ("httpx.Client httpx.AsyncClient httpx._client.BaseClient aiohttp.client.ClientSession "
     "urllib3.poolmanager.PoolManager http.client.HTTPConnection")),
    ("a lock", SETUP, ("_thread.lock _thread.RLock threading.Condition threading.Event threading.Semaphore "
     "threading.Barrier multiprocessing.synchronize.SemLock")),
    ("a thread or its local state", SETUP, "threading.Thread _thread._local _threading_local.local"),
    ("a queue between threads", SETUP, "_queue.SimpleQueue queue.Queue multiprocessing.queues.Queue"),
    ("a pool of workers", SETUP,
     "concurrent.futures._base.Executor multiprocessing.pool.Pool joblib.parallel.Parallel"),
    ("a process", SETUP, "subprocess.Popen multiprocessing.process.BaseProcess"),
    ("the pending result of a task", _MAKE, "concurrent.futures._base.Future _asyncio.Future _asyncio.Task"),
    ("an event loop", SETUP, ("asyncio.events.AbstractEventLoop asyncio.events.Handle asyncio.transports.BaseTransport "
     "asyncio.streams.StreamReader asyncio.streams.StreamWriter")),
    ("a generator", _MAKE, "builtins.generator builtins.async_generator"),
    ("a coroutine", "await it first", "builtins.coroutine"),
    ("a running frame or traceback", "keep its text instead", "builtins.frame builtins.traceback"),
    ("a context variable", SETUP, "_contextvars.ContextVar _contextvars.Context _contextvars.Token"),
    ("a weak reference", "keep an ordinary reference or dictionary", ("weakref.ReferenceType weakref.WeakKeyDictionary "
     "weakref.WeakValueDictionary")),
    ("the notebook's shell", ("predict must do without magics, `!` commands and get_ipython(); call their Python "
     "counterparts, such as subprocess.run"),
     "IPython.core.interactiveshell.InteractiveShell ipykernel.kernelbase.Kernel"),
)  # fmt: skip
_WORDS = {name: (words, hint) for words, hint, names in _REFUSALS for name in names.split()}
_OWN_PICKLING = {"__reduce__", "__reduce_ex__", "__getstate__"}


class RefusedError(Exception):
    """An object cannot travel: `words` say what it is, `hint` what to do."""

    def __init__(self, words: str, hint: str) -> None:
        super().__init__(words)
        self.words = words
        self.hint = hint


def verdict(cls: type) -> tuple[str, str] | None:
    """Return words and the next step for a type whose objects cannot travel, None for any other."""
    for base in cls.__mro__:
        if (found := _WORDS.get(f"{base.__module__}.{base.__qualname__}")) is not None:
            return found
        if _OWN_PICKLING & vars(base).keys():
            return None
    return None


def type_name(obj: Any) -> str:
    """Return the name of an object's type as it would be imported."""
    cls = type(obj)
    name = str(cls.__qualname__)
    return name if cls.__module__ in {"builtins", "__main__"} else f"{cls.__module__.lstrip('_')}.{name}"


def root(stack: list[Any]) -> str:
    """Return the name of the captured object that a stack of nested objects starts with."""
    return path(stack[:2]) if len(stack) > 1 else "the capture"


def path(stack: list[Any]) -> str:
    """Return the way through nested objects, outermost first: `predict → globals["db"] → connection`.

    The first object is the mapping of captured objects by name. Between real objects the stack holds the tuples and
    dictionaries that pickling makes on the way; they get no label where the next real object is found without them.
    """
    labels: list[str] = []
    skipped: list[str] = []
    anchor = before = stack[0] if stack else None
    for obj in stack[1:]:
        label = _label(anchor, obj)
        if label is None:
            aside = _label(before, obj)
            if aside and isinstance(before, Mapping):
                skipped.append(aside)
        else:
            labels.append(_joined(anchor, labels, label) if labels else label[2:-2] if label[:1] == "[" else label)
            skipped.clear()
            anchor = obj
        before = obj
    labels += [label for label in skipped if not label.startswith('["__')]
    labels = [label for label in labels if label]
    if len(labels) > LONGEST:
        half = LONGEST // 2
        labels = [*labels[:half], f"… {len(labels) - 2 * half} more …", *labels[-half:]]
    return " → ".join(labels) or "the capture"


def _joined(parent: Any, labels: list[str], label: str) -> str:
    """Write the submodules and weights of a torch module as the attributes they look like."""
    if labels[-1] in {"_modules", "_parameters", "_buffers"} and isinstance(parent, Mapping) and label[:2] == '["':
        labels[-1] = ""
        return label[2:-2]
    return label


def _label(parent: Any, child: Any) -> str | None:
    """Say where in its parent a child is; "" where that needs no words, None where it is not there."""
    if isinstance(parent, types.FunctionType):
        return _in_function(parent, child)
    if isinstance(parent, type):
        if isinstance(child, type) and child in parent.__bases__:
            return f"base {child.__name__}"
        return next((name for name, item in list(vars(parent).items()) if item is child), None)
    inside = isinstance(parent, types.CellType) and _contents(parent) is child
    if inside or (isinstance(parent, classmethod | staticmethod | types.MethodType) and parent.__func__ is child):
        return ""
    return _in_container(parent, child) or _in_attributes(parent, child)


def _in_container(parent: Any, child: Any) -> str | None:
    """Say under which key or index of a container an object is."""
    if isinstance(parent, Mapping):
        return next((f"[{_short(key)}]" for key, item in list(parent.items()) if item is child), None)
    if isinstance(parent, list | tuple | deque):
        at = next((at for at, item in enumerate(parent) if item is child), None)
        fields = getattr(parent, "_fields", None)
        return None if at is None else str(fields[at]) if fields else f"[{at}]"
    if isinstance(parent, set | frozenset):
        return "an element" if any(item is child for item in parent) else None
    return None


def _in_function(function: types.FunctionType, child: Any) -> str | None:
    """Say where a function holds an object."""
    code = function.__code__
    for name in _names(code):
        if function.__globals__.get(name) is child:
            return f'globals["{name}"]'
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if _contents(cell) is child:
            return f'closure "{name}"'
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    for name, item in [*zip(positional, defaults, strict=True), *(function.__kwdefaults__ or {}).items()]:
        if item is child:
            return f'default "{name}"'
    return next((name for name, item in vars(function).items() if item is child), None)


def _names(code: types.CodeType) -> list[str]:
    """Return the names that code looks up, the functions inside it included."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return [*code.co_names, *inner]


def _in_attributes(obj: Any, child: Any) -> str | None:
    """Say which attribute of an object another one is, without running properties."""
    if child is type(obj):
        return f"class {child.__name__}"
    try:
        attributes = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        attributes = {}
    for name, item in list(attributes.items()):
        if item is child:
            return str(name)
    readable = {
        types.MethodType: ("__self__",),
        functools.partial: ("func", "args", "keywords"),
        property: ("fget", "fset"),
    }
    slots = [name for base in type(obj).__mro__ for name, item in vars(base).items() if _is_slot(item)]
    for name in (*readable.get(type(obj), ()), *slots):
        try:
            if object.__getattribute__(obj, name) is child:
                return "" if name == "__wrapped__" else name
        except AttributeError:
            continue
    return None


def _is_slot(descriptor: Any) -> bool:
    return isinstance(descriptor, types.MemberDescriptorType)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _short(key: Any) -> str:
    """Write a key of a mapping, not longer than a line can bear."""
    text = json.dumps(key, ensure_ascii=False) if isinstance(key, str) else repr(key)
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"  # noqa: PLR2004 - a matter of looks
