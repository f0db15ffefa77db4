"""How each special object of a graph is rebuilt, and the table of memory that tensors and arrays share.

Objects that pickle cannot save, or saves so that they do not load, get a function of nbdeploy_server.restore. Tensors,
storages and arrays become references into one table keyed by address: what shares memory refers to one region, and each
region knows which range of it is in use.
"""

from __future__ import annotations

import bisect
import ctypes
import dis
import functools
import hashlib
import io
import linecache
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import cloudpickle
from nbdeploy_server import restore

from nbdeploy import culprit
from nbdeploy.culprit import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

INLINE = 4096  # storages up to this many bytes live in the skeleton
ALIGN = 64  # a written range starts on such a boundary, so that any dtype can view it

_PICKLE = cloudpickle.cloudpickle


@dataclass(frozen=True)
class Definition:
    """A function or class of the notebook that travels by value; `code` is None for a class."""

    qualname: str
    code: types.CodeType | None


@dataclass(frozen=True)
class Buffer:
    """Memory to write: `size` bytes from `start` of a storage of `storage_size` bytes; `owner` keeps it alive."""

    owner: Any
    device: str
    address: int
    start: int
    size: int
    storage_size: int


class Region:
    """Contiguous memory that tensors and arrays refer to, and the range of it that is in use."""

    __slots__ = ("address", "device", "high", "index", "low", "owner", "size")

    def __init__(self, owner: Any, device: str, address: int, size: int, index: int) -> None:
        self.owner, self.device, self.address, self.size, self.index = owner, device, address, size, index
        self.low, self.high = size, 0

    def use(self, low: int, high: int) -> Region:
        """Widen the range in use."""
        self.low, self.high = min(self.low, low - low % ALIGN), max(self.high, min(high, self.size))
        return self

    def buffer(self) -> Buffer:
        """Return what has to be written."""
        return Buffer(self.owner, self.device, self.address, self.low, max(0, self.high - self.low), self.size)


class Graph:
    """What one pass over an object graph finds, and how its special objects are reduced."""

    def __init__(self, refuse: Callable[[object], str | None] | None) -> None:
        self.refuse = refuse
        self.numpy, self.torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self.regions: list[Region] = []
        self.modules: set[str] = set()
        self.functions: list[Definition] = []
        self.cells: dict[str, str] = {}
        self.versions: list[tuple[Any, int]] = []
        self._by_place: dict[tuple[str, int, int], Region] = {}
        self._addresses: list[tuple[int, int]] = []  # (address, -size) of the regions in host memory, sorted
        self._by_type: dict[type, Callable[[Any], Any] | None] = {}
        self._cell_names: dict[str, str | None] = {}

    def reduce(self, obj: Any) -> Any:
        """Return how an object is rebuilt, NotImplemented for what cloudpickle does well."""
        cls = type(obj)
        if self.refuse is not None and (words := self.refuse(obj)):
            raise RefusedError(words, culprit.SETUP)
        try:
            handler = self._by_type[cls]
        except KeyError:
            handler = self._by_type[cls] = self._handler(cls)
        return NotImplemented if handler is None else handler(obj)

    def _handler(self, cls: type) -> Callable[[Any], Any] | None:
        """Choose what reduces objects of a type; asked once per type."""
        exact: dict[Any, Callable[[Any], Any]] = {
            Region: self._region,
            types.FunctionType: self._function,
            types.ModuleType: self._module,
            types.CodeType: self._code,
            type(functools.lru_cache(len)): self._cached,
            typing.NewType: self._typing_name,
            typing.ParamSpec: self._typing_name,
            typing.TypeVarTuple: self._typing_name,
        }
        if sys.version_info < (3, 12):  # later ones hold no lock
            exact[functools.cached_property] = self._cached_property
        if self.numpy is not None:
            exact[self.numpy.ndarray] = exact[self.numpy.memmap] = self._array
        if cls in exact:
            return exact[cls]
        if issubclass(cls, type):
            return self._class
        if (verdict := culprit.verdict(cls)) is not None:
            return functools.partial(self._refused, verdict)
        return None if self.torch is None else self._torch_handler(cls, self.torch)

    def _torch_handler(self, cls: type, torch: Any) -> Callable[[Any], Any] | None:
        if cls in {torch.Tensor, torch.nn.Parameter}:
            return self._tensor
        if issubclass(cls, (torch.storage.TypedStorage, torch.UntypedStorage)):
            return self._storage
        if issubclass(cls, torch.jit.ScriptModule):
            return self._scripted
        if cls.__name__ == "ExportedProgram" and cls.__module__.startswith("torch.export"):
            return self._exported
        if issubclass(cls, torch.nn.Module) and cls.__module__ == "torch.nn.utils.parametrize":
            return self._parametrized
        return None

    def _refused(self, verdict: tuple[str, str], obj: Any) -> Any:
        for stream in ("stdout", "stderr"):
            if obj is getattr(sys, stream):
                return getattr, (sys, stream)
        raise RefusedError(*verdict)

    # ---- code

    def _function(self, function: Any) -> Any:
        if _PICKLE._should_pickle_by_reference(function):  # noqa: SLF001 - cloudpickle's own decision is the one we need
            return NotImplemented
        self.functions.append(Definition(function.__qualname__, function.__code__))
        if not (hasattr(function, "registry") and hasattr(function, "dispatch") and hasattr(function, "register")):
            return NotImplemented
        own = {"registry", "dispatch", "register", "_clear_cache", "__wrapped__"}
        attributes = {name: item for name, item in vars(function).items() if name not in own}
        others = [(cls, made) for cls, made in function.registry.items() if cls is not object]
        state = (function.registry[object], others, attributes)
        return restore.singledispatch, (function.__name__,), state, None, None, restore.set_dispatched

    def _class(self, cls: Any) -> Any:
        if cls not in _PICKLE._BUILTIN_TYPE_NAMES and not _PICKLE._should_pickle_by_reference(cls):  # noqa: SLF001 - as above
            self.functions.append(Definition(cls.__qualname__, None))
        return NotImplemented

    def _module(self, module: Any) -> Any:
        if _PICKLE._should_pickle_by_reference(module):  # noqa: SLF001 - as above
            self.modules.add(module.__name__.partition(".")[0])
        return NotImplemented

    def _cached(self, wrapper: Any) -> Any:
        if _PICKLE._lookup_module_and_qualname(wrapper) is not None:  # noqa: SLF001 - as above
            return NotImplemented
        options = wrapper.cache_parameters()
        own = {"__wrapped__", "cache_parameters"}
        attributes = {name: item for name, item in vars(wrapper).items() if name not in own}
        arguments = (wrapper.__name__, options["maxsize"], options["typed"])
        return restore.lru_cache, arguments, (wrapper.__wrapped__, attributes), None, None, restore.set_cached

    def _cached_property(self, made: Any) -> Any:
        return restore.cached_property, (made.func, made.attrname)

    def _typing_name(self, made: Any) -> Any:
        if _PICKLE._lookup_module_and_qualname(made, made.__name__) is not None:  # noqa: SLF001 - as above
            return NotImplemented
        arguments = (made.__supertype__,) if isinstance(made, typing.NewType) else ()
        return restore.new_type, (type(made).__name__, made.__name__, made.__module__, *arguments)

    def _code(self, code: types.CodeType) -> Any:
        before: list[Any] = [None, None]  # IMPORT_NAME follows two constants: the level and the names
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME" and before[0] == 0:
                self.modules.add(str(step.argval).partition(".")[0])
            before = [before[1], step.argval]
        # Code that is no cell keeps the name of its file, not the folder: that says where somebody's Python lives.
        name = self._cell(code.co_filename) or PurePath(code.co_filename).name
        return _PICKLE._code_reduce(code.replace(co_filename=name))  # noqa: SLF001 - as above

    def _cell(self, filename: str) -> str | None:
        """Return the name under which a cell's source travels; None where it is no cell or its source is unknown."""
        if filename not in self._cell_names:
            self._cell_names[filename] = None
            if _is_cell(filename) and (source := "".join(linecache.getlines(filename))):
                name = f"<cell {hashlib.sha256(source.encode(errors='surrogatepass')).hexdigest()[:12]}>"
                self._cell_names[filename] = name
                self.cells[name] = source
        return self._cell_names[filename]

    # ---- memory

    def _place(self, owner: Any, device: str, address: int, size: int, item: int = 0) -> Region:
        """Return the region for this memory; with `item`, one that contains it at a multiple of `item` will do."""
        place = (device, address, size) if size else (device, -id(owner), 0)
        region = self._by_place.get(place)
        if region is None and item and device == "cpu" and size:
            at = bisect.bisect_left(self._addresses, (address, -size))
            for start, length in self._addresses[max(0, at - 1) : at]:
                if address + size <= start - length and (address - start) % item == 0:
                    return self._by_place["cpu", start, -length]
        if region is None:
            region = self._by_place[place] = Region(owner, device, address, size, len(self.regions))
            if size > INLINE:
                self.regions.append(region)
            if device == "cpu" and size:
                bisect.insort(self._addresses, (address, -size))
        return region

    def _region(self, region: Region) -> Any:
        if region.size > INLINE:
            return restore.blob, (region.index,)
        view, _owner = on_host(Buffer(region.owner, region.device, region.address, 0, region.size, region.size))
        return restore.inline, (bytearray(view), region.device)

    def _bytes(self, data: bytes) -> Region:
        address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        return self._place(data, "cpu", address, len(data)).use(0, len(data))

    def _array(self, array: Any) -> Any:
        if array.dtype.hasobject:
            return NotImplemented
        root, writeable = array, array.flags.writeable
        numpy: Any = self.numpy
        while isinstance(root.base, numpy.ndarray):
            root = root.base
        if root.dtype.hasobject:  # the memory between its numbers holds pointers
            root = array = array.copy()
        if not array.size:
            region = self._place(array, "cpu", 0, 0)
            return restore.array, (region, array.dtype, 0, array.shape, None, writeable)
        low, high = _span(root.shape, root.strides, root.itemsize)
        first = root.__array_interface__["data"][0] + low
        region = self._place(root, "cpu", first, high - low, 1)
        offset = array.__array_interface__["data"][0] - region.address
        low, high = _span(array.shape, array.strides, array.itemsize)
        region.use(offset + low, offset + high)
        return restore.array, (region, array.dtype, offset, array.shape, array.strides, writeable)

    def _tensor(self, tensor: Any) -> Any:
        torch: Any = self.torch
        named = getattr(tensor, "has_names", bool)  # torch 2.15 dropped named tensors
        strided = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
        if not strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg() or named():
            return NotImplemented
        if not tensor.is_inference():  # those keep no version
            self.versions.append((tensor, tensor._version))  # noqa: SLF001 - torch's only counter
        memory, item = tensor.untyped_storage(), tensor.element_size()
        device, offset = str(memory.device), 0
        if tensor.numel():
            region = self._place(memory, device, memory.data_ptr(), memory.nbytes(), item)
            offset = memory.data_ptr() - region.address + tensor.storage_offset() * item
            low, high = _span(tensor.size(), [stride * item for stride in tensor.stride()], item)
            region.use(offset + low, offset + high)
        else:
            region = self._place(tensor, device, 0, 0)
        kind = "parameter" if type(tensor) is torch.nn.Parameter else "tensor"
        shape = (tuple(tensor.size()), tuple(tensor.stride()))
        arguments = (region, tensor.dtype, offset, *shape, tensor.requires_grad, kind)
        if not tensor.__dict__:
            return restore.tensor, arguments
        return restore.tensor, arguments, dict(tensor.__dict__), None, None, restore.set_attributes

    def _storage(self, storage: Any) -> Any:
        torch: Any = self.torch
        typed = isinstance(storage, torch.storage.TypedStorage)
        dtype, memory = (storage.dtype, storage._untyped_storage) if typed else (torch.uint8, storage)  # noqa: SLF001 - without torch's warning
        if memory.device.type == "meta":
            return restore.meta_storage, (memory.nbytes(), dtype)
        region = self._place(memory, str(memory.device), memory.data_ptr(), memory.nbytes())
        return restore.storage, (region.use(0, memory.nbytes()), dtype)

    def _scripted(self, module: Any) -> Any:
        torch: Any = self.torch
        out = io.BytesIO()
        torch.jit.save(module, out)
        device = next((str(tensor.device) for tensor in module.state_dict().values()), "cpu")
        return restore.scripted, (self._bytes(out.getvalue()), device)

    def _exported(self, program: Any) -> Any:
        torch: Any = self.torch
        out = io.BytesIO()
        torch.export.save(program, out)
        return restore.exported, (self._bytes(out.getvalue()),)

    def _parametrized(self, module: Any) -> Any:
        if "parametrizations" not in module.__dict__.get("_modules", {}):
            return NotImplemented
        cls = type(module).__bases__[0]
        return restore.parametrized, (cls,), dict(module.__dict__), None, None, restore.set_parametrized


def _is_cell(filename: str) -> bool:
    """Tell whether code of this file name was typed into a notebook, a console or the main script."""
    if re.search(r"[/\\]ipykernel_\d+[/\\]", filename):
        return True
    entry = linecache.cache.get(filename)
    if entry is not None and len(entry) > 1 and entry[1] is None and not os.path.exists(filename):  # noqa: PTH110 - any text
        return True
    return filename == getattr(sys.modules.get("__main__"), "__file__", None)


def _span(shape: Any, strides: Any, item: int) -> tuple[int, int]:
    """Return the first byte that a strided view touches and the one after its last, from its first element."""
    low = high = 0
    for count, stride in zip(shape, strides, strict=True):
        if stride >= 0:
            high += (count - 1) * stride
        else:
            low += (count - 1) * stride
    return low, high + item


def on_host(buffer: Buffer) -> tuple[memoryview, Any]:
    """Return a buffer's bytes in host memory, and what keeps them alive."""
    owner, address = buffer.owner, buffer.address + buffer.start
    if not buffer.size:
        return memoryview(b""), owner
    if buffer.device != "cpu":
        import torch

        flat = torch.empty(0, dtype=torch.uint8, device=owner.device).set_(owner)
        owner = flat[buffer.start : buffer.start + buffer.size].cpu()
        address = owner.data_ptr()
    return memoryview((ctypes.c_char * buffer.size).from_address(address)).cast("B"), owner
