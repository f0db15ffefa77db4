"""Annotations: which ones requests can be decoded to, and their JSON Schema."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from typing import Any

import msgspec

from nbdeploy_server.forms import leaf_of, schema_of


@functools.lru_cache(maxsize=256)
def _is_native(hint: Any) -> bool:
    try:
        info = msgspec.inspect.type_info(hint)
        msgspec.json.Decoder(hint, dec_hook=_known)
    except (TypeError, NotImplementedError, NameError, RecursionError):
        return False
    seen: set[int] = set()

    def known(node: Any) -> bool:
        if id(node) in seen:
            return True
        seen.add(id(node))
        if isinstance(node, msgspec.inspect.CustomType):
            return node.cls is object or leaf_of(node.cls) is not None or is_model(node.cls)
        if isinstance(node, (tuple, list)):
            return all(known(item) for item in node)
        if isinstance(node, msgspec.Struct):
            return all(known(getattr(node, name)) for name in node.__struct_fields__)
        return True

    return known(info)


def is_native(hint: Any) -> bool:
    """Whether msgspec, with our forms of arrays and models, can decode an annotation."""
    try:
        return _is_native(hint)
    except TypeError:  # unhashable annotations, as Literal[[...]] makes
        return False


def _known(cls: Any, value: Any) -> Any:
    """Stand in for the decoder's hook where only the type is asked about."""
    return cls(value)


def is_model(cls: Any) -> bool:
    """Whether a class is a pydantic model."""
    return hasattr(cls, "model_validate") and hasattr(cls, "model_json_schema")


def adapter_for(hint: Any) -> Any:
    """Return a pydantic TypeAdapter for an annotation, or None where pydantic cannot decode it from JSON either."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic_core import PydanticOmit, SchemaError

    try:
        adapter: Any = TypeAdapter(hint)
        adapter.json_schema()
    except (PydanticUserError, SchemaError, PydanticOmit, TypeError, NameError, AttributeError):
        return None
    return adapter


def annotations_of(function: Any) -> dict[str, Any]:
    """Evaluate annotations one by one, so that one that cannot be evaluated does not hide the others."""
    target = function
    while isinstance(target, functools.partial):
        target = target.func
    if not inspect.isroutine(target) and not inspect.isclass(target):
        target = type(target).__call__  # a callable object's own annotations are those of its attributes
    target = inspect.unwrap(target)
    target = getattr(target, "__func__", target)
    found: dict[str, Any] = {}
    namespace = getattr(target, "__globals__", {})
    for name, value in getattr(target, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: value})
        try:
            (hint,) = typing.get_type_hints(one, globalns=namespace, include_extras=True).values()
            found[name] = hint
        except Exception:  # noqa: BLE001, S112 - an annotation is a hint: one that fails to evaluate counts as none
            continue
    return found


def concrete(hint: Any) -> Any:
    """Replace what says nothing of JSON (object) or would be checked only while it is read (Iterable) by what does."""
    if hint is object:
        return Any
    if typing.get_origin(hint) in {collections.abc.Iterable, collections.abc.Iterator}:
        return list[typing.get_args(hint)]  # type: ignore[misc] # run-time
    return hint


def annotation_schema(hint: Any) -> dict[str, Any] | None:
    """Return the JSON Schema of an annotation that requests can be decoded to, else None."""
    if hint is Any or hint is inspect.Parameter.empty:
        return {}
    if is_native(hint):
        return _native_schema(hint)
    adapter = adapter_for(hint)
    if adapter is None:
        return None
    from pydantic.errors import PydanticUserError

    try:
        schema: dict[str, Any] = adapter.json_schema()
    except PydanticUserError:
        return {}
    return _inlined(schema, schema.get("$defs", {}))


def _native_schema(hint: Any) -> dict[str, Any]:
    def hook(cls: type) -> dict[str, Any]:
        form = leaf_of(cls)
        if form is not None:
            return schema_of({"type": form})
        adapter = adapter_for(cls)
        return dict(adapter.json_schema()) if adapter is not None else {}

    (schema,), components = msgspec.json.schema_components([hint], schema_hook=hook)
    return _inlined(schema, components)


def _inlined(schema: dict[str, Any], definitions: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Replace references by what they name (a type that contains itself ends as any JSON after some levels)."""

    def walk(node: Any, level: int) -> Any:
        if isinstance(node, list):
            return [walk(item, level) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = definitions.get(node["$ref"].rsplit("/", 1)[-1])
            return {} if target is None or level > 4 else walk(target, level + 1)  # noqa: PLR2004 - depth shown
        return {key: walk(value, level) for key, value in node.items() if key not in {"$defs", "discriminator"}}

    return dict(walk(schema, depth))
