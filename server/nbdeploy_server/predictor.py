"""Predictor: a loaded Bundle that answers.

Loading order matters: format and digests are checked before any byte is unpickled; variables are set before the
first import; the notebook's modules stand on sys.path before the skeleton names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdeploy_server import wire
from nbdeploy_server.bundle import Bundle
from nbdeploy_server.decode import Decoder
from nbdeploy_server.errors import LoadFailed
from nbdeploy_server.failure import notebook_lines
from nbdeploy_server.lanes import AsyncLane, Lane, ThreadLane
from nbdeploy_server.seeds import seeded
from nbdeploy_server.signature import Signature

_VARIABLE = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
STREAMING = {"generator", "async_generator"}
ASYNC = {"coroutine", "async_generator"}


@dataclass(frozen=True)
class Predictor:
    """A captured function, bound to its model and ready to be called with a request's arguments.

    Attributes:
        call: the function; takes keyword arguments by Signature.
        kind: "function", "generator", "coroutine" or "async_generator".
        signature: what requests must look like.
        decoder: turns bodies into arguments.
        sample: one request's arguments, as they travel, or None.
        answer: what the notebook answered to it (unpacked), or None.
        seed: random seed of the sample's runs.
        has_answer: whether the notebook's answer is known.
    """

    call: Callable[..., Any]
    kind: str
    signature: Signature
    decoder: Decoder
    sample: bytes | None
    answer: Any
    seed: int
    has_answer: bool

    @property
    def streams(self) -> bool:
        """Whether it is a generator."""
        return self.kind in STREAMING

    def lane(self, concurrency: int) -> Lane:
        """Make the lane for this kind of function; `concurrency` 0 means the kind's default (interface: 1, or 32)."""
        if self.kind in ASYNC:
            return AsyncLane(self.call, concurrency=concurrency or 32, streams=self.streams)
        return ThreadLane(self.call, concurrency=concurrency or 1, streams=self.streams)

    def answer_sample(self, seed: int | None = None) -> Any:
        """Run predict once on the sample, as a request would, and return the answer as it comes off the wire."""
        if self.sample is None:
            raise LoadFailed("There is no sample to run.")
        arguments = self.decoder.message(wire.unpack(self.sample)["arguments"])
        with seeded(self.seed if seed is None else seed):
            return wire.unpack(wire.pack(complete(self.call(**arguments))))


def complete(value: Any) -> Any:
    """Run what predict returned to its end: a generator's items as a list, a coroutine's result."""
    if inspect.isasyncgen(value):

        async def collect() -> list[Any]:
            return [item async for item in value]

        return run_coroutine(collect())
    if inspect.iscoroutine(value):
        return run_coroutine(value)
    if inspect.isgenerator(value):
        return list(value)
    return value


def run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine to its end, also where this thread's loop is running already (a notebook's main thread)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def load(bundle: Bundle, unpacked: Path) -> Predictor:
    """Load a checked Bundle.

    Args:
        bundle: opened and checked.
        unpacked: folder for code and files of this Bundle; shared by all its Replicas, becomes the working directory's
            parent.

    Raises:
        BundleInvalid, LoadFailed: with words for the user.
    """
    manifest = bundle.manifest
    os.environ.update(manifest.variables)
    bundle.unpack_files(unpacked)
    code = unpacked / "code"
    if code.is_dir():
        sys.path.insert(0, str(code))
    for wheel in sorted((unpacked / "wheels").glob("*.whl")):
        sys.path.insert(0, str(_extracted(wheel, unpacked / "installed")))
    bundle.fill_linecache()
    parts = bundle.load()
    how = manifest.predict
    with _told("setting up the model"):
        predict = _bind(parts, how, unpacked)
    signature = Signature.from_json(manifest.signature)
    taken = {p.name for p in inspect.signature(predict).parameters.values() if p.kind not in _VARIABLE}
    has_answer = manifest.answer is not None
    return Predictor(
        call=predict,
        kind=how["kind"],
        signature=signature,
        decoder=Decoder(signature, parts.get("types", {}), reserved=taken),
        sample=bundle.read(manifest.sample) if manifest.sample else None,
        answer=wire.unpack(bundle.read(manifest.answer)) if manifest.answer else None,
        seed=manifest.seed,
        has_answer=has_answer,
    )


def _extracted(wheel: Path, folder: Path) -> Path:
    """Return a wheel's files in a folder: compiled modules and data files cannot be used out of the archive."""
    target = folder / wheel.stem
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)  # refuses no name, but leaves out drives, roots and ".."
        try:
            partial.rename(target)
        except OSError:  # another Replica of this Bundle was first
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextlib.contextmanager
def _told(doing: str) -> Any:
    try:
        yield
    except LoadFailed:
        raise
    except Exception as error:  # the user's own setup or constructor: told in words
        lines = "\n".join(notebook_lines(error))
        raise LoadFailed(f"{type(error).__name__} while {doing}: {error}\n{lines}".rstrip()) from error


def _bind(parts: dict[str, Any], how: Mapping[str, Any], unpacked: Path) -> Callable[..., Any]:
    """Give predict its model: as an argument, or to the constructor of a class in Cortex's style."""
    predict = parts["predict"]
    source = how.get("source", "live")
    has_model = True
    if source == "setup":
        model = run_setup(parts["setup"], unpacked / "model" if (unpacked / "model").is_dir() else None)
    elif source == "folder":
        model = load_folder(unpacked / "model")
    else:
        has_model = "model" in parts
        model = parts.get("model")
    return bind(predict, how, model, has_model=has_model)


def bind(predict: Any, how: Mapping[str, Any], model: Any, *, has_model: bool) -> Callable[..., Any]:
    """Return what a request's keyword arguments are given to."""
    if how["how"] == "class":
        instance = predict(model) if how.get("model") and has_model else predict()
        predict = instance.predict
    elif how["how"] == "argument" and has_model:
        name = how["model"]
        parameter = inspect.signature(predict).parameters[name]
        if parameter.kind is parameter.POSITIONAL_ONLY:
            return _by_position(predict, name, model)
        return functools.partial(predict, **{name: model})
    if any(p.kind is p.POSITIONAL_ONLY for p in inspect.signature(predict).parameters.values()):
        return _by_position(predict, None, None)
    return predict  # type: ignore[no-any-return] # a callable by the capture's check


def _by_position(predict: Callable[..., Any], model_name: str | None, model: Any) -> Callable[..., Any]:
    """Call a function whose first parameters have no keyword."""
    signature = inspect.signature(predict)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY]

    @functools.wraps(predict, assigned=(), updated=())  # its signature tells which names a request cannot use
    def call(**arguments: Any) -> Any:
        if model_name is not None:
            arguments[model_name] = model
        # One that is left out before one that is given needs its default: positions have no gaps.
        given = [arguments.pop(p.name, p.default) for p in positional]
        return predict(*given, **arguments)

    return call


def run_setup(setup: Callable[..., Any], folder: Path | None) -> Any:
    """Run --setup; with --model-from it may take the folder as its one argument."""
    takes = [p for p in inspect.signature(setup).parameters.values() if p.default is p.empty and p.kind not in {2, 4}]
    value = setup(folder) if folder is not None and takes else setup()
    return run_coroutine(value) if inspect.iscoroutine(value) else value


def load_folder(folder: Path) -> Any:
    """Make the model of a --model-from folder: what a hub's own library would make, else the folder's path."""
    if (folder / "modules.json").is_file() and (folder / "config_sentence_transformers.json").is_file():
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found] # the user brings it

        return SentenceTransformer(str(folder))
    task = pipeline_task(folder)
    if task is None:
        return folder
    from transformers import pipeline

    return pipeline(task, model=str(folder))


# The suffix of a transformers architecture tells its pipeline (transformers' own Auto classes are named by it).
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
}


def pipeline_task(folder: Path) -> str | None:
    """Return the transformers pipeline for a hub-shaped folder, or None if it is no such folder."""
    import msgspec

    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        data = msgspec.json.decode(config.read_bytes())
    except msgspec.DecodeError:
        return None
    architectures: Iterable[str] = data.get("architectures") or () if isinstance(data, dict) else ()
    for name in architectures:
        for suffix, task in _TASKS.items():
            if name.endswith(suffix):
                return task
    return "feature-extraction" if architectures else None
