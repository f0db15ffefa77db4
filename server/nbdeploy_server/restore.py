"""Functions that a Bundle's skeleton calls to rebuild what pickle alone would lose: part of the written format.

A skeleton stores these functions by name, so no name and no order of arguments here may change within a format version;
`__all__` is the list. Raw bytes are never in the skeleton (small ones aside): they come as a `Handle`, which several
tensors, arrays and storages may share, so that what shared memory in the notebook shares it in the Replica.
torch and numpy are imported by the functions that need them: a Bundle without tensors loads where torch is absent.
"""

from __future__ import annotations

import functools
import io
import mmap
import typing
from typing import Any

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "array",
    "blob",
    "cached_property",
    "exported",
    "inline",
    "lru_cache",
    "meta_storage",
    "new_type",
    "parametrized",
    "scripted",
    "set_attributes",
    "set_cached",
    "set_dispatched",
    "set_parametrized",
    "singledispatch",
    "storage",
    "tensor",
]

lacking: set[str] = set()  # devices of the notebook that were asked for here and are not there
SLICE = 64 << 20  # bytes that move to a device at once; a multiple of every page size


class Handle:
    """A byte range at load time, the one owner of its memory.

    Attributes:
        buffer: writable bytes, a private mapping of a blob or a bytearray.
        start: offset of the first byte within the storage it was taken from, in bytes; a multiple of 64.
        device: where its tensors lived: "cpu", "cuda:0", ...
    """

    __slots__ = ("_storage", "buffer", "device", "start")

    def __init__(self, buffer: Any, start: int = 0, device: str = "cpu") -> None:
        self.buffer = buffer
        self.start = start
        self.device = device
        self._storage: Any = None

    def storage(self) -> Any:
        """Return the torch.UntypedStorage over this memory, the same each time; on its device where there is one."""
        if self._storage is None:
            import torch

            device = _device(self.device)
            if not len(self.buffer):
                self._storage = torch.UntypedStorage(0, device=device)
            elif device == "cpu":
                self._storage = torch.frombuffer(self.buffer, dtype=torch.uint8).untyped_storage()
            else:
                self._storage = _moved(self.buffer, device)
                self.buffer = b""  # nothing else reads it: what lived on a device is rebuilt there
        return self._storage


def _moved(buffer: Any, device: str) -> Any:
    """Return a storage on an accelerator with these bytes.

    Slice by slice, each slice's pages given back after it: a model may be larger than the memory of its host.
    """
    import torch

    source = torch.frombuffer(buffer, dtype=torch.uint8)
    target = torch.empty(len(buffer), dtype=torch.uint8, device=device)
    for start in range(0, len(buffer), SLICE):
        end = min(start + SLICE, len(buffer))
        target[start:end].copy_(source[start:end])  # from memory that is not pinned, so it is over when this returns
        if isinstance(buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            buffer.madvise(mmap.MADV_DONTNEED, start, end - start)
    return target.untyped_storage()


def _device(tag: str) -> str:
    """Return the device for a tag of the manifest; the CPU where this machine lacks the accelerator."""
    import torch

    kind, _, index = tag.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind == "cuda" and torch.cuda.is_available():
        return tag if int(index or 0) < torch.cuda.device_count() else "cuda:0"
    if kind == "mps" and torch.backends.mps.is_available():
        return tag
    lacking.add(tag)
    return "cpu"


def blob(index: int) -> Handle:
    """Stand for the blob at this position of the manifest; the reader of a Bundle puts its own table in this place."""
    raise RuntimeError(f"blob {index} was asked for outside a Bundle; load the Bundle with nbdeploy_server.bundle")


def inline(data: bytearray, device: str) -> Handle:
    """Return a Handle on a whole storage that is small enough to live in the skeleton."""
    return Handle(data, 0, device)


def tensor(
    handle: Handle,
    dtype: Any,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,  # noqa: FBT001 - the skeleton passes it by position
    kind: str,
) -> Any:
    """Return a strided tensor; `offset` in bytes of the original storage, `kind` "tensor" or "parameter"."""
    import torch

    memory = handle.storage()
    made = torch.empty(0, dtype=dtype, device=memory.device)
    made.set_(memory, (offset - handle.start) // made.element_size(), size, stride)
    if kind == "parameter":
        return torch.nn.Parameter(made, requires_grad=requires_grad)
    return made.requires_grad_() if requires_grad else made


def array(
    handle: Handle,
    dtype: Any,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    writeable: bool,  # noqa: FBT001 - the skeleton passes it by position
) -> Any:
    """Return an ndarray over the handle's memory; `offset` in bytes of the original memory, strides in bytes."""
    import numpy as np

    made: Any = np.ndarray(shape, dtype, handle.buffer, offset - handle.start, strides)
    if not writeable:
        made.flags.writeable = False
    return made


def storage(handle: Handle, dtype: Any) -> Any:
    """Return a torch storage for torch's own rebuild functions.

    It is typed even where the original was not: torch's rebuild of fp8 and uint16 tensors asks it for a dtype.
    """
    import torch

    return torch.storage.TypedStorage(wrap_storage=handle.storage(), dtype=dtype, _internal=True)


def meta_storage(nbytes: int, dtype: Any) -> Any:
    """Return a storage without memory, as tensors on the meta device have."""
    import torch

    memory = torch.UntypedStorage(nbytes, device="meta")
    return torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)


def scripted(handle: Handle, device: str) -> Any:
    """Return a TorchScript module from the bytes that torch.jit.save wrote."""
    import torch

    return torch.jit.load(io.BytesIO(handle.buffer), map_location=_device(device))


def exported(handle: Handle) -> Any:
    """Return a torch.export program from the bytes that torch.export.save wrote."""
    import torch

    return torch.export.load(io.BytesIO(handle.buffer))


def parametrized(cls: Any) -> Any:
    """Return an empty module of the class that was parametrized; `set_parametrized` fills it."""
    return cls.__new__(cls)


def set_parametrized(module: Any, state: Mapping[str, Any]) -> None:
    """Fill a parametrized module and give it again the class that torch makes for it."""
    from torch.nn.utils import parametrize

    module.__dict__.update(state)
    parametrize._inject_new_class(module)  # noqa: SLF001 - torch has no public way to rebuild one without its tensors
    for name in module.parametrizations:
        parametrize._inject_property(module, name)  # noqa: SLF001 - as above


def set_attributes(target: Any, attributes: Mapping[str, Any]) -> None:
    """Give a tensor the Python attributes it had."""
    target.__dict__.update(attributes)


class _Later:
    """A function that is filled in afterwards: a cached function may call itself through its globals."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.function is None:
            raise RuntimeError(f"{self.__name__} was called before it was rebuilt")
        return self.function(*args, **kwargs)


def lru_cache(name: str, maxsize: int | None, typed: bool) -> Any:  # noqa: FBT001 - the skeleton passes it by position
    """Return an empty functools.lru_cache; `set_cached` gives it its function."""
    return functools.lru_cache(maxsize, typed)(_Later(name))


def set_cached(wrapper: Any, state: tuple[Callable[..., Any], Mapping[str, Any]]) -> None:
    """Give a cached function what it caches, and its attributes."""
    function, attributes = state
    wrapper.__wrapped__.function = function
    functools.update_wrapper(wrapper, function)
    wrapper.__dict__.update(attributes)


def singledispatch(name: str) -> Any:
    """Return an empty functools.singledispatch function; `set_dispatched` registers its implementations."""
    return functools.singledispatch(_Later(name))


def set_dispatched(
    dispatcher: Any, state: tuple[Callable[..., Any], list[tuple[Any, Callable[..., Any]]], Mapping[str, Any]]
) -> None:
    """Register the default and the implementations by class, in their order, and set the attributes."""
    default, implementations, attributes = state
    dispatcher.register(object, default)
    for cls, implementation in implementations:
        dispatcher.register(cls, implementation)
    functools.update_wrapper(dispatcher, default)
    dispatcher.__dict__.update(attributes)


def cached_property(function: Callable[[Any], Any], name: str | None) -> Any:
    """Return a functools.cached_property; before Python 3.12 it holds a lock, which cannot travel."""
    made: Any = functools.cached_property(function)
    if name is not None:
        made.__set_name__(None, name)
    return made


def new_type(kind: str, name: str, module: str | None, *args: Any) -> Any:
    """Return a typing.NewType, ParamSpec or TypeVarTuple; by itself each is looked up by name in its module."""
    made = getattr(typing, kind)(name, *args)
    if module is not None:
        made.__module__ = module
    return made
