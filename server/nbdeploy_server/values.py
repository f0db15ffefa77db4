"""Values: JSON and wire forms of arrays, tensors, frames and images back to what predict takes."""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Callable
from typing import Any

from nbdeploy_server.forms import leaf_of


def _to_array(value: Any, *, form: dict[str, Any]) -> Any:
    import numpy as np

    dtype = form.get("dtype")
    leaf = leaf_of(type(value))
    if leaf == "tensor":
        value = value.numpy()
    elif leaf in {"frame", "series"}:
        value = value.to_numpy()
    try:
        array = _as_dtype(value, np.dtype(dtype)) if dtype else np.asarray(value)
        if array.dtype.hasobject and dtype != "object":
            raise _UnfitError("its rows have different lengths, or its items are no numbers")
    except _UnfitError as error:
        raise ValueError(f"must be an array of {dtype or 'numbers'} (nested lists in JSON): {error}") from None
    except (ValueError, TypeError, OverflowError):  # their words may show the caller's values
        raise ValueError(
            f"must be an array of {dtype or 'numbers'} (nested lists in JSON): its rows have different lengths, "
            "or its items are something else"
        ) from None
    rank = form.get("rank")
    if rank is not None and array.ndim != rank:
        raise ValueError(f"must have {rank} dimensions, has {array.ndim}")
    return array


class _UnfitError(ValueError):
    """Items that an array of the wanted dtype cannot hold; the message shows no value."""


def _as_dtype(value: Any, wanted: Any) -> Any:
    """Return an array of the wanted dtype; what it cannot hold is refused, never cut or wrapped around."""
    import numpy as np

    if wanted.kind == "O":
        return np.asarray(value, dtype=object)
    array = np.asarray(value)
    if array.dtype.kind == "O" and wanted.kind == "f":
        array = np.asarray(value, dtype=wanted)  # null is how JSON writes NaN
    if array.dtype == wanted or (wanted.kind in "US" and array.dtype.kind == wanted.kind):
        return array  # texts may be longer than the sample's
    numbers = "biufc"
    if array.size and (array.dtype.kind == "O" or (wanted.kind in numbers) != (array.dtype.kind in numbers)):
        raise _UnfitError("its items are something else")
    if array.dtype.kind == "c" and wanted.kind != "c":
        raise _UnfitError("its items are complex")
    with np.errstate(all="ignore"):
        converted = array.astype(wanted)
        if wanted.kind in "iub" and not bool(np.all(converted == array)):
            raise _UnfitError("it has values that this type cannot hold")
    return converted


def _to_tensor(value: Any, *, form: dict[str, Any]) -> Any:
    import torch

    dtype = getattr(torch, form["dtype"]) if form.get("dtype") else None
    if not isinstance(value, torch.Tensor):
        # By way of numpy where numpy has the dtype: it finds ragged rows and is the faster reader of nested lists.
        plain = form.get("dtype") in {"float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
        array = _to_array(value, form={"type": "ndarray", **({"dtype": form["dtype"]} if plain else {})})
        if array.dtype.kind not in "biufc":
            raise ValueError("must be a tensor (nested lists of numbers in JSON)")
        if dtype is None and array.dtype.kind == "f":
            dtype = torch.get_default_dtype()
        value = torch.from_numpy(array.copy())
    if dtype is not None and value.dtype != dtype:
        value = value.to(dtype)
    rank = form.get("rank")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"must have {rank} dimensions, has {value.dim()}")
    return value


def _to_frame(value: Any, *, form: dict[str, Any]) -> Any:
    import pandas as pd

    frame = value if isinstance(value, pd.DataFrame) else _records(value)
    wanted: dict[str, str] = form.get("columns", {})
    missing = [name for name in wanted if name not in {str(column) for column in frame.columns}]
    if missing:
        raise ValueError(f"misses the column {missing[0]!r}")
    for column in frame.columns if frame.columns.is_unique else ():
        dtype = wanted.get(str(column))
        if dtype and dtype != "object" and str(frame[column].dtype) != dtype:
            try:
                frame[column] = frame[column].astype(dtype)
            except (ValueError, TypeError, OverflowError):
                raise ValueError(f"column {column!r} must be {dtype}") from None
    return frame


def _records(value: Any) -> Any:
    import pandas as pd

    if isinstance(value, dict):
        value = [value] if not any(isinstance(item, (list, dict)) for item in value.values()) else value
    if not isinstance(value, (list, dict)):
        raise ValueError("must be a list of records")
    try:
        return pd.DataFrame(value)
    except (ValueError, TypeError):
        raise ValueError("must be a list of records") from None


def _to_series(value: Any, *, form: dict[str, Any]) -> Any:
    import pandas as pd

    if isinstance(value, pd.Series):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a list")
    try:
        return pd.Series(value, dtype=form.get("dtype"))
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"must be a list of {form.get('dtype', 'values')}") from None


def _to_image(value: Any, *, form: dict[str, Any]) -> Any:
    import io

    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            raise ValueError("must be base64 or a data: URL; addresses are never fetched")
        encoded = value.partition(",")[2] if value.startswith("data:") else value
        try:
            value = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise ValueError("must be base64 or a data: URL") from None
    if not isinstance(value, (bytes, bytearray)):
        raise ValueError("must be an image: base64 text in JSON")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(value))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError("is an image of too many pixels") from None
    except Exception:  # noqa: BLE001 - readers of broken files raise anything, SyntaxError included
        raise ValueError("is no image that can be read") from None
    mode = form.get("mode")
    return image.convert(mode) if mode and image.mode != mode else image


RESTORE: dict[str, Callable[..., Any]] = {
    "ndarray": _to_array,
    "tensor": _to_tensor,
    "frame": _to_frame,
    "series": _to_series,
    "image": _to_image,
}
