"""The message format between our client and a Replica: what goes in comes back as itself. Never a pickle.

A message is msgpack. None, bool, int (64 bit), float, str, bytes, list and dict are msgpack's own types, so a message
of plain values is plain msgpack. Everything else is an extension type; the numbers below are a written format and never
change meaning:

    code  value                    data (msgpack unless said otherwise)
       0  envelope                 the byte 1; see below
       1  int beyond 64 bit        signed, big-endian bytes
       2  str with surrogates      UTF-8 with surrogates let through
       3  complex                  two big-endian doubles
       4  bytearray                its bytes
       5  tuple                    list of the items
       6  set                      list of the items
       7  frozenset                list of the items
       8  dict with other keys     list of key, value, key, value, ...
       9  range                    [start, stop, step]
      10  datetime                 [ISO 8601 without zone, fold, zone]
      11  date                     ISO 8601 text
      12  time                     [ISO 8601 without zone, fold, zone]
      13  timedelta                [days, seconds, microseconds]
      14  time zone                offset in microseconds, or the zone's name
      15  Decimal                  its text
      16  UUID                     16 bytes
      20  numpy array              [dtype, shape, "C" or "F", buffer]
      21  numpy object array       [shape, items]
      22  numpy scalar             [dtype, bytes]; dtype "U" with UTF-8 and "S" for text and bytes
      24  torch tensor             [dtype name, shape, buffer]
      28  pandas                   [kind, ...], see frames.py
      32  PIL image                [mode, size, palette, transparency, "png" or "raw", buffer]
      -1  msgpack's timestamp      read as datetime in UTC, never written

The bytes of arrays, tensors and images ("buffer" above is an index) stand beside the tree: a message that has any is
the list [envelope, tree, [buffer, ...]], each buffer used once. So packing copies an array once, and so does unpacking.
Classes of the user's own arrive as builtins: a namedtuple as a tuple, an Enum as its value, a dataclass, pydantic model
or attrs object as a dict.
"""

from __future__ import annotations

import datetime as dt
import decimal
import struct
import sys
import uuid
import zoneinfo
from types import NoneType
from typing import TYPE_CHECKING, Any

import msgspec

from nbdeploy_server import arrays, frames, images
from nbdeploy_server.plain import MAX_DEPTH, WireError, jsonable, opened, ordered, step, to_json, too_deep

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CONTENT_TYPE", "WireError", "jsonable", "pack", "to_json", "unpack"]

CONTENT_TYPE = "application/vnd.nbdeploy+msgpack"

_PLAIN = frozenset((NoneType, bool, int, float, str, bytes))
_ENVELOPE = b"\x93\xd4\x00\x01"  # a list of three that starts with extension 0 and its byte 1
_LOWEST, _HIGHEST = -(2**63), 2**64 - 1
_Ext = msgspec.msgpack.Ext
_encode = msgspec.msgpack.encode
_envelope = msgspec.msgpack.Decoder(tuple[_Ext, msgspec.Raw, list[memoryview]])


def pack(value: Any, *, name: str = "answer") -> bytes:
    """The message of a value.

    Raises WireError for a value that cannot be sent; `name` starts the path in its message.
    """
    try:
        try:
            return _Writer(careful=False).message(value)
        except (OverflowError, UnicodeEncodeError):  # a long integer or a lone surrogate: rare, so looked for only now
            return _Writer(careful=True).message(value)
    except WireError as error:
        error.root = name
        raise
    except RecursionError:
        deep = too_deep()
        deep.root = name
        raise deep from None


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """The value of a message; arrays, tensors and images own their memory.

    Raises WireError for bytes that are no message, whatever they are.
    """
    reader = _Reader()
    try:
        if bytes(data[:4]) == _ENVELOPE:
            _, tree, reader.buffers = _envelope.decode(data)
            return reader.read(tree)
        return reader.read(data)
    except WireError:
        raise
    except RecursionError:
        raise WireError("the message is nested too deep") from None
    except (
        Exception
    ) as error:  # strangers' bytes reach constructors of numpy, pandas, PIL and torch, and each raises its own
        raise WireError(f"the message cannot be read ({type(error).__name__}: {error})") from error


def _ext(code: int, lowered: Any) -> _Ext:
    return _Ext(code, _encode(lowered))


class _Writer:
    """Turns one value into msgspec's terms and collects the buffers on the way."""

    def __init__(self, *, careful: bool) -> None:
        self.careful = careful
        self.buffers: list[Any] = []
        self.pixels = images.MAX_PNG_PIXELS

    def message(self, value: Any) -> bytes:
        lowered = self.lower(value, 0)
        return _encode([_Ext(0, b"\x01"), lowered, self.buffers] if self.buffers else lowered)

    def lower(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return _scalar(value) if self.careful else value
        if depth > MAX_DEPTH:
            raise too_deep()
        if kind is list:
            return self._items(value, depth)
        if kind is dict:
            return self._dict(value, depth)
        code = _SEQUENCES.get(kind)
        if code is not None:
            return _ext(code, self._items(value if kind is tuple else ordered(value), depth))
        writer = _WRITERS.get(kind)
        if writer is not None:
            code, parts = writer[0], writer[1](value)
            return _Ext(code, parts) if type(parts) is bytes else _ext(code, self.lower(parts, depth + 1))
        return self._other(value, depth)

    def _items(self, items: Any, depth: int) -> Any:
        if not self.careful and _PLAIN.issuperset(map(type, items)):
            return items
        lowered = []
        for index, item in enumerate(items):
            try:
                lowered.append(self.lower(item, depth + 1))
            except WireError as error:
                raise error.inside(f"[{index}]") from None
        return lowered

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        native = _PLAIN.issuperset(map(type, value))
        if not self.careful and native and _PLAIN.issuperset(map(type, value.values())):
            return value
        pairs = []
        for key, item in value.items():
            try:
                pairs.append((self.lower(key, depth + 1), self.lower(item, depth + 1)))
            except WireError as error:
                raise error.inside(step(key)) from None
        if native and not any(type(key) is _Ext for key, _ in pairs):
            return dict(pairs)
        return _ext(8, [part for pair in pairs for part in pair])

    def _other(self, value: Any, depth: int) -> Any:
        """Arrays, tensors, frames, images, and what stands for a builtin."""
        try:
            if arrays.is_tensor(value):
                dtype, shape, buffer = arrays.tensor_parts(value)
                return _ext(24, [dtype, shape, self._buffer(buffer)])
            if arrays.is_array(value):
                return self._array(value, depth)
            if arrays.is_scalar(value):
                return _ext(22, arrays.scalar_parts(value))
            if "pandas" in sys.modules and frames.is_known(value):
                return _ext(28, self.lower(frames.parts(value), depth + 1))
            if images.is_image(value):
                *head, data = images.parts(value, self.pixels)
                self.pixels -= images.pixels_of(head[1], head[4])
                return _ext(32, [*self.lower(head, depth + 1), self._buffer(data)])
            if isinstance(value, dt.datetime):
                simple: Any = _fixed(value)
            else:
                simple = opened(value)
        except (WireError, OverflowError, UnicodeEncodeError, RecursionError):
            raise
        except Exception as error:  # code of the user's own type runs here: properties, serializers, __array__
            reason = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
            raise WireError(f"a value of type {type(value).__name__} cannot be sent: {reason}") from error
        return self.lower(simple, depth + 1)

    def _array(self, value: Any, depth: int) -> _Ext:
        if value.dtype.kind == "O":
            return _ext(21, [list(value.shape), self._items(value.reshape(-1).tolist(), depth + 1)])
        dtype, shape, order, buffer = arrays.array_parts(value)
        return _ext(20, [dtype, shape, order, self._buffer(buffer)])

    def _buffer(self, data: Any) -> int:
        self.buffers.append(data)
        return len(self.buffers) - 1


def _scalar(value: Any) -> Any:
    """A plain value as msgpack can hold it: long integers and lone surrogates as extensions."""
    if type(value) is int and not _LOWEST <= value <= _HIGHEST:
        return _Ext(1, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            return _Ext(2, value.encode("utf-8", "surrogatepass"))
    return value


def _zone(zone: dt.tzinfo | None, moment: dt.datetime | dt.time) -> dt.tzinfo | None:
    """The zone if it can be named, else the offset that it has at that moment."""
    if zone is None or type(zone) is dt.timezone or (type(zone) is zoneinfo.ZoneInfo and zone.key):
        return zone
    offset = moment.utcoffset()
    if offset is None:
        raise WireError("a time in a time zone without a name cannot be sent; use zoneinfo.ZoneInfo")
    return dt.timezone(offset)


def _moment(value: dt.datetime | dt.time) -> list[Any]:
    return [value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo, value)]


def _fixed(value: dt.datetime) -> dt.datetime:
    """A plain datetime of a subclass of it."""
    return dt.datetime.combine(value.date(), value.timetz())


def _zone_parts(zone: dt.timezone | zoneinfo.ZoneInfo) -> int | str:
    if isinstance(zone, zoneinfo.ZoneInfo):
        if not zone.key:
            raise WireError("a time zone without a name cannot be sent; use zoneinfo.ZoneInfo(name)")
        return zone.key
    return zone.utcoffset(None) // dt.timedelta(microseconds=1)


_SEQUENCES: dict[type, int] = {tuple: 5, set: 6, frozenset: 7}
_WRITERS: dict[type, tuple[int, Callable[[Any], Any]]] = {
    complex: (3, lambda value: struct.pack(">dd", value.real, value.imag)),
    bytearray: (4, bytes),
    range: (9, lambda value: [value.start, value.stop, value.step]),
    dt.datetime: (10, _moment),
    dt.date: (11, dt.date.isoformat),
    dt.time: (12, _moment),
    dt.timedelta: (13, lambda value: [value.days, value.seconds, value.microseconds]),
    dt.timezone: (14, _zone_parts),
    zoneinfo.ZoneInfo: (14, _zone_parts),
    decimal.Decimal: (15, str),
    uuid.UUID: (16, lambda value: value.bytes),
}


class _Reader:
    """Rebuilds one message; each buffer is handed out once, so no message asks for more memory than it has bytes."""

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self.used: set[int] = set()
        self.pixels = images.MAX_PNG_PIXELS
        self.depth = 0

    def read(self, data: Any) -> Any:
        return msgspec.msgpack.decode(data, ext_hook=self.extension)

    def extension(self, code: int, data: memoryview) -> Any:
        from_bytes = _FROM_BYTES.get(code)
        if from_bytes is not None:
            return from_bytes(bytes(data))
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise WireError("the message is nested too deep")
        parts = msgspec.msgpack.decode(data, ext_hook=self.extension)
        self.depth -= 1
        from_parts = _FROM_PARTS.get(code)
        if from_parts is not None:
            return from_parts(parts)
        if code == 20:  # noqa: PLR2004 - the table in the module's docstring
            dtype, shape, order, index = parts
            return arrays.array_of(dtype, shape, order, self._buffer(index))
        if code == 24:  # noqa: PLR2004 - as above
            dtype, shape, index = parts
            return arrays.tensor_of(dtype, shape, self._buffer(index))
        if code == 32:  # noqa: PLR2004 - as above
            return self._image(parts)
        raise WireError(f"the message has a value of kind {code}, unknown to this version; update nbdeploy")

    def _image(self, parts: list[Any]) -> Any:
        mode, size, palette, transparency, form, index = parts
        self.pixels -= images.pixels_of(size, form)
        if self.pixels < 0:
            raise WireError("the message holds more compressed pixels than it may")
        return images.of(mode, size, palette, transparency, form, bytes(self._buffer(index)))

    def _buffer(self, index: Any) -> memoryview:
        if type(index) is not int or not 0 <= index < len(self.buffers) or index in self.used:
            raise WireError("the message names bytes that it does not have")
        self.used.add(index)
        return self.buffers[index]


def _sequence(kind: type) -> Callable[[Any], Any]:
    def build(items: Any) -> Any:
        if type(items) is not list:
            raise WireError(f"a {kind.__name__} in the message is none")
        return kind(items)

    return build


def _pairs(parts: Any) -> dict[Any, Any]:
    if type(parts) is not list or len(parts) % 2:
        raise WireError("a dict in the message is none")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _datetime_of(parts: Any) -> dt.datetime:
    text, fold, zone = parts
    return dt.datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold)


def _time_of(parts: Any) -> dt.time:
    text, fold, zone = parts
    return dt.time.fromisoformat(text).replace(tzinfo=zone, fold=fold)


def _zone_of(parts: int | str) -> dt.tzinfo:
    if isinstance(parts, str):
        return zoneinfo.ZoneInfo(parts)
    return dt.timezone(dt.timedelta(microseconds=parts)) if parts else dt.UTC


def _decimal_of(parts: Any) -> decimal.Decimal:
    if type(parts) is not str:
        raise WireError("a Decimal in the message is none")
    return decimal.Decimal(parts)


_FROM_BYTES: dict[int, Callable[[bytes], Any]] = {
    1: lambda data: int.from_bytes(data, "big", signed=True),
    2: lambda data: data.decode("utf-8", "surrogatepass"),
    3: lambda data: complex(*struct.unpack(">dd", data)),
    4: bytearray,
    16: lambda data: uuid.UUID(bytes=data),
}
_FROM_PARTS: dict[int, Callable[[Any], Any]] = {
    5: _sequence(tuple),
    6: _sequence(set),
    7: _sequence(frozenset),
    8: _pairs,
    9: lambda parts: range(*parts),
    10: _datetime_of,
    11: dt.date.fromisoformat,
    12: _time_of,
    13: lambda parts: dt.timedelta(*parts),
    14: _zone_of,
    15: _decimal_of,
    21: lambda parts: arrays.objects_of(*parts),
    22: lambda parts: arrays.scalar_of(*parts),
    28: frames.of,
}
