"""Requests to arguments: one decoder per Endpoint, chosen once at load.

msgspec decodes what it knows in one pass. A parameter that needs more (an array with the sample's dtype, a pydantic
model) is decoded as any JSON first and restored by a converter of its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import Any, Union

import msgspec

from nbdeploy_server import wire
from nbdeploy_server.annotations import adapter_for, is_model, is_native
from nbdeploy_server.errors import RequestError
from nbdeploy_server.forms import leaf_of
from nbdeploy_server.signature import Signature
from nbdeploy_server.values import RESTORE

LONGEST_NAME = 80  # characters of an unknown parameter's name that a message repeats

Converter = Callable[[Any], Any]


class Decoder:
    """Turns request bodies into keyword arguments.

    Names in `reserved` are parameters that are no input (the model, live defaults): `**kwargs` does not take them.

    Raises:
        RequestError: 422 naming each parameter at fault, or 400 where the body is no JSON or msgpack at all.
    """

    def __init__(self, signature: Signature, types: dict[str, Any], reserved: Collection[str] = ()) -> None:
        self._signature = signature
        self._reserved = frozenset(reserved)
        self._names = tuple(p.name for p in signature.parameters)
        self._optional = any(not p.required for p in signature.parameters)
        self._fields: dict[str, Any] = {}
        self._converters: dict[str, Converter] = {}
        for parameter in signature.parameters:
            native, converter = _plan(parameter.form, types.get(parameter.name))
            self._fields[parameter.name] = native
            if converter is not None:
                self._converters[parameter.name] = converter
        # Fields have neutral names: a parameter may be called anything, `__struct_fields__` included.
        fields: list[Any] = []
        for index, parameter in enumerate(signature.parameters):
            native = self._fields[parameter.name]
            if parameter.required:
                fields.append((f"f{index}", native))
            else:
                optional = Any if native is Any else Union[native, msgspec.UnsetType]  # noqa: UP007 - not every form has `|`
                fields.append((f"f{index}", optional, msgspec.UNSET))
        self._struct = msgspec.defstruct(
            "Request",
            fields,
            rename={f"f{i}": name for i, name in enumerate(self._names)},
            forbid_unknown_fields=True,
            kw_only=True,
            gc=False,
        )
        self._decode = msgspec.json.Decoder(self._struct, dec_hook=_restore).decode
        self._astuple = msgspec.structs.astuple

    def json(self, body: bytes | bytearray) -> dict[str, Any]:
        """Decode an application/json body."""
        if self._signature.extra:
            return self.message(self._loads(body))
        try:
            values = self._astuple(self._decode(body))
        except (msgspec.ValidationError, ValueError, TypeError, RecursionError):
            # The slow path says what is wrong with every parameter, not just with the first.
            return self.message(self._loads(body))
        arguments = dict(zip(self._names, values, strict=True))
        if self._optional:
            arguments = {name: value for name, value in arguments.items() if value is not msgspec.UNSET}
        return self._convert(arguments) if self._converters else arguments

    @staticmethod
    def _loads(body: bytes | bytearray) -> Any:
        try:
            return msgspec.json.decode(body)
        except RecursionError:
            raise RequestError(400, "The body is not valid JSON: it is nested too deeply.") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(400, f"The body is not valid JSON: {error}.") from None

    def packed(self, body: bytes | bytearray) -> dict[str, Any]:
        """Decode an application/vnd.nbdeploy+msgpack body."""
        try:
            value = wire.unpack(bytes(body))
        except wire.WireError as error:
            raise RequestError(400, f"The body is not valid msgpack: {error}.") from None
        return self.message(value)

    def message(self, value: Any) -> dict[str, Any]:
        """Check and restore arguments that are Python objects already."""
        if not isinstance(value, dict):
            raise RequestError(422, f"The body must be an object with {self._wanted()}, not {_kind(value)}.")
        errors: list[dict[str, str]] = []
        arguments: dict[str, Any] = {}
        for parameter in self._signature.parameters:
            if parameter.name not in value:
                if parameter.required:
                    errors.append({"parameter": parameter.name, "message": "is missing"})
                continue
            try:
                arguments[parameter.name] = self._one(parameter.name, value[parameter.name])
            except (ValueError, TypeError, RecursionError) as error:
                errors.append({"parameter": parameter.name, "message": _plain(error)})
        for name in value:
            if name in self._fields:
                continue
            if self._signature.extra and isinstance(name, str) and name not in self._reserved:
                arguments[name] = value[name]
            else:
                shown = str(name)[:LONGEST_NAME]
                errors.append({"parameter": shown, "message": f"is not known; there is {self._wanted()}"})
        if errors:
            first = errors[0]
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise RequestError(422, f"{first['parameter']} {first['message']}{more}.", errors=tuple(errors))
        return arguments

    def _one(self, name: str, value: Any) -> Any:
        native, converter = self._fields[name], self._converters.get(name)
        if native is not Any:
            try:
                value = _convert(value, native)
            except msgspec.ValidationError:
                if not hasattr(value, "tolist"):
                    raise
                value = _convert(value.tolist(), native)  # an array for list[float], a numpy number for float
        return converter(value) if converter else value

    def _convert(self, arguments: dict[str, Any]) -> dict[str, Any]:
        errors = []
        for name, converter in self._converters.items():
            if name in arguments:
                try:
                    arguments[name] = converter(arguments[name])
                except (ValueError, TypeError, RecursionError) as error:
                    errors.append({"parameter": name, "message": _plain(error)})
        if errors:
            raise RequestError(422, f"{errors[0]['parameter']} {errors[0]['message']}.", errors=tuple(errors))
        return arguments

    def _wanted(self) -> str:
        names = [p.name if p.required else f"{p.name} (optional)" for p in self._signature.parameters]
        return ", ".join(names) if names else "no parameter"


def _convert(value: Any, native: Any) -> Any:
    return msgspec.convert(value, native, dec_hook=_restore, builtin_types=_kept(value))


def _kept(value: Any) -> tuple[type, ...]:
    """Bytes from msgpack are bytes already, not base64 text."""
    return (bytes, bytearray) if isinstance(value, (bytes, bytearray)) else ()


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")


_ENUM = re.compile(r"Invalid enum value .*(?= - at `)|Invalid enum value .*", re.DOTALL)  # msgspec shows the value


# msgspec's words for types, as a person says them.
_EXPECTED = re.compile(r"Expected `(?P<wanted>[^`]+)`(?:, got `(?P<got>[^`]+)`)?(?: - at `(?P<where>[^`]*)`)?")
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "bytes": "bytes",
    "float": "a number",
    "int": "a number",
    "null": "null",
    "object": "an object",
    "str": "a text",
}


def _plain(error: Exception) -> str:
    """Say what is wrong with a value without showing the value."""
    if hasattr(error, "errors") and callable(error.errors):  # pydantic
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    text = _ENUM.sub("is none of the allowed values", str(error))
    if text.startswith("is none"):
        return text
    found = _EXPECTED.fullmatch(text)
    if found is None:  # a message of our own, or one that msgspec says in other words
        return text if text.startswith("must") else f"does not fit: {text}"
    parts = found["wanted"].split(" | ")
    words = {**_WORDS, "int": "a whole number"} if "float" not in parts else _WORDS
    wanted = " or ".join(dict.fromkeys(words.get(part, part) for part in parts))
    got = f", not {_WORDS.get(found['got'], found['got'])}" if found["got"] else ""
    return f"must be {wanted}{got}" + (f" (at {found['where'].removeprefix('$')})" if found["where"] else "")


def _plan(form: dict[str, Any], annotation: Any) -> tuple[Any, Converter | None]:
    """Choose how a parameter is decoded: the type for msgspec, and what restores the value after it."""
    kind = form["type"]
    if kind == "annotation":
        if annotation is None or annotation is Any:
            return Any, None
        if is_native(annotation):
            return annotation, None
        adapter = adapter_for(annotation)
        return Any, adapter.validate_python if adapter is not None else None
    if kind in _PLAIN:
        return _PLAIN[kind], None
    if kind in {"list", "tuple"}:
        items, converter = _plan(form["items"], None)
        if converter is None:
            return (list[items] if kind == "list" else tuple[items, ...]), None  # type: ignore[valid-type] # run-time
        return Any, None
    if kind in RESTORE:
        return Any, functools.partial(RESTORE[kind], form=form)
    return Any, None


_PLAIN: dict[str, Any] = {
    "boolean": bool,
    "string": str,
    "number": int | float,
    "bytes": bytes,
    "object": dict[str, Any],
    "set": set,
}


@functools.lru_cache(maxsize=256)
def _model_adapter(cls: Any) -> Any:
    return adapter_for(cls)


def _restore(cls: Any, value: Any) -> Any:
    """Msgspec's hook for types that it does not know."""
    if isinstance(value, cls):
        return value
    form = leaf_of(cls)
    if form is not None:
        return RESTORE[form](value, form={"type": form})
    if is_model(cls):
        try:
            return _model_adapter(cls).validate_python(value)
        except ValueError as error:
            raise ValueError(_plain(error)) from None  # pydantic's own words show the value
    raise NotImplementedError(f"{cls!r} cannot be decoded")
