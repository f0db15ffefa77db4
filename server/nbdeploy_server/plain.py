"""Answers as JSON: what every value of a notebook becomes for a caller who is not our client.

The common answer (strings, numbers, lists, dicts) costs one call of orjson; anything it does not know goes through
`_simplify`, one level at a time. Only what orjson refuses (keys that are no strings, integers beyond 64 bit, lone
surrogates, errors that need a path) is walked in Python.
"""

from __future__ import annotations

import base64
import collections
import collections.abc
import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import sys
import uuid
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec
import orjson

from nbdeploy_server import arrays, frames, images

if TYPE_CHECKING:
    from collections.abc import Callable

# Deeper values are nearly always a mistake (a list inside itself), and a level costs up to four interpreter frames.
MAX_DEPTH = 128
RETURN_INSTEAD = "return numbers, strings, lists, dicts, arrays, tensors, frames or images"
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels, or contained in itself; return something flatter"
_VIEWS: tuple[type, ...] = (collections.deque, type({}.keys()), type({}.values()), type({}.items()))


class WireError(ValueError):
    """A value cannot be sent, or bytes are no message; the text names the path of the value at fault.

    Attributes:
        reason: the sentence without the path.
        root: what the path starts with, "answer" by default; empty for bytes that cannot be read.
        steps: the path's steps, innermost first, each like `["scores"]` or `[3]`.
    """

    def __init__(self, reason: str, root: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.root = root
        self.steps: list[str] = []

    def inside(self, step: str) -> Self:
        """The same error, seen from the container one level further out."""
        self.steps.append(step)
        return self

    def __str__(self) -> str:
        path = self.root + "".join(reversed(self.steps))
        return f"{path}: {self.reason}" if path else self.reason


def step(key: object) -> str:
    """One step of a path, as it is written in Python: `["scores"]`, `[3]`."""
    text = json.dumps(key, ensure_ascii=False) if type(key) is str else repr(key)
    return f"[{text}]" if len(text) <= 60 else f"[{text[:57]}...]"  # noqa: PLR2004 - a path stays readable on one line


def refused(value: object) -> WireError:
    """The error for a value that no rule covers."""
    return WireError(f"a value of type {type(value).__name__} cannot be sent; {RETURN_INSTEAD}")


def too_deep() -> WireError:
    """The error for values that are nested too deep."""
    return WireError(_TOO_DEEP)


def opened(value: Any) -> Any:
    """The builtin that stands for an Enum, a record, a mapping, a view or a subclass of a builtin, one level deep.

    Raises WireError for anything else, with a reason but no path.
    """
    if isinstance(value, enum.Enum):
        return value.value
    for base in (str, int, float):
        if isinstance(value, base):
            return getattr(base, f"__{base.__name__}__")(value)  # the base's own method gives exactly the base's type
    if isinstance(value, (bytes, memoryview)):
        return bytes(value)
    builtins: tuple[Callable[[Any], Any], ...] = (dict, list, tuple, set, frozenset, bytearray)
    for kind in builtins:
        if isinstance(value, cast(type, kind)):
            return kind(value)
    return _record(value)


def _record(value: Any) -> Any:
    """A dataclass, model, Struct, attrs object or mapping as a dict, a view as a list, a foreign array as numpy's."""
    kind = type(value)
    if isinstance(value, type):
        raise refused(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(kind, "__pydantic_fields__"):
        return value.model_dump()
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if hasattr(kind, "__attrs_attrs__"):
        return {field.name: getattr(value, field.name) for field in kind.__attrs_attrs__}
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    if isinstance(value, _VIEWS):
        return list(cast(Any, value))
    if callable(getattr(kind, "__array__", None)):  # jax and tensorflow, known here by this protocol alone
        return arrays.foreign(value)
    raise refused(value)


def ordered(items: set[Any] | frozenset[Any]) -> list[Any]:
    """The items of a set in an order that hashes do not decide: by value where they compare, else by type and text."""
    try:
        if not any(isinstance(item, (set, frozenset)) or item != item for item in items):  # noqa: PLR0124 - finds NaN
            return sorted(items)
    except (TypeError, ArithmeticError):  # a signalling NaN of decimal does not even compare
        pass
    return sorted(items, key=lambda item: (type(item).__name__, repr(item)))


def to_json(value: Any, *, name: str = "answer") -> bytes:
    """The JSON of an answer, as UTF-8.

    Raises WireError for what JSON cannot say (complex numbers, two keys that become the same string, unknown types);
    `name` starts the path in its message.
    """
    try:
        return orjson.dumps(value, default=_hook, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError:
        pass  # the walk below either manages or says where the trouble is
    tree = _rooted(value, name)
    try:
        return orjson.dumps(tree)
    except TypeError:
        return _exact(tree, name)


def jsonable(value: Any, *, name: str = "answer") -> Any:
    """The same rules as `to_json`, as None, bool, int, float, str, list and dict with str keys."""
    try:
        return orjson.loads(orjson.dumps(value, default=_hook, option=orjson.OPT_PASSTHROUGH_DATACLASS))
    except TypeError:
        return _rooted(value, name)


def _exact(tree: Any, name: str) -> bytes:
    """JSON by the standard library, which keeps long integers exact and escapes lone surrogates."""
    try:
        return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:  # an integer of more digits than Python prints
        raise WireError(f"cannot be written as JSON ({error}); return a smaller number or a string", name) from error


def _hook(value: Any) -> Any:
    """What orjson puts in place of a value it does not know."""
    return _simplify(value, orjson.Fragment)


def _rooted(value: Any, name: str) -> Any:
    try:
        return _tree(value, 0)
    except WireError as error:
        error.root = name
        raise


def _tree(value: Any, depth: int) -> Any:
    """The value with nothing but JSON's own types in it; raises WireError with the path."""
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if depth > MAX_DEPTH:
        raise too_deep()
    if kind is list or kind is tuple:
        items = []
        for index, item in enumerate(value):
            try:
                items.append(_tree(item, depth + 1))
            except WireError as error:
                raise error.inside(f"[{index}]") from None
        return items
    if kind is dict:
        return _object(value, depth)
    try:
        simple = _simplify(value, orjson.loads)
    except WireError:
        raise
    except Exception as error:  # code of the user's own type runs here: properties, serializers, __array__
        raise WireError(f"a value of type {kind.__name__} cannot be read ({type(error).__name__}: {error})") from error
    return _tree(simple, depth + 1)


def _object(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        try:
            text = key if type(key) is str else key_text(key)
            if text in result:
                twice = WireError(f"two keys both become {text!r} in JSON; make them different")
                raise twice
            result[text] = _tree(item, depth + 1)
        except WireError as error:
            raise error.inside(step(key)) from None
    return result


def key_text(key: Any) -> str:
    """A key as JSON writes it: numbers as digits, true, false and null, dates ISO 8601, tuples as Python shows them."""
    try:
        plain = key if type(key) is tuple else _tree(key, 0)
    except WireError:
        plain = None if key is None else repr(key)
    if isinstance(plain, str):
        return plain
    if type(plain) in (bool, int) or key is None:
        return json.dumps(plain)
    return str(plain if plain is not None else key)


def _simplify(value: Any, numbers: Callable[[bytes], Any]) -> Any:
    """One level of a value in simpler terms; `numbers` takes the JSON of a numeric array."""
    if isinstance(value, complex) or arrays.is_complex(value):
        raise WireError("complex numbers have no JSON; return the real and the imaginary part")
    if arrays.is_tensor(value):
        return arrays.listed(arrays.tensor_array(value), numbers)
    if arrays.is_array(value) or arrays.is_scalar(value):
        return arrays.listed(value, numbers)
    if "pandas" in sys.modules and frames.is_known(value):
        return frames.listed(value, key_text, jsonable)
    if images.is_image(value):
        return base64.b64encode(images.png(value)).decode()
    return _simplify_builtin(value)


def _simplify_builtin(value: Any) -> Any:
    """The part of `_simplify` that needs no package."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, (set, frozenset)):
        return ordered(value)
    if isinstance(value, range):
        return list(value)
    if isinstance(value, decimal.Decimal):
        return float(value) if value.is_finite() else None
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return msgspec.to_builtins(value)  # ISO 8601, the form that pydantic and msgspec read
    if isinstance(value, (uuid.UUID, dt.tzinfo)):
        return str(value)
    return opened(value)
