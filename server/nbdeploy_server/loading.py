"""From a Bundle to a front that is ready to serve: what every kind of Replica does before it takes a request."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nbdeploy_server import gpu, parity, restore
from nbdeploy_server.bundle import Bundle
from nbdeploy_server.errors import LoadFailed
from nbdeploy_server.failure import notebook_lines
from nbdeploy_server.front import Front
from nbdeploy_server.metrics import Metrics
from nbdeploy_server.predictor import Predictor, load
from nbdeploy_server.settings import ReplicaSettings


def prepare(settings: ReplicaSettings, tell: Callable[[str, str], None]) -> Front:
    """Check and load the Bundle, answer its sample, and return the front.

    Args:
        settings: of the Replica.
        tell: told each phase as it begins, and a text on it.

    Raises:
        BundleInvalid, LoadFailed: with words for the user; besides these whatever the user's code raises.
    """
    bundle = Bundle.open(Path(settings.store), settings.bundle)
    bundle.check_platform()
    tell("checking", "checking the Bundle")
    bundle.check(full=False)
    tell("loading", "loading")
    unpacked = Path(settings.unpacked)
    predictor = load(bundle, unpacked)
    folder = unpacked / "files"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    notes = [gpu.note(restore.lacking, settings.gpus)]
    if predictor.sample is not None:
        tell("warming up", "warming up")
        notes.append(_warm_up(predictor))
    lane = predictor.lane(settings.concurrency)
    metrics = Metrics(lane.concurrency)
    metrics.gpus = settings.gpus
    front = Front(predictor, lane, settings, metrics)
    for note in filter(None, notes):
        print(f"nbdeploy: {note}", file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
    front.note = "; ".join(filter(None, notes))
    gc.collect()
    gc.freeze()  # the model is not garbage: collections need not walk it
    return front


def _warm_up(predictor: Predictor) -> str:
    """Answer the sample before serving; with a known answer, return in words where this Replica's differs."""
    try:
        answer = predictor.answer_sample()
    except Exception as error:
        lines = "\n".join(notebook_lines(error))
        raise LoadFailed(f"predict raised {type(error).__name__} on the sample: {error}\n{lines}".rstrip()) from error
    if predictor.has_answer:
        found = parity.compare(predictor.answer, answer, loose=True)
        if not found.equal:
            return f"the warm-up answered {found.reason} at {found.path or 'the answer'}"
    return ""
