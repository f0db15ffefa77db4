"""A live object graph → a skeleton (pickle) and the raw memory beside it; nbdeploy_server.bundle reads it back.

cloudpickle pickles the notebook's functions and classes by value. Tensors, storages and arrays become references into
one table of memory regions, so that ties, views and a tensor over an array stay shared, and only the bytes that
something refers to are written. What cannot leave a process is refused with the path to it; pickle names only a type.
`reducer_override` does all this, never `persistent_id`, which pickle calls for every int and string.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import threading
import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
from nbdeploy_server.bundle import Blob

from nbdeploy import culprit
from nbdeploy.culprit import RefusedError
from nbdeploy.errors import CannotTravelError, CaptureError
from nbdeploy.reducers import Buffer, Definition, Graph, on_host
from nbdeploy.store import ChangedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nbdeploy_server.bundle import Ref

    from nbdeploy.store import Store

BATCH = 1 << 30  # bytes copied off an accelerator at a time
DEPTH, STACK = 300_000, 512 << 20  # Python frames and bytes of stack for a graph that is nested too deeply for pickle
PATIENCE = 30.0  # seconds to look for the path to a culprit

_PICKLE = cloudpickle.cloudpickle


@dataclass(frozen=True)
class Encoded:
    """An encoded object graph, its memory not written yet: `write` does that.

    Attributes:
        skeleton: the pickle.
        buffers: memory that the skeleton refers to, by position.
        globals: every "module:qualname" that the skeleton imports, sorted.
        modules: top-level names of all modules it needs, imports inside its functions included, sorted.
        functions: the functions and classes that travel by value.
        cells: source texts of the notebook cells that define them, by the file name in their code.
        versions: tensors with their version counters, to notice a training thread.
    """

    skeleton: bytes
    buffers: tuple[Buffer, ...]
    globals: tuple[str, ...]
    modules: tuple[str, ...]
    functions: tuple[Definition, ...]
    cells: Mapping[str, str]
    versions: tuple[tuple[Any, int], ...]


def encode(value: Mapping[str, Any], *, refuse: Callable[[object], str | None] | None = None) -> Encoded:
    """Encode the objects of a mapping, whose keys are their names in messages ("predict", "model", ...).

    Args:
        value: what travels; keep it alive and unchanged until `write` returns.
        refuse: called with each object that is no plain builtin; a text refuses it ("an Endpoint of this kernel").

    Raises CannotTravelError, naming the path to the object, where one cannot leave this process.
    """
    graph, out = Graph(refuse), io.BytesIO()
    try:
        try:
            _Pickler(out, graph).dump(value)
        except (RecursionError, pickle.PicklingError) as error:
            if not isinstance(error, RecursionError) and not isinstance(error.__cause__, RecursionError):
                raise
            graph, out = Graph(refuse), io.BytesIO()
            _deeply(functools.partial(_Tracer(out, graph).dump, value))
        skeleton = out.getvalue()
        names = _names(skeleton)
        _check_names(names)
    except Exception as error:  # noqa: BLE001 - pickling runs any type's own code; every failure is put in words
        raise _explain(value, refuse, error) from (None if isinstance(error, RefusedError) else error)
    tops = {name.partition(":")[0].partition(".")[0] for name in names} | graph.modules
    return Encoded(
        skeleton=skeleton,
        buffers=tuple(region.buffer() for region in graph.regions),
        globals=tuple(sorted(names)),
        modules=tuple(sorted(tops - {"nbdeploy_server", *_MAIN})),
        functions=tuple(graph.functions),
        cells=graph.cells,
        versions=tuple(graph.versions),
    )


def write(encoded: Encoded, store: Store) -> tuple[Ref, list[dict[str, Any]], int]:
    """Write the skeleton and its memory to the Store, without a copy of the memory.

    Returns the skeleton's Ref, the manifest's "blobs", and how many bytes of memory were new in the Store.
    Raises CaptureError where a tensor or array changed meanwhile, StoreError where the Store cannot take it.
    """
    refs: list[Ref] = []
    new_bytes = 0
    try:
        for batch in _batches(encoded.buffers):
            held = [on_host(buffer) for buffer in batch]  # the views borrow from the owners beside them
            written, new = store.put_buffers([view for view, _ in held])
            refs += written
            new_bytes += new
    except ChangedError as error:
        raise CaptureError(_CHANGED) from error
    if any(tensor._version != version for tensor, version in encoded.versions):  # noqa: SLF001 - torch's only counter
        raise CaptureError(_CHANGED)
    blobs = [
        Blob(ref, buffer.start, buffer.storage_size, buffer.device).to_json()
        for ref, buffer in zip(refs, encoded.buffers, strict=True)
    ]
    return store.put_bytes(encoded.skeleton), blobs, new_bytes


_CHANGED = (
    "the model changed while it was captured: a training thread is still running, or another cell writes into its "
    "arrays; wait until it is done, or stop it, and deploy again"
)
_MAIN = {"__main__", "__mp_main__"}
_NAMESPACE = ("__package__", "__name__", "__path__")  # what relative imports inside a function need
_BY_NAME = ("an object that Python only stores by its name in the notebook", culprit.SETUP)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle has no types
    """The fast pickler, in C."""

    def __init__(self, out: Any, graph: Graph) -> None:
        super().__init__(out, protocol=5)
        self._graph = graph

    def reducer_override(self, obj: Any) -> Any:
        reduced = self._graph.reduce(obj)
        return super().reducer_override(obj) if reduced is NotImplemented else reduced

    def _function_getnewargs(self, function: types.FunctionType) -> Any:
        return _new_arguments(self, function)


def _new_arguments(pickler: Any, function: types.FunctionType) -> Any:
    """As cloudpickle does, but without `__file__`: it says where somebody's Python lives, and nothing needs it."""
    names = {name: function.__globals__[name] for name in _NAMESPACE if name in function.__globals__}
    pickler.globals_ref.setdefault(id(function.__globals__), names)
    return cloudpickle.Pickler._function_getnewargs(pickler, function)  # noqa: SLF001 - the rest of it


_PythonPickler: Any = pickle._Pickler  # noqa: SLF001 - the pickler in Python, which typeshed does not know


class _Tracer(_PythonPickler):  # type: ignore[misc] # as the line above
    """The slow pickler, in Python: knows which objects it is inside of, and may nest as deeply as it is allowed."""

    dispatch_table = cloudpickle.Pickler.dispatch_table
    _function_reduce = cloudpickle.Pickler._function_reduce  # noqa: SLF001 - the two picklers must reduce alike
    _dynamic_function_reduce = cloudpickle.Pickler._dynamic_function_reduce  # noqa: SLF001 - as above
    _by_cloudpickle = cloudpickle.Pickler.reducer_override
    _function_getnewargs = _new_arguments

    def __init__(self, out: Any, graph: Graph) -> None:
        super().__init__(out, protocol=5)
        self.globals_ref: dict[int, Any] = {}
        self.stack: list[Any] = []
        self._graph = graph
        self._deadline = time.monotonic() + PATIENCE
        self._count = 0

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:  # noqa: FBT001, FBT002 - pickle's signature
        self._count += 1
        if self._count % 1024 == 0 and time.monotonic() > self._deadline:
            raise TimeoutError(f"this took more than {PATIENCE:.0f} s")
        self.stack.append(obj)
        super().save(obj, save_persistent_id)
        self.stack.pop()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in _PLAIN:
            return NotImplemented
        reduced = self._graph.reduce(obj)
        return self._by_cloudpickle(obj) if reduced is NotImplemented else reduced

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if _PICKLE._whichmodule(obj, name or getattr(obj, "__qualname__", "")) in _MAIN:  # noqa: SLF001 - as above
            raise RefusedError(*_BY_NAME)
        super().save_global(obj, name)


# what the C pickler never shows to reducer_override
_PLAIN = {type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset}


class _Nowhere(io.RawIOBase):
    """A file for a pass whose result nobody reads."""

    def write(self, data: Any) -> int:
        return len(data)


class _Ghost(type):
    """The type of _Name: whatever a skeleton does to it gives it back."""

    def __call__(cls, *_args: Any, **_options: Any) -> Any:
        return cls

    def __setitem__(cls, key: Any, value: Any) -> None:
        """Take an item of a mapping."""

    def add(cls, item: Any) -> None:
        """Take an item of a set."""

    append = extend = __setstate__ = add


class _Name(metaclass=_Ghost):
    """Stands for every global while a skeleton is read for its names."""

    def __new__(cls, *_args: Any, **_options: Any) -> Any:
        return cls


class _NameReader(pickle.Unpickler):  # noqa: S301 - it builds nothing: every global is _Name
    """Reads a skeleton for the names in it, at the speed of C."""

    def __init__(self, skeleton: bytes) -> None:
        super().__init__(io.BytesIO(skeleton))
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}:{name}")
        return _Name


def _names(skeleton: bytes) -> set[str]:
    """Return every "module:qualname" that loading the skeleton would import."""
    reader = _NameReader(skeleton)
    reader.load()
    return reader.names


def _check_names(names: set[str]) -> None:
    """Raise where the skeleton asks for something of the notebook by its name: no Replica has that."""
    if any(name.partition(":")[0] in _MAIN for name in names):
        raise RefusedError(*_BY_NAME)


def _deeply(work: Callable[[], None]) -> None:
    """Run in a thread with a large stack and a high recursion limit, and raise what it raises."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failed.append(error)

    limit, size = sys.getrecursionlimit(), threading.stack_size(STACK)
    try:
        sys.setrecursionlimit(max(limit, DEPTH))
        thread = threading.Thread(target=run, name="nbdeploy-codec", daemon=True)
        thread.start()
        threading.stack_size(size)
        thread.join()
    finally:
        threading.stack_size(size)
        sys.setrecursionlimit(limit)
    if failed:
        raise failed[0]


def _explain(value: Mapping[str, Any], refuse: Callable[[object], str | None] | None, error: Exception) -> CaptureError:
    """Put a failure in words, with the path to its culprit: a second pass finds it."""
    tracer = _Tracer(_Nowhere(), Graph(refuse))
    try:
        _deeply(functools.partial(tracer.dump, value))
    except TimeoutError:
        tracer.stack.clear()
    except Exception as found:  # noqa: BLE001 - pickling runs any type's own code
        error = found
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return CaptureError(
            f"{culprit.root(tracer.stack)} is nested too deeply to be captured, or its own pickling methods never end; "
            f"{culprit.SETUP}"
        )
    where = culprit.path(tracer.stack)
    kind = culprit.type_name(tracer.stack[-1]) if tracer.stack else ""
    if isinstance(error, RefusedError):
        return CannotTravelError(f"{where} is {error.words} ({kind}), which cannot leave this process; {error.hint}")
    reason = f"{type(error).__name__}: {error}"
    return CannotTravelError(f"{where} ({kind}) cannot leave this process: {reason}; {culprit.SETUP}")


def _batches(buffers: tuple[Buffer, ...]) -> Iterator[list[Buffer]]:
    """Group buffers, in order: host memory needs no copy, so a group of it may be of any size."""
    batch: list[Buffer] = []
    copied = 0
    for buffer in buffers:
        size = 0 if buffer.device == "cpu" else buffer.size
        if batch and copied + size > BATCH:
            yield batch
            batch, copied = [], 0
        batch.append(buffer)
        copied += size
    if batch:
        yield batch
