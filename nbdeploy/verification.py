"""Runs a Bundle's sample in a clean process: in the kernel's environment, or in one installed from the lock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.errors import VerificationError
from nbdeploy.jobs import Job
from nbdeploy.process import Identity, clean_environment, ends_within, kernel_path, launch

TIMEOUT = 1800.0  # seconds for the clean process; a first compile of a large model takes long


@dataclass(frozen=True)
class Place:
    """An environment to verify in.

    Attributes:
        python: the interpreter.
        path: its sys.path.
    """

    python: str
    path: Sequence[str]


def kernel_place(folder: str) -> Place:
    """Return the kernel's own environment, without the notebook's folder."""
    return Place(sys.executable, kernel_path([Path(folder)] if folder else []))


def clean_run(job: Job, bundle: Bundle, place: Place, variables: Sequence[str]) -> dict[str, Any]:
    """Run nbdeploy_server.verify in a clean process and return its report.

    Args:
        job: owns the process, so that cancelling the Job ends it.
        bundle: what is verified.
        place: where.
        variables: names of the environment's variables that it may see beside the allowed ones.

    Raises VerificationError where the process dies or takes too long.
    """
    result = job.folder / f"verify-{time.monotonic_ns()}.json"
    unpacked = job.folder / "unpacked"
    log = job.folder / "verify.log"
    argument = {
        "store": str(bundle.store.root),
        "bundle": bundle.digest,
        "unpacked": str(unpacked),
        "result": str(result),
    }
    with log.open("ab") as output:
        process = launch(
            "nbdeploy_server.verify:main",
            argument,
            path=list(place.path),
            environment={**clean_environment(os.environ, variables), **bundle.secrets},
            folder=job.folder,
            output=output,
            python=place.python,
        )
    try:
        job.record_child(Identity.of(process.pid))
        import httpx  # noqa: F401 - the real request needs it later; now this process only waits

        if not ends_within(process, TIMEOUT):
            raise VerificationError(
                f"The clean process did not answer the sample within {TIMEOUT / 60:.0f} minutes. "
                "Deploy with --no-verify, or give a smaller --sample."
            )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        job.record_child(None)
        shutil.rmtree(unpacked, ignore_errors=True)
    if not result.exists():
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise VerificationError(
            f"The clean process that checks the Bundle died (status {process.returncode}). It last printed:\n{last}"
        )
    return dict(json.loads(result.read_text(encoding="utf-8")))
