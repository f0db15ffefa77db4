"""What is learnt of a function: names, types and defaults of its inputs."""

# ruff: noqa: D103 - the functions are the data of the tests

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import threading
import typing
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from nbdeploy_server.decode import Decoder
from nbdeploy_server.forms import example_of
from nbdeploy_server.predictor import bind
from nbdeploy_server.signature import Signature, infer
from numpy.typing import NDArray
from pydantic import BaseModel

LIVE = threading.Lock()


class Colour(enum.Enum):
    RED = "red"


class Item(BaseModel):
    n: int


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Scaler:
    """A callable object whose attributes have annotations of their own."""

    x: str
    factor: float = 2.0

    def __call__(self, x: float, *, shift: int = 0) -> float:
        return x * self.factor + shift

    def method(self, x: int, self_: str = "") -> Any: ...


@dataclasses.dataclass
class Model:
    x: str = "an attribute, not the parameter"
    func: str = "an attribute that partial objects have too"

    def __call__(self, x: list[int]) -> Any: ...


def names(signature: Signature) -> dict[str, tuple[bool, Any]]:
    """Return name: (required, JSON type)."""
    return {p.name: (p.required, p.schema.get("type")) for p in signature.parameters}


def plain(x: int, y: str = "a", z=None) -> None: ...  # noqa: ANN001 - one without annotation
@functools.wraps(plain)
def wrapped(*arguments: Any, **named: Any) -> Any:
    return plain(*arguments, **named)


def keyword_only(*, name: str, self: int, key: bool, __x: float) -> None: ...
def positional_only(x: int, y: int = 2, /, z: int = 3) -> None: ...
def with_extra(x: int, *rest: int, **others: Any) -> None: ...
def live_default(x: int, lock: Any = LIVE, model: Any = dataclasses.field) -> None: ...
def json_defaults(a=1, b=(1, 2), c={"k": [None]}, d=Colour.RED, e=2.5, f=True) -> None: ...  # noqa: ANN001, B006, FBT002 - as notebooks write


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (plain, {"x": (True, "integer"), "y": (False, "string"), "z": (False, None)}),
        (
            keyword_only,
            {"name": (True, "string"), "self": (True, "integer"), "key": (True, "boolean"), "__x": (True, "number")},
        ),
        (positional_only, {"x": (True, "integer"), "y": (False, "integer"), "z": (False, "integer")}),
        (with_extra, {"x": (True, "integer")}),
        (live_default, {"x": (True, "integer")}),
        (Scaler(), {"x": (True, "number"), "shift": (False, "integer")}),
        (Scaler().method, {"x": (True, "integer"), "self_": (False, "string")}),
        (Model(), {"x": (True, "array")}),
        (functools.partial(plain, 1), {"y": (False, "string"), "z": (False, None)}),
        (functools.partial(plain, y="b"), {"x": (True, "integer"), "y": (False, "string"), "z": (False, None)}),
        (functools.partial(functools.partial(Scaler(), shift=1)), {"x": (True, "number"), "shift": (False, "integer")}),
        (wrapped, {"x": (True, "integer"), "y": (False, "string"), "z": (False, None)}),
        (lambda x: x, {"x": (True, None)}),
    ],
)
def test_kinds_of_callables(function: Any, expected: dict[str, Any]) -> None:
    """Functions, objects, methods, partials and wrapped functions show the inputs they take."""
    signature, _types = infer(function)
    assert names(signature) == expected
    assert signature.extra == (function is with_extra)


def test_defaults_stand_in_the_schema() -> None:
    """Defaults that JSON can write are shown and are optional."""
    signature, _types = infer(json_defaults)
    assert not any(p.required for p in signature.parameters)
    shown = {p.name: p.schema["default"] for p in signature.parameters}
    assert shown == {"a": 1, "b": [1, 2], "c": {"k": [None]}, "d": "red", "e": 2.5, "f": True}
    json.dumps(signature.schema())


def test_the_model_s_parameter_is_no_input() -> None:
    """Wherever it stands."""

    def predict(text: str, net: Any) -> None: ...

    signature, _types = infer(predict, model_parameter="net")
    assert names(signature) == {"text": (True, "string")}


def unknown(a: Missing, b: int, c: list[Missing], d: "42 +", e: typing.Callable[[int], int]) -> None: ...  # noqa: F821, F722 - on purpose


def test_annotations_that_cannot_be_used() -> None:
    """One that cannot be evaluated or decoded counts as none, and hides none of the others."""
    signature, types = infer(unknown, sample={"a": 1.5, "c": ["x"], "d": True, "e": 1})
    assert {p.name: p.form["type"] for p in signature.parameters} == {
        "a": "number",
        "b": "annotation",
        "c": "list",
        "d": "boolean",
        "e": "number",
    }
    assert types == {"b": int}


class Odd:
    pass


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bytes, {"type": "string", "contentEncoding": "base64"}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (typing.Literal["a", "b"], {"enum": ["a", "b"]}),
        (Colour, {"title": "Colour", "enum": ["red"]}),
        (list[float], {"type": "array", "items": {"type": "number"}}),
        (typing.Iterable[int], {"type": "array", "items": {"type": "integer"}}),
        (np.float32, {"type": "number"}),
        (np.bool_, {"type": "boolean"}),
        (NDArray[np.float32], {"title": "ndarray float32"}),
        (np.ndarray, {"title": "ndarray"}),
        (Any, {}),
        (object, {}),
        (Odd, {}),
    ],
)
def test_schemas_by_annotation(annotation: Any, schema: dict[str, Any]) -> None:
    """Each annotation has its JSON Schema."""

    def predict(x: Any) -> None: ...

    predict.__annotations__["x"] = annotation
    signature, _types = infer(predict)
    assert signature.parameters[0].schema == schema


def test_schemas_of_classes_are_whole() -> None:
    """Dataclasses and pydantic models stand in the schema with their fields, without references."""

    def predict(point: Point, items: list[Item], when: datetime) -> None: ...

    signature, types = infer(predict, hints={"point": Point, "items": list[Item], "when": datetime})
    text = json.dumps(signature.schema())
    assert "$ref" not in text
    point = signature.parameters[0].schema
    assert point["properties"]["x"] == {"type": "number"}
    assert point["required"] == ["x"]
    assert signature.parameters[1].schema["items"]["properties"]["n"]["type"] == "integer"
    assert types == {"point": Point, "items": list[Item], "when": datetime}


class Tree(BaseModel):
    children: list[Tree] = []


def test_a_type_that_contains_itself_has_a_schema() -> None:
    """It ends after some levels, as any JSON."""
    Tree.model_rebuild(_types_namespace={"Tree": Tree})
    signature, _types = infer(lambda x: x, hints={"x": Tree})
    assert "$ref" not in json.dumps(signature.schema())


@pytest.mark.parametrize(
    ("sample", "form"),
    [
        (3, {"type": "number"}),
        (True, {"type": "boolean"}),
        (np.bool_(1), {"type": "boolean"}),
        (np.float32(1), {"type": "number"}),
        (np.str_("a"), {"type": "string"}),
        ("", {"type": "string"}),
        (b"", {"type": "bytes"}),
        (None, {"type": "any"}),
        ([1, 2.5], {"type": "list", "items": {"type": "number"}}),
        ([1, "a"], {"type": "list", "items": {"type": "any"}}),
        ([], {"type": "list", "items": {"type": "any"}}),
        ([[1], [2, 3]], {"type": "list", "items": {"type": "list", "items": {"type": "number"}}}),
        ((1, 2), {"type": "tuple", "items": {"type": "number"}}),
        ({1}, {"type": "set"}),
        ({"a": 1}, {"type": "object"}),
        (np.zeros((2, 3), np.float32), {"type": "ndarray", "dtype": "float32", "rank": 2}),
        (Colour.RED, {"type": "annotation"}),
        (Point(1), {"type": "annotation"}),
        (Item(n=1), {"type": "annotation"}),
    ],
)
def test_types_by_sample(sample: Any, form: dict[str, Any]) -> None:
    """Without annotation the sample tells: numbers of any kind, free lengths, a fixed rank, the class of an object."""
    signature, types = infer(lambda x: x, sample={"x": sample})
    assert signature.parameters[0].form == form
    assert types == ({"x": type(sample)} if form == {"type": "annotation"} else {})


def test_it_travels_as_plain_data() -> None:
    """What stands in the manifest reads back equal."""
    signature, _types = infer(positional_only, sample={"x": 1}, streams=True)
    data = json.loads(json.dumps(signature.to_json()))
    assert Signature.from_json(data) == signature


def test_it_reads_well() -> None:
    """Its text names what the function takes."""
    assert str(infer(with_extra)[0]) == "(x: integer, …)"
    assert str(infer(lambda x: x, hints={"x": Point})[0]) == "(x: Point)"


@pytest.mark.parametrize(
    "function", [plain, keyword_only, positional_only, json_defaults, live_default, Scaler(), Model()]
)
def test_examples_fit_their_own_schema(function: Any) -> None:
    """The example that messages show is a body that the Decoder takes."""
    signature, types = infer(function)
    example = example_of(signature.schema())
    assert set(Decoder(signature, types).json(json.dumps(example).encode())) == set(example)


def test_positions_without_gaps() -> None:
    """A positional-only parameter that is left out before one that is given has its default."""

    def predict(model: str, a: int, b: int = 2, c: int = 3, /, *, d: int = 4) -> Any:
        return model, a, b, c, d

    how = {"how": "argument", "model": "model"}
    call = bind(predict, how, "m", has_model=True)
    assert call(a=1, c=30, d=40) == ("m", 1, 2, 30, 40)
    assert call(a=1) == ("m", 1, 2, 3, 4)
