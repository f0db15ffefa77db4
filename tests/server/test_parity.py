"""Two answers are compared as a careful reader would: exact where things are exact, with sense where numbers round."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from nbdeploy_server.parity import Parity, compare, excerpt
from PIL import Image

NAIVE = dt.datetime(2024, 1, 1)  # noqa: DTZ001 - naive and aware have to differ

EQUAL = [
    (None, None),
    (1.0, 1.0 + 1e-12),
    (math.nan, math.nan),
    (math.inf, math.inf),
    ([1, {"a": (2.5, math.nan)}], [1, {"a": (2.5, math.nan)}]),
    ({1, 2}, {2, 1}),
    (np.float32(1), np.float32(1.000001)),
    (np.array([1, 2]), np.array([1, 2])),
    (np.array([1.0, np.nan, np.inf]), np.array([1.0 + 1e-12, np.nan, np.inf])),
    (np.array([1, 2], np.float16), np.array([1, 2.005], np.float16)),
    (np.array(["a"], dtype=object), np.array(["a"], dtype=object)),
    (np.array(["NaT"], "M8[s]"), np.array(["NaT"], "M8[s]")),
    (np.zeros(2, "i4,f8"), np.zeros(2, "i4,f8")),
    (np.empty((0, 2)), np.empty((0, 2))),
    (pd.NaT, pd.NaT),
    (pd.NA, pd.NA),
    (pd.DataFrame({"a": [1.0, None], "b": ["x", None]}), pd.DataFrame({"a": [1.0 + 1e-13, None], "b": ["x", None]})),
    (pd.Series([1, None], dtype="Int64"), pd.Series([1, None], dtype="Int64")),
    (pd.Index([1.0]), pd.Index([1.0])),
    (pd.MultiIndex.from_tuples([(1, "a")]), pd.MultiIndex.from_tuples([(1, "a")])),
    (Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))),
]


@pytest.mark.parametrize(("expected", "actual"), EQUAL, ids=lambda value: type(value).__name__)
def test_equal_answers_are_equal(expected: Any, actual: Any) -> None:
    """Rounding and NaN do not make a difference, alone or deep inside."""
    found = compare(expected, actual)
    assert found == Parity(True, found.max_difference)
    assert compare({"k": [expected]}, {"k": [actual]}).equal


DIFFERENT = [
    ([1], (1,), "", "list became tuple"),
    (1, 1.0, "", "int became float"),
    (True, 1, "", "bool became int"),
    (1.0, np.float64(1), "", "float became numpy.float64"),
    ({"scores": [0, 1, 2, 3.5]}, {"scores": [0, 1, 2, 3.6]}, '["scores"][3]', "the numbers differ"),
    ({"a": 1}, {"b": 1}, "", "keys are missing: ['a']; keys are new: ['b']"),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "", "same keys in another order"),
    ([1, 2], [1], "", "2 items became 1"),
    ([1, [2, 3]], [1, [3, 2]], "[1]", "same items in another order"),
    ("a", "b", "", "the values differ"),
    (1.0, math.inf, "", "the numbers differ"),
    (math.nan, 1.0, "", "the numbers differ"),
    ({1, 2}, {1, 3}, "", "items are missing: {2}; items are new: {3}"),
    (NAIVE, NAIVE.replace(tzinfo=dt.UTC), "", "the values differ"),
    (np.zeros(2), np.zeros(2, np.float32), "", "dtype float64 became float32"),
    (np.zeros(2), np.zeros((2, 1)), "", "shape (2,) became (2, 1)"),
    (np.zeros((2, 2)), np.array([[0, 1e-3], [5, 0]]), "[1][0]", "2 of 4 numbers differ"),
    (np.array([1, 2]), np.array([1, 3]), "[1]", "1 of 2 values differ"),
    (np.array(1), np.array(2), "", "1 of 1 values differ"),
    (np.array([{"a": 1}]), np.array([{"a": 2}]), '[0]["a"]', "the values differ"),
    (np.array(["a", "b"]), np.array(["a", "c"]), "[1]", "1 of 2 values differ"),
    (pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [1, 3]}), '["a"][1]', "1 of 2 values differ"),
    (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]}), ".columns[0]", "the values differ"),
    (pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1.0]}), '["a"]', "dtype int64 became float64"),
    (pd.Series([1], name="a"), pd.Series([1], name="b"), ".name", "the values differ"),
    (pd.Series([1], index=[1]), pd.Series([1], index=[2]), ".index[0]", "1 of 1 values differ"),
    (pd.Series(["a", None]), pd.Series(["a", "b"]), "[1]", "float became str"),
    (pd.RangeIndex(2), pd.RangeIndex(1, 3), "[0]", "2 of 2 values differ"),
    (Image.new("L", (1, 1)), Image.new("RGB", (1, 1)), "", "mode L became RGB"),
    (Image.new("L", (1, 1)), Image.new("L", (2, 1)), "", "size (1, 1) became (2, 1)"),
    (Image.new("L", (1, 1)), Image.new("L", (1, 1), 5), "", "the pixels differ"),
]


@pytest.mark.parametrize(("expected", "actual", "path", "reason"), DIFFERENT)
def test_a_difference_is_told_with_its_place(expected: Any, actual: Any, path: str, reason: str) -> None:
    """The card shows where the first difference is and what it is."""
    found = compare(expected, actual)
    assert not found.equal
    assert (found.path, found.reason) == (path, reason)
    deep = compare({"k": (expected,)}, {"k": (actual,)})
    assert (deep.path, deep.reason) == ('["k"][0]' + path, reason)


def test_the_largest_difference_is_reported_even_if_equal() -> None:
    """Users judge the tolerance by it."""
    assert compare([1.0, 2.0], [1.0 + 1e-10, 2.0]).max_difference == pytest.approx(1e-10, rel=1e-3)
    assert compare([1, 5.0], [1, 7.5]).max_difference == 2.5
    assert compare(np.array([1, 2**60]), np.array([4, 2**60])).max_difference == 3
    assert compare("a", "a").max_difference == 0.0


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [("float64", 5e-10, 1e-8), ("float32", 5e-6, 1e-4), ("float16", 5e-3, 5e-2), ("complex64", 5e-6, 1e-4)],
)
def test_the_tolerance_follows_the_dtype(dtype: str, within: float, beyond: float) -> None:
    """Wide numbers have to agree closely, halves roughly; another device may differ a hundred times more."""
    one = np.ones(3, dtype)
    assert compare(one, (one + within).astype(dtype)).equal
    assert not compare(one, (one + beyond).astype(dtype)).equal
    assert compare(one, (one + beyond).astype(dtype), loose=True).equal
    assert compare(one[0], (one + within).astype(dtype)[0]).equal
    assert not compare(one[0], (one + beyond).astype(dtype)[0]).equal


def test_python_floats_count_as_float32_across_devices() -> None:
    """They are mostly `.item()` of a model's float32."""
    assert not compare(0.5, 0.5001).equal
    assert compare(0.5, 0.5001, loose=True).equal
    assert not compare(0.5, 0.6, loose=True).equal
    assert not compare("cat", "dog", loose=True).equal


def test_excerpts_are_short_and_on_one_line() -> None:
    """The card has room for 80 characters, and a broken repr does not break a comparison."""

    class Broken:
        def __repr__(self) -> str:
            message = "no"
            raise RuntimeError(message)

    assert len(excerpt("x" * 1000)) == 80
    assert "\n" not in excerpt(np.zeros((9, 9)))
    assert excerpt(Broken()) == "<Broken>"
    assert compare([Broken()], [Broken()]).expected == "<Broken>"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(VALUES, VALUES)
def test_a_value_equals_itself_and_no_comparison_raises(first: Any, second: Any) -> None:
    """Whatever the answers are, the outcome is a Parity."""
    assert compare(first, first).equal
    found = compare(first, second)
    assert found.equal or found.reason


@pytest.mark.torch
def test_tensors_are_compared_by_dtype_shape_and_number() -> None:
    """bfloat16 and the 8-bit floats have tolerances of their own."""
    torch = pytest.importorskip("torch")
    one = torch.ones(2, 2)
    assert compare(one, one + 1e-6).equal
    assert compare(one.bfloat16(), (one + 0.008).bfloat16()).equal
    assert not compare(one.bfloat16(), (one + 0.1).bfloat16()).equal
    assert compare(one.to(torch.float8_e4m3fn), (one + 0.06).to(torch.float8_e4m3fn)).equal
    assert compare(one, one.double()).reason == "dtype float32 became float64"
    assert compare(one, one[0]).reason == "shape (2, 2) became (2,)"
    changed = one.clone()
    changed[1, 0] = 3
    assert compare({"t": one}, {"t": changed}).path == '["t"][1][0]'
