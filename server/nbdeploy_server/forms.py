"""Forms: what a sample value shows about its parameter, and the JSON Schema of each form.

A form is plain data that stands in the manifest: {"type": "ndarray", "dtype": "float32", "rank": 2}.
"""

from __future__ import annotations

import enum
import typing
from typing import Any

ANY: dict[str, Any] = {"type": "any"}

# Classes whose values have a form of their own on the wire, by module root and name: found without importing them.
_LEAVES = {
    ("numpy", "ndarray"): "ndarray",
    ("torch", "Tensor"): "tensor",
    ("torch", "Parameter"): "tensor",
    ("pandas", "DataFrame"): "frame",
    ("pandas", "Series"): "series",
    ("PIL", "Image"): "image",
}
_SCALARS: dict[type, str] = {bool: "boolean", str: "string", bytes: "bytes", bytearray: "bytes"}


def leaf_of(cls: Any) -> str | None:
    """Name the wire form of an array, tensor, frame or image class, or None for any other."""
    cls = typing.get_origin(cls) or cls
    for base in getattr(cls, "__mro__", ()):
        form = _LEAVES.get((base.__module__.partition(".")[0], base.__name__))
        if form:
            return form
    return None


def scalar_of(cls: Any) -> dict[str, Any] | None:
    """Return the form of a numpy number or boolean class, or None for any other."""
    if not isinstance(cls, type) or cls.__module__ != "numpy":
        return None
    if cls.__name__ in {"bool", "bool_"}:
        return {"type": "boolean"}
    names = {base.__name__ for base in cls.__mro__}
    return {"type": "number"} if names & {"integer", "floating"} else None


def describe(value: Any) -> dict[str, Any]:
    """Describe what a sample value shows about its parameter; {"type": "annotation"} asks for its class instead."""
    form = leaf_of(type(value))
    if form is not None:
        return {"type": form, **_describe_leaf(form, value)}
    if value is None:
        return ANY
    for cls, name in _SCALARS.items():
        if isinstance(value, cls) and not isinstance(value, enum.Enum):
            return {"type": name}
    if isinstance(value, (int, float)) or type(value).__module__ == "numpy":
        return {"type": "boolean"} if type(value).__name__ in {"bool", "bool_"} else {"type": "number"}
    if isinstance(value, (list, tuple)) and type(value) in {list, tuple}:
        return _describe_sequence(value)
    if isinstance(value, (set, frozenset)):
        return {"type": "set"}
    if isinstance(value, dict):
        return {"type": "object"}
    return {"type": "annotation"}


def _describe_leaf(form: str, value: Any) -> dict[str, Any]:
    if form in {"ndarray", "tensor"}:
        return {"dtype": str(value.dtype).removeprefix("torch."), "rank": len(value.shape)}
    if form == "frame":
        return {"columns": {str(name): str(dtype) for name, dtype in zip(value.columns, value.dtypes, strict=True)}}
    if form == "series":
        return {"dtype": str(value.dtype)}
    return {"mode": value.mode}


def _describe_sequence(value: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """Lengths are free, the rank is fixed: items that agree are described once, others are any JSON."""
    name = "list" if isinstance(value, list) else "tuple"
    forms = [describe(item) for item in value[:64]]
    same = bool(forms) and all(form == forms[0] for form in forms) and forms[0]["type"] in _NESTABLE
    return {"type": name, "items": forms[0] if same else ANY}


_NESTABLE = {"boolean", "string", "number", "list", "tuple", "object"}


def schema_of(form: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a described value: ndarray as nested lists, bytes base64, frames records."""
    kind = form["type"]
    if kind in {"boolean", "string", "number", "object"}:
        return {"type": kind}
    if kind == "bytes":
        return {"type": "string", "contentEncoding": "base64"}
    if kind == "image":
        return {"type": "string", "contentEncoding": "base64", "title": "image", "description": "base64 or a data: URL"}
    if kind in {"ndarray", "tensor"}:
        return _nested(form.get("rank"), f"{kind} {form.get('dtype', '')}".strip())
    if kind == "frame":
        return {"type": "array", "items": {"type": "object"}, "title": "frame", "description": "a list of records"}
    if kind in {"list", "tuple", "set", "series"}:
        items = schema_of(form.get("items", ANY))
        return {"type": "array", "items": items} if items else {"type": "array"}
    return {}


def example_of(schema: dict[str, Any]) -> Any:
    """Return the plainest value that a JSON Schema allows, for examples in messages, without optional properties."""
    for known in ("default", "const"):
        if known in schema:
            return schema[known]
    for choices in ("enum", "examples", "anyOf", "oneOf"):
        if schema.get(choices):
            first = schema[choices][0]
            return example_of(first) if choices.endswith("Of") else first
    kind = schema.get("type")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example_of(properties.get(name, {})) for name in schema.get("required", [])}
    if kind == "array":
        items = schema.get("items")
        return [example_of(items)] if isinstance(items, dict) else []
    plain: dict[Any, Any] = {"string": "", "boolean": False, "number": 0, "integer": 0}
    return plain.get(kind)


def _nested(rank: int | None, title: str) -> dict[str, Any]:
    schema: dict[str, Any] = {} if rank is None else {"type": "boolean"} if "bool" in title else {"type": "number"}
    for _ in range(rank or 0):
        schema = {"type": "array", "items": schema}
    return {**schema, "title": title}


def dtype_of(hint: Any) -> dict[str, Any]:
    """Read the dtype of `NDArray[np.float32]`, which is `ndarray[Any, dtype[float32]]`."""
    for argument in typing.get_args(hint)[1:]:
        for dtype in typing.get_args(argument):
            if isinstance(dtype, type) and dtype.__module__ == "numpy" and dtype.__name__ != "generic":
                return {"dtype": dtype.__name__}
    return {}
