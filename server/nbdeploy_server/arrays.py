"""numpy arrays and torch tensors as parts of a message.

Their bytes travel beside the message's tree, so that packing copies a large array once, into the message, and unpacking
once, out of it. Nothing here trusts a message: dtypes come from an allow-list, sizes are checked before memory is
taken, and no object array is ever made from raw bytes.
"""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

_UNIT = r"\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\]"
_DTYPE = re.compile(
    rf"[<>|](?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[SUV][1-9][0-9]{{0,8}}|[mM]8(?:{_UNIT})?)", re.ASCII
)
_LAST_CODE_POINT = 0x10FFFF

# Bytes per element; these names are the allow-list of tensor dtypes.
_TENSOR_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}
# Exponent bits, mantissa bits, exponent bias of the 8-bit formats with a sign.
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2fnuz": (5, 2, 16),
}


def instance_of(value: object, module: str, name: str) -> bool:
    """Whether the value is of a class of a module that this process has loaded; never imports it."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def is_array(value: object) -> bool:
    """Whether the value is a numpy array."""
    return instance_of(value, "numpy", "ndarray")


def is_scalar(value: object) -> bool:
    """Whether the value is a numpy scalar (np.float32(1), np.str_("a"), ...)."""
    return instance_of(value, "numpy", "generic")


def is_tensor(value: object) -> bool:
    """Whether the value is a torch tensor."""
    return instance_of(value, "torch", "Tensor")


def is_complex(value: Any) -> bool:
    """Whether the value is an array, scalar or tensor of complex numbers."""
    if is_tensor(value):
        return bool(value.is_complex())
    return (is_array(value) or is_scalar(value)) and value.dtype.kind == "c"


def describe(dtype: Any) -> str | list[Any]:
    """A numpy dtype as text, or a structured one as ["struct", itemsize, [[name, dtype, offset, title], ...]].

    Raises TypeError for dtypes that have no fixed bytes.
    """
    import numpy as np

    if dtype.names is not None:
        if dtype.itemsize == 0:
            message = "arrays of records without fields cannot be sent"
            raise TypeError(message)
        return ["struct", dtype.itemsize, [_field(name, *dtype.fields[name]) for name in dtype.names]]
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return ["sub", describe(base), list(shape)]
    if (dtype.kind == "V" and dtype.type is not np.void) or not _DTYPE.fullmatch(dtype.str):
        message = f"arrays of dtype {dtype} cannot be sent; convert with .astype(...) or return a list"
        raise TypeError(message)
    return str(dtype.str)


def _field(name: str, dtype: Any, offset: int, title: Any = None) -> list[Any]:
    return [name, describe(dtype), offset, title if isinstance(title, str) else None]


def dtype_of(description: Any) -> Any:
    """The numpy dtype of a description; raises ValueError or TypeError for anything not on the allow-list."""
    import numpy as np

    if isinstance(description, str):
        if not _DTYPE.fullmatch(description):
            message = "an array has a dtype that is not allowed"
            raise ValueError(message)
        return np.dtype(description)
    kind, first, second = description
    if kind == "sub":
        return np.dtype((dtype_of(first), tuple(second)))
    if kind != "struct":
        message = "an array has a dtype that is not allowed"
        raise ValueError(message)
    names, formats, offsets, titles = zip(*second, strict=True)
    fields = {"names": list(names), "formats": [*map(dtype_of, formats)], "offsets": list(offsets), "itemsize": first}
    return np.dtype(fields if titles == (None,) * len(names) else {**fields, "titles": list(titles)})


def array_parts(array: Any) -> tuple[Any, list[int], str, Any]:
    """Dtype description, shape, order ("C" or "F") and a view of the bytes; copies only what is not contiguous.

    Raises TypeError for masked arrays and dtypes that have no fixed bytes.
    """
    import numpy as np

    if isinstance(array, np.ma.MaskedArray):
        message = "masked arrays cannot be sent; return array.filled(...) and the mask"
        raise TypeError(message)
    array = np.asarray(array)
    if array.dtype.kind in "US" and array.dtype.itemsize == 0:
        array = array.astype(array.dtype.kind + "1")
    description = describe(array.dtype)
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    flat = (array.T if order == "F" else np.ascontiguousarray(array)).reshape(-1)
    return description, list(array.shape), order, memoryview(flat.view(np.uint8)) if flat.nbytes else b""


def array_of(description: Any, shape: list[int], order: str, buffer: memoryview) -> Any:
    """The writable array of these parts; raises ValueError or TypeError where they do not fit each other."""
    import numpy as np

    dtype = dtype_of(description)
    if order not in {"C", "F"} or dtype.itemsize == 0:
        message = "an array is described wrongly"
        raise ValueError(message)
    if _count(shape) * dtype.itemsize != len(buffer):
        message = f"an array of shape {tuple(shape)} and dtype {dtype} does not fit its {len(buffer)} bytes"
        raise ValueError(message)
    if not len(buffer):
        return np.empty(tuple(shape), dtype=dtype, order="F" if order == "F" else "C")
    flat = np.frombuffer(bytearray(buffer), dtype=dtype)  # the one copy; without it the array could not be written to
    _check_bytes(flat)
    return flat.reshape(tuple(shape)) if order == "C" else flat.reshape(tuple(reversed(shape))).T


def _check_bytes(array: Any) -> None:
    """Raise ValueError for bytes that are no booleans or characters; numpy would trust them, in records too."""
    import numpy as np

    for name in array.dtype.names or ():
        _check_bytes(array[name])
    if array.dtype.kind not in "bU" or not array.size:
        return
    whole = np.ascontiguousarray(array).reshape(-1)
    if array.dtype.kind == "b" and whole.view(np.uint8).max() > 1:
        message = "an array of booleans holds other bytes than 0 and 1"
        raise ValueError(message)
    if array.dtype.kind == "U" and whole.view(array.dtype.byteorder + "u4").max() > _LAST_CODE_POINT:
        message = "an array of strings holds bytes that are no characters"
        raise ValueError(message)


def _count(shape: Any) -> int:
    if not isinstance(shape, (list, tuple)) or any(type(size) is not int or size < 0 for size in shape):
        message = "an array has a shape that is none"
        raise ValueError(message)
    return math.prod(shape)


def objects_of(shape: list[int], items: list[Any]) -> Any:
    """The object array of these items; raises ValueError where their number does not fit the shape."""
    import numpy as np

    if _count(shape) != len(items):
        message = f"an array of shape {tuple(shape)} does not fit its {len(items)} items"
        raise ValueError(message)
    flat: Any = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):  # one by one: numpy would look into items that are lists
        flat[index] = item
    return flat.reshape(tuple(shape))


def scalar_parts(value: Any) -> tuple[Any, bytes]:
    """Dtype description and bytes of a numpy scalar; text as UTF-8, because arrays drop a trailing NUL."""
    import numpy as np

    if isinstance(value, np.str_):
        return "U", str.__str__(value).encode("utf-8", "surrogatepass")
    if isinstance(value, np.bytes_):
        return "S", bytes(value)
    return describe(value.dtype), np.asarray(value).tobytes()


def scalar_of(description: Any, data: bytes) -> Any:
    """The numpy scalar of these parts; raises ValueError or TypeError where they do not fit each other."""
    import numpy as np

    if description == "U":
        return np.str_(bytes(data).decode("utf-8", "surrogatepass"))
    if description == "S":
        return np.bytes_(bytes(data))
    return array_of(description, [], "C", memoryview(data))[()]


def tensor_parts(tensor: Any) -> tuple[str, list[int], Any]:
    """Dtype name, shape and a view of the bytes in C order; off the accelerator and without its gradient.

    Raises TypeError for sparse, quantized and meta tensors and for dtypes off the list.
    """
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or name not in _TENSOR_BYTES:
        kind = f"layout {tensor.layout} and dtype {name} on {tensor.device}"
        message = f"a tensor of {kind} cannot be sent; return a dense copy"
        raise TypeError(message)
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return name, list(tensor.shape), memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def tensor_of(name: str, shape: list[int], buffer: memoryview) -> Any:
    """The tensor of these parts, or a numpy array where torch is absent (bfloat16 and the 8-bit floats as float32).

    Raises ValueError where the parts do not fit each other.
    """
    if name not in _TENSOR_BYTES:
        message = "a tensor has a dtype that is not allowed"
        raise ValueError(message)
    if _count(shape) * _TENSOR_BYTES[name] != len(buffer):
        message = f"a tensor of shape {tuple(shape)} and dtype {name} does not fit its {len(buffer)} bytes"
        raise ValueError(message)
    if name == "bool" and len(buffer.tobytes().strip(b"\0\1")):
        message = "a tensor of booleans holds other bytes than 0 and 1"
        raise ValueError(message)
    try:
        import torch
    except ImportError:
        return tensor_as_array(name, shape, buffer)
    dtype = getattr(torch, name, None)
    if dtype is None:  # an older torch without this dtype
        return tensor_as_array(name, shape, buffer)
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(buffer), dtype=torch.uint8).view(dtype).reshape(shape)


def tensor_as_array(name: str, shape: list[int], buffer: memoryview) -> Any:
    """A tensor's parts as a numpy array; what numpy does not have becomes float32, exactly."""
    import numpy as np

    if name == "bfloat16":
        wide = np.frombuffer(bytearray(buffer), dtype="<u2").astype("<u4") << 16
        return wide.astype("<u4").view(np.float32).reshape(shape)
    if name.startswith("float8"):
        table = np.array([_float8(name, code) for code in range(256)], dtype=np.float32)
        return table[np.frombuffer(bytearray(buffer), dtype=np.uint8)].reshape(shape)
    return np.frombuffer(bytearray(buffer), dtype=name).reshape(shape)


def _float8(name: str, code: int) -> float:
    """The number that one byte stands for (OCP 8-bit formats, and "fnuz" ones without infinities and minus zero)."""
    if name == "float8_e8m0fnu":
        return math.nan if code == 0xFF else math.ldexp(1.0, code - 127)  # noqa: PLR2004 - the format's one NaN
    exponent_bits, mantissa_bits, bias = _FLOAT8[name]
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code & 0x80 else 1.0
    if name.endswith("fnuz") and code == 0x80:  # noqa: PLR2004 - where minus zero would be stands the one NaN
        return math.nan
    if name == "float8_e4m3fn" and code & 0x7F == 0x7F:  # noqa: PLR2004 - all ones is NaN, there are no infinities
        return math.nan
    if name == "float8_e5m2" and exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def tensor_array(tensor: Any) -> Any:
    """A numpy array with the tensor's numbers, float32 where numpy has no such dtype.

    Raises TypeError as tensor_parts does.
    """
    name, shape, buffer = tensor_parts(tensor)
    return tensor_as_array(name, shape, memoryview(buffer))


def foreign(value: Any) -> Any:
    """A numpy array of a value that knows how to become one; dtypes that numpy cannot name become float32."""
    import numpy as np

    array = np.asarray(value)
    custom = array.dtype.kind == "V" and array.dtype.names is None and array.dtype.type is not np.void
    return array.astype(np.float32) if custom else array


def listed(value: Any, numbers: Callable[[bytes], Any]) -> Any:
    """An array or scalar in JSON's terms: nested lists, dates as ISO 8601; `numbers` takes finished JSON of numbers."""
    import numpy as np

    kind = value.dtype.kind
    if kind in "biuf" and not isinstance(value, np.ma.MaskedArray):
        if value.dtype.itemsize > 8:  # noqa: PLR2004 - longer floats than orjson reads
            value = value.astype(np.float64)
        elif not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        contiguous = np.ascontiguousarray(value) if value.ndim else value.dtype.type(value)
        return numbers(orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY))
    if kind == "M":
        text = np.datetime_as_string(value).astype(object)
        return np.where(np.isnat(value), None, text).tolist()
    if kind == "m" and np.datetime_data(value.dtype)[0] != "generic":
        return np.where(np.isnat(value), None, value.astype("m8[us]").astype(object)).tolist()
    return value.tolist()
