"""Values: JSON and wire forms of arrays, tensors, frames and images back to what predict takes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

from nbdeploy_server.forms import leaf_of


def _to_array(value: Any, *, form: dict[str, Any]) -> Any:
    import numpy as np

    dtype = form.get("dtype")
    if leaf_of(type(value)) == "tensor":
        value = value.numpy()
    elif leaf_of(type(value)) in {"frame", "series"}:
        value = value.to_numpy()
    try:
        array = np.asarray(value)
        if array.dtype.hasobject and dtype != "object":
            raise ValueError("its rows have different lengths")  # noqa: TRY301 - one message for both causes
        if dtype and str(array.dtype) != dtype:
            wanted = np.dtype(dtype)
            if array.dtype.kind not in "biufcmMSU" or (wanted.kind in "biufc") != (array.dtype.kind in "biufc"):
                raise ValueError(f"its items are {array.dtype}")  # noqa: TRY301 - as above
            array = array.astype(wanted)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"must be an array of {dtype or 'numbers'} (nested lists in JSON): {error}") from None
    rank = form.get("rank")
    if rank is not None and array.ndim != rank:
        raise ValueError(f"must have {rank} dimensions, has {array.ndim}")
    return array


def _to_tensor(value: Any, *, form: dict[str, Any]) -> Any:
    import torch

    dtype = getattr(torch, form["dtype"]) if form.get("dtype") else None
    if not isinstance(value, torch.Tensor):
        # By way of numpy where numpy has the dtype: it finds ragged rows and is the faster reader of nested lists.
        plain = form.get("dtype") in {"float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
        array = _to_array(value, form={"type": "ndarray", **({"dtype": form["dtype"]} if plain else {})})
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
            except (ValueError, TypeError) as error:
                raise ValueError(f"column {column!r} must be {dtype}: {error}") from None
    return frame


def _records(value: Any) -> Any:
    import pandas as pd

    if isinstance(value, dict):
        value = [value] if not any(isinstance(item, (list, dict)) for item in value.values()) else value
    if not isinstance(value, (list, dict)):
        raise ValueError("must be a list of records")
    return pd.DataFrame(value)


def _to_series(value: Any, *, form: dict[str, Any]) -> Any:
    import pandas as pd

    if isinstance(value, pd.Series):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a list")
    return pd.Series(value, dtype=form.get("dtype"))


# Pixels a request may unfold to: PIL's own limit warns only, and a small file can hold a huge image.
_MAX_PIXELS = 178_956_970


def _to_image(value: Any, *, form: dict[str, Any]) -> Any:
    import io

    from PIL import Image, UnidentifiedImageError

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
        image = Image.open(io.BytesIO(value))
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"is an image of {image.width} x {image.height}, too large")
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"is no image that can be read: {error}") from None
    mode = form.get("mode")
    return image.convert(mode) if mode and image.mode != mode else image


RESTORE: dict[str, Callable[..., Any]] = {
    "ndarray": _to_array,
    "tensor": _to_tensor,
    "frame": _to_frame,
    "series": _to_series,
    "image": _to_image,
}
