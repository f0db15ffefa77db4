"""pandas values come back with dtypes, labels, order and missing values as they were."""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from nbdeploy_server import wire

TIMES = pd.date_range("2024-03-30", periods=3, freq="D", tz="Europe/Berlin")
COLUMNS: dict[str, Any] = {
    "ints": [1, 2, 3],
    "float32": np.array([1.5, np.nan, -0.0], np.float32),
    "complex": np.array([1j, 2, 3]),
    "bools": [True, False, True],
    "text": ["a", None, "ü"],
    "text with NA": pd.array(["a", pd.NA, ""], dtype=pd.StringDtype("python")),
    "objects": pd.Series([{"a": 1}, [2, (3,)], None], dtype=object),
    "text as objects": pd.Series(["a", 1, np.nan], dtype=object),
    "category": pd.Categorical(["b", "a", None], categories=["b", "a", "c"], ordered=True),
    "categories of numbers": pd.Categorical([2, 1, 2]),
    "times": TIMES,
    "fixed offset": TIMES.tz_convert(dt.timezone(dt.timedelta(hours=2))),
    "naive": pd.to_datetime(["2024-01-01", None, "1999-12-31 23:59:59.123456789"], format="ISO8601").as_unit("ns"),
    "seconds": pd.to_datetime(["2024-01-01"] * 3).as_unit("s"),
    "delta": pd.to_timedelta([1, None, 3], unit="h"),
    "Int64": pd.array([1, None, 3], dtype="Int64"),
    "UInt8": pd.array([1, None, 3], dtype="UInt8"),
    "Float32": pd.array([1.5, None, 3], dtype="Float32"),
    "boolean": pd.array([True, None, False], dtype="boolean"),
    "period": pd.period_range("2024-01", periods=3, freq="M"),
    "interval": pd.interval_range(0, 3),
    "sparse": pd.arrays.SparseArray([0, 0, 1]),
}
INDEXES = [
    pd.RangeIndex(2, 8, 2, name="r"),
    pd.RangeIndex(0),
    pd.Index([3, 1, 2], name=("a", 1)),
    pd.Index(["x", "x", "y"]),
    pd.Index(["x", 1, None], dtype=object),
    pd.Index([(1, 2), (3, 4)], tupleize_cols=False),
    pd.Index([], dtype=object),
    TIMES,
    TIMES[[0, 2]],
    pd.timedelta_range("1h", periods=3, freq="30min"),
    pd.CategoricalIndex(["a", "b"], categories=["b", "a"]),
    pd.IntervalIndex.from_breaks([0.0, 1.0, 2.0], closed="left"),
    pd.period_range("2024", periods=2, freq="Y"),
    pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["x", None]),
    pd.MultiIndex.from_arrays([["a", None], TIMES[:2]]),
    pd.Index(pd.array([1, None], dtype="Int64")),
]


def round_trip(value: Any) -> Any:
    """The value after a journey."""
    return wire.unpack(wire.pack(value))


def assert_same_frame(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Values, dtypes, labels, frequency and classes of indexes."""
    pd.testing.assert_frame_equal(first, second, check_exact=True, check_freq=True)
    assert type(first.index) is type(second.index)
    assert type(first.columns) is type(second.columns)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_comes_back_as_itself(name: str) -> None:
    """Each kind of column survives as a series and as a column of a frame, full and empty."""
    series = pd.Series(COLUMNS[name], name=name)
    for sent in (series, series.iloc[:0], series.iloc[[2, 0, 0]]):
        pd.testing.assert_series_equal(sent, round_trip(sent), check_exact=True)
        assert_same_frame(sent.to_frame(), round_trip(sent.to_frame()))


def test_an_array_of_pandas_comes_back_as_itself() -> None:
    """Arrays without labels are values too."""
    for array in (pd.Categorical(["a"]), pd.array([1, None]), TIMES.array, pd.array(["a", None], dtype="string")):
        pd.testing.assert_extension_array_equal(array, round_trip(array))


def test_a_mixed_frame_comes_back_as_itself() -> None:
    """All kinds of columns beside each other, inside an answer."""
    frame = pd.DataFrame(COLUMNS, index=pd.MultiIndex.from_arrays([[1, 2, 3], TIMES], names=["n", "t"]))
    assert_same_frame(frame, round_trip({"frame": (frame,)})["frame"][0])


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(),
        pd.DataFrame(index=pd.RangeIndex(3)),
        pd.DataFrame(columns=["a", "b"]),
        pd.DataFrame([[1, "x"], [2, "y"]], columns=["a", "a"]),
        pd.DataFrame(np.arange(6.0).reshape(2, 3), columns=pd.MultiIndex.from_product([["u"], [1, 2, 3]])),
        pd.DataFrame({0: [1], None: [2], ("t", 1): ["x"]}),
        pd.DataFrame(np.ones((3, 2), np.float32), columns=pd.Index(["a", "b"], name="cols")),
        pd.DataFrame({"a": [1, 2], "b": [1.5, 2.5]}).T,
    ],
)
def test_unusual_frames_come_back_as_themselves(frame: pd.DataFrame) -> None:
    """Empty frames, duplicate names, labels that are no strings."""
    assert_same_frame(frame, round_trip(frame))


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: type(index).__name__)
def test_an_index_comes_back_as_itself(index: pd.Index[Any]) -> None:
    """Class, names, values, categories and frequency survive."""
    back = round_trip(index)
    pd.testing.assert_index_equal(index, back, exact=True, check_exact=True)
    assert type(back) is type(index)
    assert getattr(back, "freq", None) == getattr(index, "freq", None)


@pytest.mark.parametrize(
    "value",
    [
        pd.Timestamp("2024-01-01 12:00:00.123456789"),
        pd.Timestamp("2024-10-27 00:30", tz="UTC").tz_convert("Europe/Berlin"),
        pd.Timestamp("2024-01-01", tz=dt.UTC).as_unit("s"),
        pd.Timedelta(5, unit="ms"),
        pd.Period("2024-01", freq="M"),
        pd.Interval(0, 1.5, closed="both"),
    ],
)
def test_a_scalar_comes_back_as_itself(value: Any) -> None:
    """Nanoseconds, unit, zone and which of two equal hours survive."""
    back = round_trip([value])[0]
    assert type(back) is type(value)
    assert back == value
    assert repr(back) == repr(value)
    assert getattr(back, "unit", None) == getattr(value, "unit", None)


def test_missing_values_are_the_same_objects() -> None:
    """Code that asks `is pd.NA` works on both sides."""
    assert round_trip(pd.NaT) is pd.NaT
    assert round_trip({"a": (pd.NA,)})["a"][0] is pd.NA


def test_a_frame_that_came_back_can_be_changed() -> None:
    """The answer belongs to its caller."""
    frame = round_trip(pd.DataFrame({"a": [1, 2], "b": [3, 4]}))
    frame.loc[0, "a"] = 7
    assert frame.a.tolist() == [7, 2]


def test_values_that_need_another_package_are_refused_with_the_way_out() -> None:
    """The message names the column's dtype and what to do."""
    frame = pd.DataFrame({"a": pd.Series([object()], dtype=object)})
    with pytest.raises(wire.WireError, match="object cannot be sent"):
        wire.pack({"f": frame})


SERIES = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1)).map(lambda items: pd.Series(items, dtype="int64")),
    st.lists(st.floats()).map(lambda items: pd.Series(items, dtype="float64")),
    st.lists(st.text() | st.none()).map(lambda items: pd.Series(items, dtype="str")),
    st.lists(st.integers() | st.text() | st.none() | st.binary()).map(lambda items: pd.Series(items, dtype=object)),
    st.lists(st.sampled_from("abc")).map(lambda items: pd.Series(items, dtype="category")),
)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(st.lists(SERIES, max_size=3), st.lists(st.text() | st.integers(), min_size=3, max_size=3))
def test_any_frame_comes_back_as_itself(columns: list[Any], names: list[Any]) -> None:
    """Frames nobody thought of, duplicate names included."""
    height = min((len(column) for column in columns), default=0)
    frame = pd.concat([column.iloc[:height] for column in columns], axis=1) if columns else pd.DataFrame()
    frame.columns = pd.Index(names[: len(columns)], dtype=object)
    assert_same_frame(frame, round_trip(frame))


VALID = wire.pack([pd.DataFrame({name: COLUMNS[name] for name in COLUMNS}), INDEXES, pd.NaT, TIMES[0], pd.Timedelta(1)])


@pytest.mark.filterwarnings("ignore")  # pandas warns of old spellings in damaged frequencies
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_frames_give_a_value_or_a_wire_error(changes: list[tuple[int, int]]) -> None:
    """Whatever pandas raises inside, the reader of a message sees one kind of error."""
    damaged = bytearray(VALID)
    for place, byte in changes:
        damaged[place] = byte
    with contextlib.suppress(wire.WireError):
        wire.unpack(damaged)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), [{"a": 1, "b": "x"}, {"a": 2, "b": None}]),
        (pd.DataFrame({0: [0.1, np.nan]}, dtype="float32"), [{"0": 0.1}, {"0": None}]),
        (
            pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("a", 2)])),
            [{"('a', 1)": 1, "('a', 2)": 2}],
        ),
        (pd.DataFrame(), []),
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series(["a", "b"], dtype="category"), ["a", "b"]),
        (pd.Index([1, 2]), [1, 2]),
        (pd.MultiIndex.from_tuples([("a", 1)]), [["a", 1]]),
        (TIMES[:1], ["2024-03-30T00:00:00+01:00"]),
        (pd.Series([pd.Timestamp("2024-01-01"), pd.NaT]), ["2024-01-01T00:00:00", None]),
        (pd.Series([{"k": np.int64(1)}, b"\xff"]), [{"k": 1}, "/w=="]),
        ([pd.NA, pd.NaT, pd.Timestamp("2024-01-01", tz="UTC")], [None, None, "2024-01-01T00:00:00+00:00"]),
        (pd.Period("2024-01", freq="M"), "2024-01"),
        ({"deep": {1: pd.Series([1.5])}}, {"deep": {"1": [1.5]}}),
    ],
)
def test_json_of_pandas_follows_the_rules(value: Any, expected: Any) -> None:
    """Frames are lists of records, series and indexes lists, moments ISO 8601, missing values null."""
    import json

    assert json.loads(wire.to_json(value)) == expected
    assert wire.jsonable(value) == expected


def test_json_refuses_two_columns_of_one_name() -> None:
    """A record could hold only one of them."""
    with pytest.raises(wire.WireError, match="two columns"):
        wire.to_json({"f": pd.DataFrame([[1, 2]], columns=["a", "a"])})
