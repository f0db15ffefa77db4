"""What is packed comes back as itself, hostile bytes only raise WireError, and JSON follows the interface."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import io
import math
import sys
import uuid
import zoneinfo
from typing import Any

import hypothesis
import msgspec
import numpy as np
import orjson
import pydantic
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nbdeploy_server import parity, wire
from PIL import Image

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
STRUCT = np.dtype([("a", "<i4"), ("b", "<f8", (2,)), ("c", "<U3")])
PADDED = np.dtype({"names": ["x", "y"], "formats": ["i1", ">f8"], "offsets": [3, 8], "itemsize": 24})


def same(first: Any, second: Any) -> bool:
    """Equal in type and value all the way down; NaN equals NaN and -0.0 is not 0.0."""
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        return repr(first) == repr(second)
    if isinstance(first, dict):
        pairs = zip(first.items(), second.items(), strict=True) if len(first) == len(second) else ()
        return len(first) == len(second) and all(same(a, b) for a, b in pairs)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray) and first.dtype.kind == "O":
        return first.shape == second.shape and all(map(same, first.flat, second.flat))
    if isinstance(first, decimal.Decimal):
        return repr(first) == repr(second)
    if isinstance(first, (str, np.longdouble)):
        return bool(first == second)
    if isinstance(first, (np.ndarray, np.generic)):
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    return first == second or repr(first) == repr(second)


def round_trip(value: Any) -> Any:
    """The value after a journey."""
    return wire.unpack(wire.pack(value))


BUILTINS = [
    None,
    True,
    False,
    0,
    -1,
    2**64 - 1,
    -(2**63),
    2**64,
    -(2**63) - 1,
    2**127,
    -(2**127),
    10**500,
    1.5,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    1j,
    complex(math.inf, -0.0),
    "",
    "grün 🌱",
    "a\0b",
    "\ud800 lone",
    b"",
    b"\x00\xff",
    bytearray(b"ab"),
    [],
    [1, "a", None],
    (),
    (1, (2, [3])),
    set(),
    {1, 2},
    {(1, 2), "a", None},
    frozenset({b"x"}),
    {frozenset({1}), frozenset({2})},
    {},
    {"a": [1]},
    {1: 2, None: 3, 1.5: 4, b"x": 5},
    {(1, "a"): [(2,)], "b": {2**70: "long"}},
    {"\ud800": 2**70},
    range(5),
    range(10, -(2**70), -3),
    [range(3)] * 2,
]
MOMENTS = [
    dt.datetime(2024, 2, 29, 12, 30, 1, 123456),  # noqa: DTZ001 - a naive datetime has to come back naive
    dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-5, minutes=-30))),
    dt.datetime.min.replace(tzinfo=dt.UTC),
    dt.date(1, 1, 1),
    dt.time(23, 59, 59, 999999),
    dt.time(1, 2, tzinfo=BERLIN),
    dt.timedelta(days=-1, microseconds=1),
    dt.timedelta.max,
    dt.UTC,
    BERLIN,
    decimal.Decimal("1.10"),
    decimal.Decimal("NaN"),
    decimal.Decimal("-1E+400"),
    uuid.UUID(int=7),
]
ARRAYS = [
    *[np.arange(6).astype(kind).reshape(2, 3) for kind in ("?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16")],
    np.arange(3, dtype=np.longdouble),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    np.arange(24)[::2],
    np.arange(24).reshape(4, 6)[:, 1:3],
    np.broadcast_to(np.float32(2), (3, 2)),
    np.array(1.5),
    np.array("text"),
    np.empty((0, 3), np.float32),
    np.empty((2, 0, 4), "S3"),
    np.array(["a", "bcd"]),
    np.array([b"a", b"bc\0d"]),
    np.array(["2024-01-01", "NaT"], dtype="M8[D]"),
    np.array([1, 2], dtype="m8[25s]"),
    np.array([(1, (2, 3), "x")], dtype=STRUCT),
    np.zeros(2, PADDED),
    np.array([b"raw1", b"raw2"], dtype="V4"),
    np.array([1, "a", None, [2], np.float32(3)], dtype=object),
    np.empty((0, 2), dtype=object),
    np.array(None, dtype=object),
]
SCALARS = [
    np.float32(1.1),
    np.float64(1.1),
    np.float16(2),
    np.int8(-3),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.complex64(1j),
    np.longdouble(1.5),
    np.str_("a\0"),
    np.bytes_(b"a\0"),
    np.datetime64("2024-01-01T00:00", "ns"),
    np.datetime64("NaT"),
    np.timedelta64(3, "D"),
    np.zeros(1, STRUCT)[0],
]


@pytest.mark.parametrize("value", [*BUILTINS, *MOMENTS, *ARRAYS, *SCALARS], ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_itself(value: Any) -> None:
    """Type and value survive, alone and inside each kind of container."""
    assert same(value, round_trip(value))
    assert same([value, (value, {"k": value})], round_trip([value, (value, {"k": value})]))
    assert same({(1,): value}, round_trip({(1,): value}))


@pytest.mark.parametrize("array", [np.arange(6.0), np.asfortranarray(np.ones((2, 3))), np.array([])])
def test_an_array_that_came_back_is_writable_and_keeps_its_order(array: np.ndarray[Any, Any]) -> None:
    """Users change what they are given, and code for Fortran order keeps its speed."""
    back = round_trip(array)
    assert back.flags.writeable
    assert back.flags.f_contiguous == array.flags.f_contiguous
    back += 1


class Colour(enum.Enum):
    RED = ("r", 1)


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Box:
    label: str
    corner: Any


class Answer(pydantic.BaseModel):
    text: str
    when: dt.date


class Record(msgspec.Struct):
    x: int


class Text(str):
    __slots__ = ()


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024 - the untyped form is what notebooks use


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, ("r", 1)),
        (Level.HIGH, 3),
        (Box("a", (1, 2)), {"label": "a", "corner": (1, 2)}),
        (Answer(text="t", when=dt.date(2024, 1, 2)), {"text": "t", "when": dt.date(2024, 1, 2)}),
        (Record(1), {"x": 1}),
        (Point(1, 2), (1, 2)),
        (Text("a"), "a"),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.UserDict({"a": 1}), {"a": 1}),
        (collections.deque([1, 2]), [1, 2]),
        ({"a": 1}.values(), [1]),
        (memoryview(b"ab"), b"ab"),
        (np.arange(2).view(np.recarray), np.arange(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_of_the_users_own_come_back_as_builtins(value: Any, expected: Any) -> None:
    """A Replica's classes do not exist where the client runs, so their builtin stands for them, at any depth."""
    assert same(expected, round_trip(value))
    assert same({"deep": [(expected,)]}, round_trip({"deep": [(value,)]}))


PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals()
    | st.uuids()
    | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, min_side=0, max_side=3)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(st.characters()) | st.integers() | st.tuples(st.integers()), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(PLAIN_VALUES)
def test_any_value_comes_back_as_itself(value: Any) -> None:
    """The promise of the format, over values nobody thought of."""
    assert same(value, round_trip(value))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(hnp.arrays(hnp.array_dtypes(), hnp.array_shapes(min_side=0, max_side=3)))
def test_any_structured_array_comes_back_as_itself(array: np.ndarray[Any, Any]) -> None:
    """Fields, nested fields, sub-arrays and padding survive."""
    assert same(array, round_trip(array))


def test_sets_are_written_in_one_order() -> None:
    """Messages are named by their digest, so equal sets give equal bytes whatever their history."""
    backwards = {f"k{number}" for number in reversed(range(50))}
    assert wire.pack({f"k{number}" for number in range(50)}) == wire.pack(backwards)


def test_plain_values_are_plain_msgpack() -> None:
    """Anyone's msgpack reads an answer of strings, numbers, lists and dicts."""
    value = {"label": "positive", "scores": [0.1, None, True, b"x"], "n": {"deep": [[1]]}}
    assert msgspec.msgpack.decode(wire.pack(value)) == value
    assert wire.unpack(msgspec.msgpack.encode(dt.datetime(2024, 1, 1, tzinfo=dt.UTC))).year == 2024


def test_a_large_array_is_copied_once() -> None:
    """The message has the array's bytes once, even inside a tuple, and no container of it copied them again."""
    array = np.zeros(1 << 20, np.uint8)
    assert len(wire.pack((((array,),),))) < array.nbytes + 200


class Strange:
    """A class without any rule."""


def _cycle() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


REFUSED = [
    ({"scores": [1, 2, 3, Strange()]}, 'answer["scores"][3]: a value of type Strange cannot be sent'),
    ([{(1, 2): (x for x in ())}], "answer[0][(1, 2)]: a value of type generator"),
    (Box("a", Strange()), 'answer["corner"]: a value of type Strange'),
    (Strange, "answer: a value of type type"),
    (np.array([Strange()], dtype=object), "answer[0]: a value of type Strange"),
    (_cycle(), "contained in itself"),
]


@pytest.mark.parametrize(("value", "text"), REFUSED, ids=lambda value: type(value).__name__)
def test_what_cannot_be_sent_is_named_with_its_path(value: Any, text: str) -> None:
    """A data scientist sees which part of the answer is at fault, for both formats."""
    with pytest.raises(wire.WireError) as packed:
        wire.pack(value)
    assert text in str(packed.value)
    with pytest.raises(wire.WireError) as written:
        wire.to_json(value)
    assert text in str(written.value)


@pytest.mark.parametrize("value", [np.ma.array([1, 2], mask=[0, 1]), np.array([], dtype=np.dtype([]))])
def test_arrays_that_would_lose_something_are_refused(value: Any) -> None:
    """A mask is not dropped silently."""
    with pytest.raises(wire.WireError, match=r"^request: .*cannot be sent"):
        wire.pack(value, name="request")


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(st.binary(max_size=64))
def test_any_bytes_give_a_value_or_a_wire_error(data: bytes) -> None:
    """The body of a request is written by strangers."""
    with contextlib.suppress(wire.WireError):
        wire.unpack(data)


CHANGES = st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4)
VALID = [
    wire.pack(value)
    for value in (
        [*BUILTINS, *MOMENTS],
        ARRAYS,
        SCALARS,
        [Image.new("RGB", (4, 3)), Image.new("P", (2, 2)), Image.new("F", (2, 2))],
    )
]


@hypothesis.settings(max_examples=600, deadline=None)
@hypothesis.given(
    st.sampled_from(VALID), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4), st.data()
)
def test_damaged_messages_give_a_value_or_a_wire_error(message: bytes, changes: Any, data: st.DataObject) -> None:
    """One wrong byte in a good message reaches every reader of an extension, and none lets its own error out."""
    damaged = bytearray(message)
    for place, byte in changes:
        damaged[place % len(damaged)] = byte
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    with contextlib.suppress(wire.WireError):
        wire.unpack(damaged[:end])


def _message(code: int, parts: Any, *buffers: bytes) -> bytes:
    ext = msgspec.msgpack.Ext
    tree = ext(code, msgspec.msgpack.encode(parts))
    return msgspec.msgpack.encode([ext(0, b"\x01"), tree, list(buffers)])


def _nested(code: int, levels: int) -> bytes:
    data: Any = None
    for _ in range(levels):
        data = [msgspec.msgpack.Ext(code, msgspec.msgpack.encode(data))]
    return msgspec.msgpack.encode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000 + b"\xc0",
        _nested(5, 600),
        _message(20, ["<f8", [2**40], "C", 0], b"12345678"),
        _message(20, ["<f8", [-1], "C", 0], b"12345678"),
        _message(20, ["<f8", [True], "C", 0], b"12345678"),
        _message(20, ["<f8", [1], "C", 1], b"12345678"),
        _message(20, ["<f8", [1], "X", 0], b"12345678"),
        _message(20, ["|O8", [1], "C", 0], b"12345678"),
        _message(20, ["|O", [1], "C", 0], b"12345678"),
        _message(20, [["struct", 8, [["a", "|O", 0, None]]], [1], "C", 0], b"12345678"),
        _message(20, [["struct", 8, [["a", "<f8", 4, None]]], [1], "C", 0], b"12345678"),
        _message(20, [["struct", 4, [["a", "<U1", 0, None]]], [1], "C", 0], b"\xff\xff\xff\xff"),
        _message(20, ["|b1", [1], "C", 0], b"\x02"),
        _message(20, ["<U1", [1], "C", 0], b"\xff\xff\xff\xff"),
        _message(21, [[2], [1]]),
        _message(21, [[2**40], []]),
        _message(5, 3),
        _message(8, [1]),
        _message(8, [[], 1]),
        _message(9, [0, 1, 0]),
        _message(14, "../../etc/passwd"),
        _message(15, 1),
        _message(24, ["object", [1], 0], b"\0"),
        _message(24, ["float32", [2**50], 0], b"\0"),
        _message(28, ["frame"]),
        _message(28, ["__class__"]),
        _message(32, ["RGB", [2**16, 2**16], None, None, "raw", 0], b"\0"),
        _message(32, ["RGB", [2**20, 2**20], None, None, "png", 0], b"\0"),
        _message(32, ["RGB", [1, 1], None, None, "png", 0], b"\x89PNG"),
        _message(99, None),
        wire.pack(np.zeros(3))[:-1],
        wire.pack([1]) + b"\0",
    ],
    ids=range(35),
)
def test_hostile_messages_are_refused(data: bytes) -> None:
    """Depth, claimed sizes, dtypes of pointers, paths for names, unhashable keys: each ends in WireError."""
    with pytest.raises(wire.WireError):
        wire.unpack(data)


def test_a_buffer_is_handed_out_once() -> None:
    """A megabyte named a thousand times does not become a gigabyte."""
    ext = msgspec.msgpack.Ext
    array = ext(20, msgspec.msgpack.encode(["|u1", [3], "C", 0]))
    with pytest.raises(wire.WireError):
        wire.unpack(msgspec.msgpack.encode([ext(0, b"\x01"), [array, array], [b"abc"]]))


def _picture(mode: str) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(noise)
    return image.convert("RGBA").convert(mode) if mode in {"LA", "PA", "RGBa"} else image.convert(mode)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_an_image_comes_back_with_every_pixel(mode: str) -> None:
    """Mode, size, palette and pixels are the same, compressed or not."""
    image = _picture(mode)
    for sent in (image, Image.new(mode, (0, 3))):
        back = round_trip(sent)
        assert isinstance(back, Image.Image)
        assert (back.mode, back.size) == (sent.mode, sent.size)
        assert not sent.width or back.tobytes() == sent.tobytes()
    assert round_trip(image).getpalette() == image.getpalette()


def test_a_palette_image_keeps_indices_that_its_palette_lacks() -> None:
    """PNG alone would cut the indices to the colours of the palette."""
    image = Image.new("P", (2, 1))
    image.putdata([0, 200])
    image.info["transparency"] = 3
    assert round_trip(image).tobytes() == b"\x00\xc8"
    assert "transparency" not in round_trip(_picture("P")).info


JSON = [
    ({"a": [1, 2.5, None, True]}, {"a": [1, 2.5, None, True]}),
    ([math.nan, math.inf, 1.0], [None, None, 1.0]),
    ((1, (2,)), [1, [2]]),
    ({3, 1, 2}, [1, 2, 3]),
    ({"b", 1}, [1, "b"]),
    (b"\xff", "/w=="),
    (bytearray(b"\xff"), "/w=="),
    (range(3), [0, 1, 2]),
    (Point(1, [2]), [1, [2]]),
    (Box("a", {1: math.nan}), {"label": "a", "corner": {"1": None}}),
    (Answer(text="t", when=dt.date(2024, 1, 2)), {"text": "t", "when": "2024-01-02"}),
    (Colour.RED, ["r", 1]),
    ({Level.HIGH: Level.HIGH}, {"3": 3}),
    (decimal.Decimal("1.5"), 1.5),
    (decimal.Decimal("Infinity"), None),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (dt.datetime(2024, 1, 1, 12, tzinfo=dt.UTC), "2024-01-01T12:00:00+00:00"),
    (dt.time(1, 2, tzinfo=dt.UTC), "01:02:00+00:00"),
    (dt.timedelta(seconds=90), "PT90S"),
    ({1: 3, None: 2} | {2.5: 4, (1, 2): 5}, {"1": 3, "null": 2, "2.5": 4, "(1, 2)": 5}),
    ({dt.date(2024, 1, 1): 1, np.int64(4): 2, "\ud800": 3}, {"2024-01-01": 1, "4": 2, "\ud800": 3}),
    ([2**70, -(2**63) - 1, 2**64 - 1], [2**70, -(2**63) - 1, 2**64 - 1]),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array([1.5, np.nan], np.float32), [1.5, None]),
    (np.arange(4).reshape(2, 2).T, [[0, 2], [1, 3]]),
    (np.arange(2, dtype=">i4"), [0, 1]),
    (np.longdouble([1.5]), [1.5]),
    (np.array(3), 3),
    (np.zeros((2, 0)), [[], []]),
    (np.array(["a"]), ["a"]),
    (np.array([b"\xff"]), ["/w=="]),
    (np.array([True]), [True]),
    (np.array(["2024-01-01", "NaT"], "M8[D]"), ["2024-01-01", None]),
    (np.array([90, "NaT"], "m8[s]"), ["PT90S", None]),
    (np.array([1, {2: b"\xff"}], dtype=object), [1, {"2": "/w=="}]),
    (np.array([(1, "a")], dtype="i4,U1"), [[1, "a"]]),
    (np.ma.array([1, 2], mask=[0, 1]), [1, None]),
    ([np.float32(0.1), np.int8(1), np.bool_(True), np.str_("s"), np.float64("nan")], [0.1, 1, True, "s", None]),
    (np.datetime64("2024-01-01"), "2024-01-01"),
]


@pytest.mark.parametrize(("value", "expected"), JSON, ids=lambda value: type(value).__name__)
def test_json_follows_the_rules(value: Any, expected: Any) -> None:
    """Bytes and objects agree with each other and with the documented rules."""
    import json

    assert same(json.loads(wire.to_json(value)), expected)
    assert same(wire.jsonable(value), expected)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(PLAIN_VALUES)
def test_json_of_any_value_is_json_or_a_wire_error(value: Any) -> None:
    """Whatever predict returns, the caller gets valid JSON or a sentence, and both forms of it agree."""
    import json

    try:
        data = wire.to_json(value)
    except wire.WireError:
        return
    assert same(json.loads(data), wire.jsonable(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1j]}, 'answer["a"][0]: complex'),
        ({"a": np.array([1j])}, 'answer["a"]: complex'),
        ({1: "x", "1": "y"}, 'answer["1"]: two keys'),
        (Image.new("F", (1, 1)), "mode F"),
    ],
)
def test_json_refuses_what_it_cannot_say(value: Any, text: str) -> None:
    """Complex numbers, colliding keys and float images are told, never dropped."""
    with pytest.raises(wire.WireError) as caught:
        wire.to_json(value)
    assert text in str(caught.value)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "F"])
def test_images_are_png_in_json(mode: str) -> None:
    """A browser shows the base64 of any image."""
    data = base64.b64decode(orjson.loads(wire.to_json(_picture(mode))))
    assert Image.open(io.BytesIO(data)).size == (9, 5)


def test_foreign_arrays_arrive_as_numpy_arrays() -> None:
    """Arrays of packages that know numpy's protocol, like jax, are sent as what they say they are."""

    class Foreign:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.arange(2)

    assert same(round_trip([Foreign()]), [np.arange(2)])
    assert wire.to_json([Foreign()]) == b"[[0,1]]"


def _tensors(torch: Any) -> list[Any]:
    numbers = torch.arange(6).reshape(2, 3)
    floats = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    kinds = [
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.uint16,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        *floats,
    ]
    return [
        *[numbers.to(kind) for kind in kinds],
        numbers.T,
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.ones(2, requires_grad=True) * 2,
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.tensor([1.0, float("nan")]),
    ]


@pytest.mark.torch
def test_tensors_come_back_as_tensors() -> None:
    """Dtype, shape and values survive; gradients do not travel."""
    torch = pytest.importorskip("torch")
    for tensor in _tensors(torch):
        back = round_trip({"t": (tensor,)})["t"][0]
        assert type(back) is torch.Tensor
        assert not back.requires_grad
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert parity.compare(tensor.detach() + 0 if tensor.is_conj() else torch.Tensor.detach(tensor), back).equal
    with pytest.raises(wire.WireError, match="dense"):
        wire.pack(torch.eye(2).to_sparse())


@pytest.mark.torch
def test_tensors_come_back_as_arrays_where_torch_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8-bit floats and bfloat16 become float32 exactly as torch converts them, for all their codes."""
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    kinds = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
    tensors = [*[codes.view(kind) for kind in kinds], torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)]
    expected = [tensor.float().numpy() for tensor in tensors]
    message = wire.pack(tensors)
    monkeypatch.setitem(sys.modules, "torch", None)
    for first, second in zip(expected, wire.unpack(message), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.torch
def test_tensors_in_json_are_nested_lists() -> None:
    """The caller sees numbers, whatever their width."""
    torch = pytest.importorskip("torch")
    value = [torch.tensor([[1.5, float("nan")]], dtype=torch.bfloat16), torch.tensor(2), torch.tensor([True])]
    assert wire.to_json(value) == b"[[[1.5,null]],2,[true]]"
