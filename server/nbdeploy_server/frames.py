"""pandas frames, series, indexes, arrays and scalars as parts of a message.

`parts` takes one object apart into builtins, numpy arrays, time zones and further pandas objects, which wire.py can
write; `of` puts them together again. Values are taken from pandas' own arrays, never through text, so that dtypes,
missing values and the order of categories survive. The first item of the parts is their kind; these names are a written
format:

    frame, series                 values, labels and names of a table and of a column
    range, multi, index           indexes
    numpy, category, datetimetz, masked, string, period, interval, sparse      arrays; `numpy` only inside the others
    timestamp, timedelta, period scalar, interval scalar, NaT, NA              scalars
"""

from __future__ import annotations

import datetime as dt
import importlib
import sys
import zoneinfo
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_CLASSES = ("DataFrame", "Series", "Index", "Timestamp", "Timedelta", "Period", "Interval")
_MASKED = frozenset(
    (
        *(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
        "Float32",
        "Float64",
        "boolean",
    )
)


def is_known(value: object) -> bool:
    """Whether the value belongs to pandas and has parts; only asked where pandas is loaded."""
    pandas = sys.modules["pandas"]
    if value is getattr(pandas, "NaT", None) or value is getattr(pandas, "NA", None):
        return value is not None
    kinds = tuple(kind for name in _CLASSES if (kind := getattr(pandas, name, None)) is not None)
    return isinstance(value, (*kinds, *_extension_array()))


def _extension_array() -> tuple[Any, ...]:
    """The class of pandas' own arrays, in a tuple for isinstance; empty while pandas is being imported."""
    kind = getattr(sys.modules.get("pandas.api.extensions"), "ExtensionArray", None)
    return () if kind is None else (kind,)


def parts(value: Any) -> list[Any]:
    """The parts of a pandas object, its kind first; raises TypeError for arrays that need another package (Arrow)."""
    import pandas as pd

    if isinstance(value, pd.DataFrame):
        return ["frame", value.index, value.columns, *_columns(value)]
    if isinstance(value, pd.Series):
        return ["series", _array_parts(value.array), value.index, value.name]
    if isinstance(value, pd.Index):
        return _index_parts(value)
    if isinstance(value, _extension_array()):
        return _array_parts(value)
    return _scalar_parts(value)


def _columns(frame: Any) -> tuple[str, Any]:
    """("matrix", one array) where all columns are numbers of one dtype, else ("columns", [array, ...])."""
    import numpy as np

    kinds = {dtype.str if isinstance(dtype, np.dtype) else None for dtype in frame.dtypes}
    if frame.shape[1] > 1 and len(kinds) == 1 and (kind := kinds.pop()) is not None and kind[1] in "biufc":
        return "matrix", frame.to_numpy()
    return "columns", [_array_parts(frame.iloc[:, place].array) for place in range(frame.shape[1])]


def _index_parts(index: Any) -> list[Any]:
    import pandas as pd

    if isinstance(index, pd.RangeIndex):
        return ["range", index.start, index.stop, index.step, index.name]
    if isinstance(index, pd.MultiIndex):
        return ["multi", [level.rename(None) for level in index.levels], [*map(_codes, index.codes)], list(index.names)]
    return ["index", _array_parts(index.array), index.name, _frequency(index)]


def _codes(codes: Any) -> Any:
    import numpy as np

    return np.asarray(codes)


def _frequency(index: Any) -> str | None:
    """The text of an index's frequency, None where it has none or the text would not give it back."""
    import pandas as pd

    text = getattr(index, "freqstr", None)
    if not isinstance(index, (pd.DatetimeIndex, pd.TimedeltaIndex)) or text is None:
        return None
    try:
        return text if pd.tseries.frequencies.to_offset(text) == index.freq else None
    except ValueError:
        return None


def _array_parts(array: Any) -> list[Any]:
    import numpy as np
    import pandas as pd

    dtype = array.dtype
    if isinstance(dtype, np.dtype) or type(array) is pd.arrays.NumpyExtensionArray:  # strings are a subclass of it
        return ["numpy", np.asarray(array)]
    if isinstance(dtype, pd.CategoricalDtype):
        return ["category", np.asarray(array.codes), dtype.categories, bool(dtype.ordered)]
    if isinstance(dtype, pd.DatetimeTZDtype):
        return ["datetimetz", array.asi8, dtype.unit, _zone(dtype.tz)]
    if str(dtype) in _MASKED:
        return ["masked", array._data, array._mask]  # noqa: SLF001 - the only way that keeps NaN and NA apart
    if isinstance(dtype, pd.StringDtype):
        return ["string", dtype.storage, dtype.na_value is pd.NA, array.to_numpy(dtype=object, na_value=None).tolist()]
    if isinstance(dtype, pd.PeriodDtype):
        return ["period", array.asi8, str(dtype)[len("period[") : -1]]
    if isinstance(dtype, pd.IntervalDtype):
        return ["interval", pd.Index(array.left), pd.Index(array.right), dtype.closed]
    if isinstance(dtype, pd.SparseDtype):
        return ["sparse", np.asarray(array), dtype.fill_value]
    message = f"pandas values of dtype {dtype} cannot be sent; convert the column with .astype(...)"
    raise TypeError(message)


def _zone(zone: Any) -> dt.tzinfo | None:
    """A time zone that wire.py can write; zones of other packages by their name."""
    if zone is None or isinstance(zone, (dt.timezone, zoneinfo.ZoneInfo)):
        return zone
    try:
        return zoneinfo.ZoneInfo(str(zone))
    except (ValueError, KeyError, OSError):
        message = f"the time zone {zone} has no name; use zoneinfo.ZoneInfo"
        raise TypeError(message) from None


def _scalar_parts(value: Any) -> list[Any]:
    import pandas as pd

    if value is pd.NaT:
        return ["NaT"]
    if value is pd.NA:
        return ["NA"]
    if isinstance(value, pd.Timestamp):
        return ["timestamp", int(value.asm8.view("i8")), value.unit, _zone(value.tz)]
    if isinstance(value, pd.Timedelta):
        return ["timedelta", int(value.asm8.view("i8")), value.unit]
    if isinstance(value, pd.Period):
        return ["period scalar", value.ordinal, value.freqstr]
    return ["interval scalar", value.left, value.right, value.closed]


def of(value: Any) -> Any:
    """The pandas object of these parts; raises ValueError or pandas' own errors where they do not fit each other."""
    kind, *rest = value
    builder = _BUILDERS.get(kind)
    return _array_of(value) if builder is None else builder(*rest)


def _frame_of(index: Any, columns: Any, form: str, data: Any) -> Any:
    import pandas as pd

    if form == "matrix":
        return pd.DataFrame(data, index=index, columns=columns, copy=False)
    series = {place: _series_of(array, index, None) for place, array in enumerate(data)}
    frame = pd.DataFrame(series, index=index, columns=pd.RangeIndex(len(series)), copy=False)
    frame.columns = columns
    return frame


def _series_of(array: Any, index: Any, name: Any) -> Any:
    import pandas as pd

    values = _array_of(array)
    return pd.Series(values, index=index, name=name, dtype=values.dtype, copy=False)


def _index_of(array: Any, name: Any, frequency: str | None) -> Any:
    import pandas as pd

    values = _array_of(array)
    index = pd.Index(values, dtype=values.dtype, name=name, tupleize_cols=False)
    if frequency is not None:
        index.freq = frequency  # pandas checks it against the values
    return index


def _range_of(start: int, stop: int, step: int, name: Any) -> Any:
    import pandas as pd

    return pd.RangeIndex(start, stop, step, name=name)


def _multi_of(levels: Any, codes: Any, names: Any) -> Any:
    import pandas as pd

    return pd.MultiIndex(levels=levels, codes=codes, names=names)


def _timestamp_of(value: int, unit: str, zone: dt.tzinfo | None) -> Any:
    import numpy as np
    import pandas as pd

    moment = pd.Timestamp(np.array(value, dtype=f"M8[{unit}]")[()])
    return moment if zone is None else moment.tz_localize("UTC").tz_convert(zone)


def _timedelta_of(value: int, unit: str) -> Any:
    import numpy as np
    import pandas as pd

    return pd.Timedelta(np.array(value, dtype=f"m8[{unit}]")[()])


def _pandas(name: str) -> Callable[..., Any]:
    def build(*rest: Any) -> Any:
        import pandas as pd

        if name == "Period":
            return pd.Period(ordinal=rest[0], freq=rest[1])
        return pd.Interval(*rest) if name == "Interval" else getattr(pd, name)

    return build


_BUILDERS: dict[str, Callable[..., Any]] = {
    "frame": _frame_of,
    "series": _series_of,
    "range": _range_of,
    "multi": _multi_of,
    "index": _index_of,
    "timestamp": _timestamp_of,
    "timedelta": _timedelta_of,
    "period scalar": _pandas("Period"),
    "interval scalar": _pandas("Interval"),
    "NaT": _pandas("NaT"),
    "NA": _pandas("NA"),
}


def _array_of(value: Any) -> Any:
    import numpy as np
    import pandas as pd

    kind, first, *rest = value
    if kind in {"numpy", "masked", "category", "datetimetz", "period", "sparse"} and not isinstance(first, np.ndarray):
        message = "a pandas value has no array"
        raise ValueError(message)
    if kind == "numpy":
        return first
    if kind == "category":
        return pd.Categorical.from_codes(first, categories=rest[0], ordered=rest[1])
    if kind == "datetimetz":
        stamps = pd.DatetimeIndex(first.view(f"M8[{rest[0]}]"))
        return stamps.tz_localize("UTC").tz_convert(rest[1]).array
    if kind == "masked":
        arrays = {"b": pd.arrays.BooleanArray, "f": pd.arrays.FloatingArray}
        return arrays.get(first.dtype.kind, pd.arrays.IntegerArray)(first, rest[0])
    if kind == "string":
        dtype = pd.StringDtype(_storage(first), na_value=pd.NA if rest[0] else np.nan)
        return pd.array(rest[1], dtype=dtype)
    if kind == "period":
        return pd.arrays.PeriodArray(first, dtype=pd.PeriodDtype(rest[0]))
    if kind == "interval":
        return pd.arrays.IntervalArray.from_arrays(first, rest[0], closed=rest[1])
    if kind == "sparse":
        return pd.arrays.SparseArray(first, fill_value=rest[0])
    message = f"a pandas value is of the unknown kind {kind!r}"
    raise ValueError(message)


def _storage(wanted: str) -> str:
    """The wanted storage of strings, "python" where Arrow is absent."""
    if wanted == "pyarrow":
        try:
            importlib.import_module("pyarrow")
        except ImportError:
            return "python"
    return wanted


def listed(value: Any, key_text: Callable[[Any], str], jsonable: Callable[[Any], Any]) -> Any:
    """A pandas object in JSON's terms: a frame as a list of records without its index, a series as a list.

    Raises ValueError for two columns of the same name.
    """
    import pandas as pd

    if value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, pd.DataFrame):
        names = [key_text(name) for name in value.columns]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            message = f"two columns of the frame are named {twice!r} in JSON; rename one"
            raise ValueError(message)
        columns = [_column(value.iloc[:, place], jsonable) for place in range(len(names))]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(value, (pd.Series, pd.Index, *_extension_array())):
        return _column(value, jsonable)
    if isinstance(value, (pd.Timestamp, pd.Timedelta)):
        return value.isoformat()
    return str(value)


def _column(column: Any, jsonable: Callable[[Any], Any]) -> list[Any]:
    import numpy as np

    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biufc":
        return list(jsonable(np.asarray(column)))
    return list(column.astype(object))
