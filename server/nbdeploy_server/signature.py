"""Signature: names and types of what an Endpoint takes and gives, learnt from annotations and one sample.

A parameter's type comes from its annotation where that can be decoded from JSON, else from the sample, else it is any
JSON. The Signature itself is plain data that travels in the Bundle's manifest; the real Python types of annotated
parameters travel in the skeleton beside it (`infer` returns both).
"""

from __future__ import annotations

import collections.abc
import enum
import inspect
from dataclasses import dataclass, field
from typing import Any

from nbdeploy_server.annotations import annotation_schema, annotations_of, concrete
from nbdeploy_server.forms import ANY, describe, dtype_of, leaf_of, scalar_of, schema_of


@dataclass(frozen=True)
class Parameter:
    """One parameter of the Endpoint.

    Attributes:
        name: as in the function.
        required: False where the function has a default.
        schema: JSON Schema of its JSON form.
        form: how the value is restored: {"type": "annotation"} or what the sample showed, e.g.
            {"type": "ndarray", "dtype": "float32", "rank": 2}.
        positional_only: the function wants it by position.
    """

    name: str
    required: bool
    schema: dict[str, Any]
    form: dict[str, Any]
    positional_only: bool = False


@dataclass(frozen=True)
class Signature:
    """Names and types of an Endpoint's inputs and output; `extra` tells that unknown names are taken (`**kwargs`)."""

    parameters: tuple[Parameter, ...] = ()
    returns: dict[str, Any] = field(default_factory=dict)
    streams: bool = False
    extra: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the Signature as plain data, as it stands in the manifest."""
        return {
            "parameters": [
                {
                    "name": p.name,
                    "required": p.required,
                    "schema": p.schema,
                    "form": p.form,
                    "positional_only": p.positional_only,
                }
                for p in self.parameters
            ],
            "returns": self.returns,
            "streams": self.streams,
            "extra": self.extra,
        }

    @classmethod
    def from_json(cls, data: collections.abc.Mapping[str, Any]) -> Signature:
        """Read what `to_json` wrote."""
        return cls(
            parameters=tuple(Parameter(**row) for row in data["parameters"]),
            returns=data["returns"],
            streams=data["streams"],
            extra=data["extra"],
        )

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of a request body."""
        return {
            "type": "object",
            "properties": {p.name: p.schema for p in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
            "additionalProperties": self.extra,
        }

    def __str__(self) -> str:
        inner = [p.name + (f": {_words(p.schema)}" if p.schema else "") for p in self.parameters]
        return f"({', '.join([*inner, '…'] if self.extra else inner)})"


def _words(schema: dict[str, Any]) -> str:
    return str(schema.get("title") or schema.get("type") or "any")


def infer(
    function: collections.abc.Callable[..., Any],
    *,
    model_parameter: str | None = None,
    sample: dict[str, Any] | None = None,
    hints: dict[str, Any] | None = None,
    streams: bool = False,
) -> tuple[Signature, dict[str, Any]]:
    """Learn the Signature of a function.

    Args:
        function: what will be called; the model's parameter is left out of the Signature.
        model_parameter: name of the parameter that receives the model.
        sample: one request's arguments by name.
        hints: evaluated annotations by name; default: those of the function that can be evaluated.
        streams: whether it is a generator.

    Returns:
        The Signature, and the Python types of those parameters whose form is {"type": "annotation"}.
    """
    hints = annotations_of(function) if hints is None else hints
    parameters: list[Parameter] = []
    types: dict[str, Any] = {}
    extra = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = True
            continue
        required = parameter.default is parameter.empty
        travels_along = not required and not _is_json(parameter.default)  # a live object as default is no input
        if name == model_parameter or parameter.kind is parameter.VAR_POSITIONAL or travels_along:
            continue
        form, schema, annotation = _typed(hints.get(name), sample or {}, name, parameter.default)
        if annotation is not None:
            types[name] = annotation
        if not required and "default" not in schema:
            schema = {**schema, "default": _json_default(parameter.default)}
        parameters.append(Parameter(name, required, schema, form, parameter.kind is parameter.POSITIONAL_ONLY))
    return Signature(tuple(parameters), {}, streams, extra), types


def _typed(hint: Any, sample: dict[str, Any], name: str, default: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return form, JSON Schema and, for a form by annotation, the Python type of one parameter."""
    shown = describe(sample[name]) if name in sample else ANY
    if hint is not None:
        hint = concrete(hint)
        leaf = leaf_of(hint)
        if leaf is not None:
            form = {"type": leaf, **dtype_of(hint), **({} if shown["type"] != leaf else shown)}
            return form, schema_of(form), None
        scalar = scalar_of(hint)
        if scalar is not None:
            return scalar, schema_of(scalar), None
        schema = annotation_schema(hint)
        if schema is not None:
            return {"type": "annotation"}, schema, hint
    if name in sample and shown["type"] == "annotation":
        schema = annotation_schema(type(sample[name]))
        return (shown, schema, type(sample[name])) if schema is not None else (ANY, {}, None)
    if name not in sample and default is not inspect.Parameter.empty and default is not None:
        shown = describe(default)
    return shown, schema_of(shown), None


def _is_json(value: Any) -> bool:
    """Whether a default can be written into a schema; anything else is a live object."""
    if value is None or isinstance(value, (bool, int, float, str, enum.Enum)):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_json(item) for item in value)
    return isinstance(value, dict) and all(isinstance(key, str) and _is_json(item) for key, item in value.items())


def _json_default(value: Any) -> Any:
    from nbdeploy_server.wire import jsonable

    return jsonable(value)
