"""Verification: a clean process loads the Bundle, answers the sample, and compares with the notebook's answer."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nbdeploy_server import parity
from nbdeploy_server.bundle import Bundle
from nbdeploy_server.errors import ServerError
from nbdeploy_server.failure import notebook_lines
from nbdeploy_server.predictor import Predictor, load

OTHER_SEED = 20_260_101  # any number that is not the sample's seed
SLOW = 5.0  # seconds: a predict that takes longer is not run again only to see whether it is deterministic


def main(argument: dict[str, Any]) -> None:
    """Entry of the clean process: {"store", "bundle", "unpacked", "result"}; writes one JSON report to `result`."""
    report: dict[str, Any] = {"ok": False, "stage": "open", "seconds": {}}
    try:
        _verify(argument, report)
        report["ok"] = True
    except BaseException as error:  # noqa: BLE001 - sys.exit and KeyboardInterrupt in user code are failures to report too
        report["reason"] = str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
        report["lines"] = list(notebook_lines(error))
    report["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    partial = Path(argument["result"] + ".partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.rename(argument["result"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that the user's code left behind must not hold the report back


def _verify(argument: dict[str, Any], report: dict[str, Any]) -> None:
    began = time.perf_counter()

    def mark(stage: str) -> None:
        nonlocal began
        now = time.perf_counter()
        report["seconds"][report["stage"]] = round(now - began, 4)
        report["stage"], began = stage, now

    bundle = Bundle.open(Path(argument["store"]), argument["bundle"])
    bundle.check_platform()
    bundle.check(full=False, weights=False)
    # Weights cannot run code, so they may be hashed while the first imports run on the other core.
    problem: list[BaseException] = []
    hashing = threading.Thread(target=_check_all, args=(bundle, problem), name="digests")
    hashing.start()
    mark("load")
    unpacked = Path(argument["unpacked"])
    try:
        predictor = load(bundle, unpacked)
    finally:
        hashing.join()
        if problem:
            raise problem[0]
    folder = unpacked / "files"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    report["model"] = _trains(predictor)
    mark("predict")
    if predictor.sample is not None:
        answer = predictor.answer_sample()
        mark("repeat")
        _compare(predictor, answer, report)
    mark("done")


def _check_all(bundle: Bundle, problem: list[BaseException]) -> None:
    try:
        bundle.check(full=True)
    except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
        problem.append(error)


def _compare(predictor: Predictor, answer: Any, report: dict[str, Any]) -> None:
    """Compare with the notebook's answer, and with itself: once more with the same seed, once with another."""
    found = parity.compare(predictor.answer, answer) if predictor.has_answer else None
    if found is not None:
        report["parity"] = {
            "equal": found.equal,
            "max_difference": found.max_difference,
            "path": found.path,
            "expected": found.expected,
            "actual": found.actual,
            "reason": found.reason,
        }
    report["runs"], report["deterministic"] = 1, True
    if report["seconds"]["predict"] < SLOW:
        report["deterministic"] = parity.compare(answer, predictor.answer_sample(OTHER_SEED)).equal
        report["runs"] = 2
    if not report["deterministic"] or (found is not None and not found.equal):
        again = predictor.answer_sample()
        report["runs"] += 1
        report["same_seed_same_answer"] = parity.compare(answer, again).equal


def _trains(predictor: Predictor) -> dict[str, Any]:
    """Whether a torch module with dropout is in train mode, anywhere predict holds one directly."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "nn"):
        return {}
    call = predictor.call
    held = list(getattr(call, "keywords", {}).values())
    held += list(getattr(getattr(call, "func", call), "__globals__", {}).values())
    held += list(vars(call).values()) if hasattr(call, "__dict__") else []
    modules = [value for value in held if isinstance(value, torch.nn.Module)]
    held_inside = [member for value in held if hasattr(value, "__dict__") for member in vars(value).values()]
    modules += [value for value in held_inside if isinstance(value, torch.nn.Module)]
    return {"train_mode": any(module.training for module in modules), "modules": len(modules)}
