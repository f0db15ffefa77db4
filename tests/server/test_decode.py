"""Bodies to arguments: what fits is restored, what does not is named, and no value is ever shown."""

from __future__ import annotations

import base64
import dataclasses
import decimal
import enum
import io
import json
import typing
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbdeploy_server import wire
from nbdeploy_server.decode import Decoder
from nbdeploy_server.errors import RequestError
from nbdeploy_server.signature import Parameter, Signature, infer
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, field_validator

SECRET = "s3cret-4711"  # stands in every bad body; no message may show it


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)


class Row(typing.TypedDict):
    a: int
    b: typing.NotRequired[str]


class Pair(typing.NamedTuple):
    a: int
    b: str


class Item(BaseModel):
    n: int = Field(ge=0)
    when: datetime | None = None

    @field_validator("n")
    @classmethod
    def check(cls, n: int) -> int:
        if n == 13:
            raise ValueError("13 is not served")
        return n


def by_annotation(annotation: Any, **default: Any) -> Decoder:
    """Return the Decoder of `predict(x: annotation)`."""
    if default:

        def predict(x: Any = default["default"]) -> None: ...
    else:

        def predict(x: Any) -> None: ...

    signature, types = infer(predict, hints={"x": annotation})
    return Decoder(signature, types)


def by_sample(**sample: Any) -> Decoder:
    """Return the Decoder of a function without annotations that was called so."""
    names = ", ".join(sample)
    namespace: dict[str, Any] = {}
    exec(f"def predict({names}): ...", namespace)  # noqa: S102 - parameters by the sample's names
    signature, types = infer(namespace["predict"], sample=sample)
    return Decoder(signature, types)


def same(left: Any, right: Any) -> bool:
    """Whether two values are of one type and equal."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, pd.DataFrame | pd.Series):
        return bool(left.equals(right))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


BAD: Any = [SECRET]
GOOD = [
    (int, "3", 3, SECRET),
    (float, "3", 3.0, SECRET),
    (str, '"a"', "a", BAD),
    (bool, "true", True, SECRET),
    (bytes, '"aGk="', b"hi", f"!{SECRET}"),
    (list, "[1, 2]", [1, 2], SECRET),
    (dict, '{"a": 1}', {"a": 1}, SECRET),
    (list[float], "[1, 2.5]", [1.0, 2.5], BAD),
    (dict[str, float], '{"a": 1}', {"a": 1.0}, {"a": SECRET}),
    (tuple[int, str], '[1, "a"]', (1, "a"), [SECRET, SECRET]),
    (set[int], "[1, 1]", {1}, BAD),
    (typing.Sequence[int], "[1]", [1], BAD),
    (typing.Iterable[int], "[1]", [1], BAD),
    (typing.Literal["a", "b"], '"a"', "a", SECRET),
    (typing.Literal[1, 2], "2", 2, 4711),
    (Colour, '"red"', Colour.RED, SECRET),
    (Level, "1", Level.LOW, 4711),
    (int | None, "null", None, SECRET),
    (int | str, '"a"', "a", BAD),
    (typing.Annotated[int, "doc"], "1", 1, SECRET),
    (Point, '{"x": 1}', Point(1), {"x": SECRET}),
    (list[Point], '[{"x": 1, "tags": ["a"]}]', [Point(1, ["a"])], [{"x": SECRET}]),
    (Row, '{"a": 1}', {"a": 1}, {"a": SECRET}),
    (Pair, '[1, "a"]', Pair(1, "a"), [SECRET, 1]),
    (Item, '{"n": 1}', Item(n=1), {"n": SECRET}),
    (list[Item], '[{"n": 1}]', [Item(n=1)], [{"n": SECRET}]),
    (dict[str, Item], '{"k": {"n": 1}}', {"k": Item(n=1)}, {"k": {"n": SECRET}}),
    (Item | None, '{"n": 1}', Item(n=1), {"n": -4711}),
    (datetime, '"2024-02-29T12:00:00Z"', datetime(2024, 2, 29, 12, tzinfo=UTC), SECRET),
    (date, '"2024-02-29"', date(2024, 2, 29), SECRET),
    (timedelta, '"PT1S"', timedelta(seconds=1), SECRET),
    (uuid.UUID, f'"{uuid.UUID(int=5)}"', uuid.UUID(int=5), SECRET),
    (decimal.Decimal, '"1.5"', decimal.Decimal("1.5"), SECRET),
    (np.ndarray, "[[1, 2]]", np.array([[1, 2]]), [[1], [SECRET, 2]]),
    (NDArray[np.float32], "[1, null]", np.array([1, np.nan], np.float32), BAD),
    (NDArray[np.uint8], "[1, 255]", np.array([1, 255], np.uint8), [1, 4711]),
    (np.ndarray | None, "null", None, None),
    (list[np.ndarray], "[[1]]", [np.array([1])], None),
    (np.float32, "1.5", 1.5, SECRET),
    (pd.DataFrame, '[{"a": 1}, {"a": 2}]', pd.DataFrame({"a": [1, 2]}), SECRET),
    (pd.Series, "[1, 2]", pd.Series([1, 2]), SECRET),
    (typing.Any, "null", None, None),
    (object, "[1]", [1], None),
    (typing.Callable, "1", 1, None),
]


@pytest.mark.parametrize(("annotation", "body", "value", "bad"), GOOD, ids=[str(row[0])[-30:] for row in GOOD])
def test_by_annotation(annotation: Any, body: str, value: Any, bad: Any) -> None:
    """JSON becomes what the annotation names; what does not fit is refused by name and not shown."""
    for decoder in (by_annotation(annotation), by_annotation(annotation, default=None)):
        assert same(decoder.json(f'{{"x": {body}}}'.encode())["x"], value)
        if bad is not None:
            with pytest.raises(RequestError) as caught:
                decoder.json(json.dumps({"x": bad}).encode())
            error = caught.value
            assert error.status == 422
            assert [row["parameter"] for row in error.errors] == ["x"]
            assert "4711" not in str(error) + repr(error.errors)
    assert by_annotation(annotation, default=None).json(b"{}") == {}


SAMPLES = [
    (3, "4.5", 4.5, SECRET),
    (1.5, "4", 4, "4"),
    ("a", '""', "", 1),
    (True, "false", False, 1),
    (b"x", '"aGk="', b"hi", "!"),
    ([1, 2], "[1, 2.5, 3]", [1, 2.5, 3], BAD),
    ([[1], [2]], "[]", [], [1]),
    ((1, 2), "[3]", (3,), BAD),
    ({"a": 1}, '{"b": "c"}', {"b": "c"}, BAD),
    ([1, "a"], "[null]", [None], SECRET),
    (None, '{"a": [1]}', {"a": [1]}, None),
    (np.zeros(3, np.float32), "[1, 2]", np.array([1, 2], np.float32), [[1]]),
    (np.zeros((2, 2), np.int16), "[[1, 2, 3]]", np.array([[1, 2, 3]], np.int16), [[1.5]]),
    (np.zeros((2, 2), np.int16), "[[1.0]]", np.array([[1]], np.int16), [[40_000_000]]),
    (np.array(["ab"]), '["longer text"]', np.array(["longer text"]), [1]),
    (np.array([True]), "[false]", np.array([False]), [2]),
    (np.array(["2024-01-01"], "datetime64[D]"), '["2024-02-01"]', np.array(["2024-02-01"], "datetime64[D]"), BAD),
    (pd.DataFrame({"a": [1.5]}), '[{"a": 1}]', pd.DataFrame({"a": [1.0]}), [{"b": SECRET}]),
    (pd.DataFrame({"a": [1.5]}), '{"a": 1}', pd.DataFrame({"a": [1.0]}), [{"a": SECRET}]),
    (pd.Series([1.5]), "[1]", pd.Series([1.0]), BAD),
    (Colour.RED, '"blue"', Colour.BLUE, SECRET),
    (Point(1), '{"x": 2}', Point(2), {"x": SECRET}),
    (Item(n=1), '{"n": 2}', Item(n=2), {"n": SECRET}),
    (datetime(2024, 1, 1, tzinfo=UTC), '"2024-02-01T00:00:00Z"', datetime(2024, 2, 1, tzinfo=UTC), SECRET),
]


@pytest.mark.parametrize(("sample", "body", "value", "bad"), SAMPLES, ids=[repr(row[0])[:30] for row in SAMPLES])
def test_by_sample(sample: Any, body: str, value: Any, bad: Any) -> None:
    """Without annotation the sample decides: lengths are free, the rank is fixed, nothing is cut or wrapped around."""
    decoder = by_sample(x=sample)
    assert same(decoder.json(f'{{"x": {body}}}'.encode())["x"], value)
    assert same(decoder.packed(wire.pack({"x": sample}))["x"], sample) or isinstance(sample, Point | Item | Colour)
    if bad is not None:
        with pytest.raises(RequestError) as caught:
            decoder.json(json.dumps({"x": bad}).encode())
        assert caught.value.status == 422
        assert "4711" not in str(caught.value) + repr(caught.value.errors)


@pytest.mark.torch
def test_tensors() -> None:
    """Nested lists become tensors of the sample's dtype; ragged ones and other ranks are refused."""
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        decoder = by_sample(x=torch.zeros(2, 2, dtype=dtype))
        value = decoder.json(b'{"x": [[1, 0, 1]]}')["x"]
        assert value.dtype == dtype
        assert value.tolist() == [[1, 0, 1]]
        packed = decoder.packed(wire.pack({"x": torch.ones(1, 3, dtype=dtype)}))["x"]
        assert packed.dtype == dtype
        assert tuple(packed.shape) == (1, 3)
        for bad in ("[1]", "[[1], [1, 2]]", f'[["{SECRET}"]]', "5"):
            with pytest.raises(RequestError, match="x must"):
                decoder.json(f'{{"x": {bad}}}'.encode())
    value = by_annotation(torch.Tensor).json(b'{"x": [1.5]}')["x"]
    assert value.dtype == torch.get_default_dtype()


def test_images() -> None:
    """Base64 and data: URLs become images of the sample's mode; addresses are never fetched, rubbish is refused."""
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    file = io.BytesIO()
    picture.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    for decoder in (by_sample(x=picture), by_annotation(Image.Image)):
        for form in (text, f"data:image/png;base64,{text}"):
            image = decoder.json(json.dumps({"x": form}).encode())["x"]
            assert (image.size, image.mode, image.getpixel((0, 0))) == ((3, 2), "RGB", (1, 2, 3))
        assert decoder.packed(wire.pack({"x": picture}))["x"].tobytes() == picture.tobytes()
        assert decoder.packed(wire.pack({"x": file.getvalue()}))["x"].size == (3, 2)
        for bad in (SECRET, "http://127.0.0.1:1/x.png", "", text[:40], 5, base64.b64encode(SECRET.encode()).decode()):
            with pytest.raises(RequestError) as caught:
                decoder.json(json.dumps({"x": bad}).encode())
            assert "4711" not in str(caught.value)
    grey = by_sample(x=picture.convert("L"))
    assert grey.json(json.dumps({"x": text}).encode())["x"].mode == "L"


def test_image_of_too_many_pixels() -> None:
    """A small file that unfolds to a huge image is refused before it does."""
    file = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(file, "PNG")
    with pytest.raises(RequestError, match="too many pixels"):
        by_annotation(Image.Image).packed(wire.pack({"x": file.getvalue()}))


@pytest.mark.parametrize("names", [("name", "self", "key", "body"), ("__x", "_", "def_"), ("__struct_fields__", "f0")])
def test_parameters_of_any_name(names: tuple[str, ...]) -> None:
    """No name of ours stands in the way of a parameter's."""
    decoder = by_sample(**dict.fromkeys(names, 1))
    assert decoder.json(json.dumps(dict.fromkeys(names, 2)).encode()) == dict.fromkeys(names, 2)


def test_every_fault_is_named() -> None:
    """Missing, mistyped and unknown ones, all at once, for plain and for restored types."""
    decoder = by_sample(a=1, b="x", c=np.zeros(2), d=True)
    with pytest.raises(RequestError) as caught:
        decoder.json(json.dumps({"b": 4711, "c": [[SECRET]], "e": SECRET, "f" * 500: 1}).encode())
    rows = caught.value.errors
    assert [row["parameter"] for row in rows][:5] == ["a", "b", "c", "d", "e"]
    assert len(rows[5]["parameter"]) == 80
    assert "4711" not in str(caught.value) + repr(rows)
    assert str(caught.value).endswith("(and 5 more).")


def test_words_of_the_user_s_own_check() -> None:
    """A validator's message reaches the caller."""
    with pytest.raises(RequestError, match="13 is not served"):
        by_annotation(Item).json(b'{"x": {"n": 13}}')


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"x": NaN}', 400),
        (b'{"x": Infinity}', 400),
        (b'{"x": 1e999}', 400),
        (b'{"x": "\xff"}', 400),
        (b'{"\xff": 1}', 400),
        (b'{"x": "\\ud800"}', 400),
        (b'{"x": 1}{"x": 1}', 400),
        (b'{"x":' + b"[" * 100_000, 400),
        (b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b"null", 422),
        (b"[1]", 422),
        (b'"x"', 422),
        (b"1", 422),
    ],
)
@pytest.mark.parametrize("annotation", [Any, float, list[float], Item])
def test_broken_bodies(body: bytes, status: int, annotation: Any) -> None:
    """No JSON is 400, JSON that is no object is 422; nothing else ever comes out."""
    with pytest.raises(RequestError) as caught:
        by_annotation(annotation).json(body)
    assert caught.value.status == status


def test_numbers_at_the_edges() -> None:
    """Integers of any size are kept, the last of several equal keys counts."""
    huge = 10**40
    assert by_annotation(Any).json(f'{{"x": {huge}}}'.encode()) == {"x": huge}
    assert by_sample(x=1).json(b'{"x": -9223372036854775808}') == {"x": -(2**63)}
    assert by_sample(x=1).json(b'{"x": 1, "x": 2}') == {"x": 2}


def test_extra_names() -> None:
    """`**kwargs` takes names of its own, but not the model's, nor those of live defaults."""

    def predict(x: int, **more: Any) -> None: ...

    signature, types = infer(predict)
    decoder = Decoder(signature, types, reserved={"x", "model", "lock"})
    assert decoder.json(b'{"x": 1, "y": [2]}') == {"x": 1, "y": [2]}
    with pytest.raises(RequestError, match="model is not known"):
        decoder.json(b'{"x": 1, "model": 2}')
    with pytest.raises(RequestError, match="lock is not known"):
        decoder.packed(wire.pack({"x": 1, "lock": 2}))


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (list[float], np.arange(3.0), [0.0, 1.0, 2.0]),
        (list[list[int]], np.eye(2, dtype=int), [[1, 0], [0, 1]]),
        (float, np.float32(1.5), 1.5),
        (int, np.int64(3), 3),
        (list[float], pd.Series([1.0]), [1.0]),
        (list[bytes], [b"a"], [b"a"]),
        (bytes, b"a", b"a"),
        (datetime, datetime(2024, 1, 1), datetime(2024, 1, 1)),  # noqa: DTZ001 - naive ones travel too
        (set[int], {1}, {1}),
        (tuple[int, str], (1, "a"), (1, "a")),
        (Point, {"x": 1}, Point(1)),
        (Item, {"n": 1}, Item(n=1)),
    ],
)
def test_packed_values_for_plain_annotations(annotation: Any, value: Any, expected: Any) -> None:
    """What `connect` sends from a notebook fits annotations in Python's own terms."""
    assert same(by_annotation(annotation).packed(wire.pack({"x": value}))["x"], expected)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
@settings(max_examples=100)
def test_any_json_arrives_as_it_is(value: Any) -> None:
    """Without annotation and sample every JSON value passes unchanged, packed or not."""
    decoder = by_annotation(Any)
    assert decoder.json(json.dumps({"x": value}).encode()) == {"x": value}
    assert decoder.packed(wire.pack({"x": value})) == {"x": value}


@given(st.dictionaries(st.text(), json_values, max_size=3), st.sampled_from([row[0] for row in GOOD]))
@settings(max_examples=150, deadline=None)
def test_any_body_is_decoded_or_refused(body: dict[str, Any], annotation: Any) -> None:
    """Whatever JSON comes, arguments or a RequestError come out; both ways agree."""
    decoder = by_annotation(annotation)
    outcomes = []
    for ask, data in ((decoder.json, json.dumps(body).encode()), (decoder.packed, wire.pack(body))):
        try:
            ask(data)
            outcomes.append(200)
        except RequestError as error:
            outcomes.append(error.status)
    assert outcomes[0] in {200, 422}
    assert outcomes[1] in {200, 422}


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    """Bytes of no type at all are 400 or 422, never an error of ours."""
    decoder = by_annotation(list[Point])
    for ask in (decoder.json, decoder.packed):
        with pytest.raises(RequestError):
            ask(body)


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        (int, "a", "x must be a whole number, not a text."),
        (float, "a", "x must be a number, not a text."),
        (list[float], 3, "x must be a list, not a number."),
        (list[float], [1, "b"], "x must be a number, not a text (at [1])."),
        (str | None, 3, "x must be a text or null, not a number."),
        (dict[str, int], [], "x must be an object, not a list."),
        (bool, 1, "x must be true or false, not a number."),
    ],
    ids=str,
)
def test_types_are_told_in_plain_words(annotation: Any, value: Any, words: str) -> None:
    """A caller reads "a list" and "a text", not the names that a decoder has for them."""
    parameter = Parameter("x", True, {}, {"type": "annotation"})
    decoder = Decoder(Signature((parameter,)), {"x": annotation})
    with pytest.raises(RequestError) as refused:
        decoder.json(json.dumps({"x": value}).encode())
    assert refused.value.detail == words
