"""The live run: predict answers the sample once in the notebook, on arguments that went over the wire and back."""

from __future__ import annotations

import inspect
import re
import traceback
from dataclasses import dataclass
from typing import Any

from nbdeploy_server import wire
from nbdeploy_server.decode import Decoder
from nbdeploy_server.errors import RequestError
from nbdeploy_server.predictor import complete
from nbdeploy_server.seeds import seeded
from nbdeploy_server.signature import Signature

from nbdeploy.errors import SampleError

SEED = 0


@dataclass(frozen=True)
class LiveRun:
    """What the notebook answered.

    Attributes:
        answer: packed for the wire.
        value: the same, unpacked: as `connect` will return it.
        kind: what predict turned out to be: "function", "generator", "coroutine" or "async_generator".
    """

    answer: bytes
    value: Any
    kind: str


def plain(value: Any) -> Any:
    """Return a sample with Python's own numbers in place of numpy's: that is how a request will bring them."""
    if type(value) in {list, tuple}:
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar and type(value).__name__ != "ndarray" else value


def pack_sample(arguments: dict[str, Any]) -> bytes:
    """Return the sample as it travels; raises SampleError naming an argument that cannot be sent."""
    for name, value in arguments.items():
        try:
            wire.pack(value)
        except wire.WireError as error:
            place, _, what = str(error).partition(";")[0].partition(": ")
            raise SampleError(
                f"The sample's {name}{place.removeprefix('answer')} cannot be sent over HTTP: {what or error}. Take "
                "numbers, texts, lists, dicts, arrays, tensors, frames or images as input, and build the rest inside "
                "predict."
            ) from error
    return wire.pack({"arguments": arguments})


def decoded(signature: Signature, types: dict[str, Any], sample: bytes) -> dict[str, Any]:
    """Return the arguments as a Replica will decode them."""
    try:
        return Decoder(signature, types).message(wire.unpack(sample)["arguments"])
    except RequestError as error:
        raise SampleError(
            f"The sample does not fit predict's own annotations: {error.detail} Correct the annotation or the sample."
        ) from error


def run(call: Any, arguments: dict[str, Any]) -> LiveRun:
    """Run predict once with fixed seeds.

    Raises:
        SampleError: predict raised, or its answer cannot be sent.
    """
    try:
        with seeded(SEED):
            returned = call(**arguments)
            kind = _kind(returned)
            value = complete(returned)
    except (Exception, SystemExit) as error:
        raise SampleError(
            f"predict fails here in the notebook, before anything is deployed: {told(error)}. It was called with the "
            f"sample: {preview(arguments) or 'no arguments'}. Correct predict, or give another request with --sample."
        ) from error
    try:
        packed = wire.pack(value)
    except wire.WireError as error:
        raise SampleError(f"What predict returns cannot be sent over HTTP: {error}.") from error
    return LiveRun(packed, wire.unpack(packed), kind)


def _kind(returned: Any) -> str:
    if inspect.isasyncgen(returned):
        return "async_generator"
    if inspect.iscoroutine(returned):
        return "coroutine"
    return "generator" if inspect.isgenerator(returned) else "function"


def told(error: BaseException) -> str:
    """Return the user's own error as the notebook would show it in a line, with the line of the cell."""
    said = without_addresses(str(error)).strip()
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_cell(frame.filename):
            where = f"line {frame.lineno} of its cell, in {frame.name}"
            return f"{words} ({where}: {frame.line})" if frame.line else f"{words} ({where})"
    return words.rstrip(".")


def is_cell(filename: str) -> bool:
    """Whether code of this file name was typed into a notebook or console."""
    return "ipykernel_" in filename or filename.startswith(("<ipython-input", "<stdin"))


def without_addresses(text: str) -> str:
    """Leave out memory addresses: they differ from run to run and tell nobody anything."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"<{type(value).__name__} {tuple(shape)}>"
    text = without_addresses(repr(value))
    return text if len(text) <= 60 else text[:57] + "…"  # noqa: PLR2004 - what fits in a line


def preview(arguments: dict[str, Any]) -> str:
    """Return the sample in a line, for the card."""
    return ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())
