"""Whether two answers are the same: the live one of the notebook, and the one of a clean process or a Replica.

Structure and types have to agree exactly: a list is no tuple, and np.float64(1) is no float, because a caller sees it.
Numbers may differ by what honest recomputation changes (another order of summation, another number of threads), which
depends on their width. The tolerances start from those of numpy.testing and torch.testing, and are tighter for float64
and wider for halves, whose sums are longer in models than in those packages' tests:

    dtype                  relative   absolute   why
    bool, int, text        0          0          nothing to round
    float64, float         1e-9       1e-12      a few thousand roundings of 2**-53
    float32                1e-5       1e-6       about 100 roundings of 2**-24
    float16, bfloat16      1e-2       1e-3       one or two roundings of 2**-8
    8-bit floats           1e-1       1e-3       one rounding of 2**-4

`loose` is for answers of another device (a GPU against the CPU): relative tolerances are a hundred times wider, and
Python floats count as float32, since they mostly come out of a float32 model by `.item()` or `.tolist()`.
"""

from __future__ import annotations

import cmath
import collections
import dataclasses
import sys
from typing import Any

from nbdeploy_server import arrays, frames, images, wire
from nbdeploy_server.plain import step

_EXCERPT = 80  # characters of a value that a difference shows
_MOST_REORDERED = 10_000  # longer lists are not searched for a change of order: it takes a message per item
_TOLERANCES = {
    "float64": (1e-9, 1e-12),
    "float32": (1e-5, 1e-6),
    "float16": (1e-2, 1e-3),
    "bfloat16": (1e-2, 1e-3),
    "complex128": (1e-9, 1e-12),
    "complex64": (1e-5, 1e-6),
}
_FLOAT8 = (1e-1, 1e-3)
_LOOSER = 100


@dataclasses.dataclass(frozen=True)
class Parity:
    """The outcome of a comparison.

    Attributes:
        equal: whether the answers are the same within the tolerances.
        max_difference: the largest absolute difference of two numbers, also if they count as equal; 0.0 without any.
        path: where the first difference is, like `["scores"][3]`; empty where equal or at the top.
        expected: excerpt of the expected value there, at most 80 characters; empty where equal.
        actual: excerpt of the actual value there, at most 80 characters; empty where equal.
        reason: what differs, in words; empty where equal.
    """

    equal: bool
    max_difference: float
    path: str = ""
    expected: str = ""
    actual: str = ""
    reason: str = ""


def compare(expected: Any, actual: Any, *, loose: bool = False) -> Parity:
    """Compare two answers as `wire.unpack` gives them; never raises for values of the wire.

    `loose` widens the tolerances for answers computed on different kinds of devices.
    """
    comparison = _Comparison(loose=loose)
    try:
        comparison.check(expected, actual)
    except _DifferenceFound as found:
        path = "".join(reversed(found.steps))
        texts = excerpt(found.expected), excerpt(found.actual)
        return Parity(False, comparison.largest, path, *texts, reason=found.reason)
    return Parity(True, comparison.largest)


def excerpt(value: Any) -> str:
    """One line of at most 80 characters that shows a value."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - an excerpt is worth no failure, and a repr runs foreign code
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


class _DifferenceFound(Exception):  # noqa: N818 - a result that ends the walk, not a failure
    def __init__(self, expected: Any, actual: Any, reason: str) -> None:
        super().__init__(reason)
        self.expected = expected
        self.actual = actual
        self.reason = reason
        self.steps: list[str] = []


def _dtype_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


class _Comparison:
    """One walk over two answers; keeps the largest difference on the way."""

    def __init__(self, *, loose: bool) -> None:
        self.loose = loose
        self.largest = 0.0

    def check(self, expected: Any, actual: Any) -> None:
        """Raise _DifferenceFound at the first difference."""
        if type(expected) is not type(actual):
            raise _DifferenceFound(expected, actual, f"{_type_name(expected)} became {_type_name(actual)}")
        if isinstance(expected, dict):
            self._dicts(expected, actual)
        elif isinstance(expected, (list, tuple)):
            self._sequences(expected, actual)
        elif arrays.is_tensor(expected) or arrays.is_array(expected):
            self._arrays(expected, actual)
        elif arrays.is_scalar(expected) and expected.dtype.kind in "fc":
            self._number(expected, actual, _dtype_name(expected))
        elif isinstance(expected, (float, complex)):
            self._number(expected, actual, "float32" if self.loose else "float64")
        elif isinstance(expected, (set, frozenset)):
            _sets(expected, actual)
        elif "pandas" in sys.modules and frames.is_known(expected):
            self._pandas(expected, actual)
        elif images.is_image(expected):
            self._images(expected, actual)
        else:
            self._exact(expected, actual)

    def _inside(self, place: str, expected: Any, actual: Any) -> None:
        try:
            self.check(expected, actual)
        except _DifferenceFound as found:
            found.steps.append(place)
            raise

    def _exact(self, expected: Any, actual: Any) -> None:
        if isinstance(expected, int) and not isinstance(expected, bool) and expected != actual:
            self._seen(_distance(expected, actual))
        same = expected == actual or (expected != expected and actual != actual)  # noqa: PLR0124 - NaN and NaT
        if not same or getattr(expected, "tzinfo", None) != getattr(actual, "tzinfo", None):
            raise _DifferenceFound(expected, actual, "the values differ")

    def _seen(self, difference: float) -> None:
        self.largest = max(self.largest, difference)

    def _tolerance(self, dtype: str) -> tuple[float, float]:
        relative, absolute = _FLOAT8 if dtype.startswith("float8") else _TOLERANCES.get(dtype, (1e-9, 1e-12))
        return (relative * _LOOSER if self.loose else relative), absolute

    def _number(self, expected: Any, actual: Any, dtype: str) -> None:
        first, second = complex(expected), complex(actual)
        if first == second or (cmath.isnan(first) and cmath.isnan(second)):
            return
        relative, absolute = self._tolerance(dtype)
        finite = cmath.isfinite(first) and cmath.isfinite(second)
        difference = abs(first - second) if finite else float("inf")
        self._seen(difference)
        if difference > absolute + relative * abs(first) or not finite:
            raise _DifferenceFound(expected, actual, "the numbers differ")

    def _dicts(self, expected: dict[Any, Any], actual: dict[Any, Any]) -> None:
        missing = [key for key in expected if key not in actual]
        extra = [key for key in actual if key not in expected]
        if missing or extra:
            words = [
                f"keys are {word}: {excerpt(keys)}" for word, keys in (("missing", missing), ("new", extra)) if keys
            ]
            raise _DifferenceFound(expected, actual, "; ".join(words))
        for key, item in expected.items():
            self._inside(step(key), item, actual[key])
        if list(expected) != list(actual) and not any(key != key for key in expected):  # noqa: PLR0124 - finds NaN
            raise _DifferenceFound(list(expected), list(actual), "same keys in another order")

    def _sequences(self, expected: Any, actual: Any) -> None:
        if len(expected) != len(actual):
            raise _DifferenceFound(expected, actual, f"{len(expected)} items became {len(actual)}")
        for index, item in enumerate(expected):
            try:
                self._inside(f"[{index}]", item, actual[index])
            except _DifferenceFound:
                if _reordered(expected, actual):
                    raise _DifferenceFound(expected, actual, "same items in another order") from None
                raise

    def _arrays(self, expected: Any, actual: Any) -> None:
        if expected.dtype != actual.dtype:
            reason = f"dtype {_dtype_name(expected)} became {_dtype_name(actual)}"
            raise _DifferenceFound(expected, actual, reason)
        if tuple(expected.shape) != tuple(actual.shape):
            reason = f"shape {tuple(expected.shape)} became {tuple(actual.shape)}"
            raise _DifferenceFound(expected, actual, reason)
        dtype = _dtype_name(expected)
        if arrays.is_tensor(expected):
            expected, actual = arrays.tensor_array(expected), arrays.tensor_array(actual)
        if expected.dtype.kind in "fc":
            self._close(expected, actual, dtype)
        elif expected.dtype.kind == "O":
            for place, item in _places(expected):
                self._inside(_steps(place), item, actual[place])
        else:
            self._identical(expected, actual)

    def _close(self, expected: Any, actual: Any, dtype: str) -> None:
        """Arrays of floats: every number within the tolerance; reports the worst."""
        import numpy as np

        if not expected.size:
            return
        wide = np.promote_types(expected.dtype, np.complex128 if expected.dtype.kind == "c" else np.float64)
        first, second = expected.astype(wide), actual.astype(wide)
        with np.errstate(all="ignore"):
            difference = np.abs(first - second)
            same = (first == second) | (np.isnan(first) & np.isnan(second))
            difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
            relative, absolute = self._tolerance(dtype)
            allowed = absolute + relative * np.abs(first)
            wrong = ~same & ~((difference <= allowed) & np.isfinite(first) & np.isfinite(second))
        self._seen(float(difference.max()))
        if wrong.any():
            place = np.unravel_index(int(np.where(wrong, difference, -1.0).argmax()), expected.shape)
            raise _at(expected, actual, place, f"{int(wrong.sum())} of {expected.size} numbers differ")

    def _identical(self, expected: Any, actual: Any) -> None:
        """Arrays of anything that does not round."""
        import numpy as np

        same = expected == actual
        if expected.dtype.kind in "mM":
            same |= np.isnat(expected) & np.isnat(actual)
        if expected.dtype.kind == "V":
            same = np.array([a.tobytes() == b.tobytes() for a, b in zip(expected.flat, actual.flat, strict=True)])
            same = same.reshape(expected.shape)
        if np.all(same):
            return
        place = np.unravel_index(int(np.argmin(same)), expected.shape)
        if expected.dtype.kind in "iu":
            wrong = ~np.asarray(same)
            pairs = zip(expected[wrong].tolist(), actual[wrong].tolist(), strict=True)
            self._seen(max(_distance(first, second) for first, second in pairs))
        raise _at(expected, actual, place, f"{int(np.size(same) - np.sum(same))} of {expected.size} values differ")

    def _pandas(self, expected: Any, actual: Any) -> None:
        import pandas as pd

        if isinstance(expected, pd.DataFrame):
            self._inside(".columns", expected.columns, actual.columns)
            self._inside(".index", expected.index, actual.index)
            for place, name in enumerate(expected.columns):
                self._inside(step(name), expected.iloc[:, place].array, actual.iloc[:, place].array)
        elif isinstance(expected, pd.Series):
            self._inside(".name", expected.name, actual.name)
            self._inside(".index", expected.index, actual.index)
            self._values(expected.array, actual.array)
        elif isinstance(expected, pd.Index):
            self._inside(".names", list(expected.names), list(actual.names))
            if isinstance(expected, pd.MultiIndex):
                self._sequences(
                    *([index.get_level_values(n) for n in range(index.nlevels)] for index in (expected, actual))
                )
                return
            if not isinstance(expected, pd.RangeIndex) or not expected.equals(actual):
                self._values(expected.array, actual.array)
        elif isinstance(expected, pd.api.extensions.ExtensionArray):
            self._values(expected, actual)
        elif expected is not actual:  # NaT and NA are single objects
            self._exact(expected, actual)

    def _values(self, expected: Any, actual: Any) -> None:
        """Arrays of pandas: dtype (with its categories and time zone), length and values."""
        import numpy as np

        if expected.dtype != actual.dtype or str(expected.dtype) != str(actual.dtype):
            raise _DifferenceFound(expected, actual, f"dtype {expected.dtype} became {actual.dtype}")
        plain = getattr(expected.dtype, "numpy_dtype", expected.dtype)
        if isinstance(plain, np.dtype) and not hasattr(expected, "_mask"):
            self._arrays(np.asarray(expected), np.asarray(actual))
        else:
            self._sequences(list(expected), list(actual))

    def _images(self, expected: Any, actual: Any) -> None:
        for what in ("mode", "size"):
            first, second = getattr(expected, what), getattr(actual, what)
            if first != second:
                raise _DifferenceFound(expected, actual, f"{what} {first} became {second}")
        if expected.tobytes() != actual.tobytes() or expected.getpalette() != actual.getpalette():
            raise _DifferenceFound(expected, actual, "the pixels differ")


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _distance(first: int, second: int) -> float:
    try:
        return float(abs(first - second))
    except OverflowError:
        return float("inf")


def _steps(place: Any) -> str:
    return "".join(f"[{int(index)}]" for index in place)


def _places(array: Any) -> Any:
    import numpy as np

    return np.ndenumerate(array)


def _at(expected: Any, actual: Any, place: Any, reason: str) -> _DifferenceFound:
    found = _DifferenceFound(expected[place], actual[place], reason)
    if len(place):
        found.steps.append(_steps(place))
    return found


def _sets(expected: Any, actual: Any) -> None:
    if expected != actual:
        missing, extra = expected - actual, actual - expected
        words = [
            f"items are {word}: {excerpt(items)}" for word, items in (("missing", missing), ("new", extra)) if items
        ]
        raise _DifferenceFound(expected, actual, "; ".join(words))


def _reordered(expected: Any, actual: Any) -> bool:
    """Whether two sequences of the same length hold the same items, exactly, in another order."""
    if len(expected) > _MOST_REORDERED:
        return False
    try:
        return collections.Counter(map(wire.pack, expected)) == collections.Counter(map(wire.pack, actual))
    except wire.WireError:
        return False
