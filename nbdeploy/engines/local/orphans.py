"""Processes that user code starts and detaches: on Linux they become the supervisor's, so that none outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt() -> None:
    """Make this process the parent of orphans among its descendants; nothing elsewhere than on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(known: Iterable[int]) -> None:
    """Take the exit status of adopted processes that have ended; those known are waited for elsewhere."""
    for pid in set(_children()) - set(known):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def end() -> None:
    """Kill every child, and in turn what it leaves behind."""
    for _ in range(100):  # each round may uncover children of those that were killed; a fork bomb ends somewhere
        children = _children()
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    """Return the pids of this process's children (field 4 of proc(5), stat; not every kernel has task/children)."""
    found: list[int] = []
    mine = str(os.getpid())
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            if stat.rpartition(")")[2].split()[1] == mine:
                found.append(int(folder.name))
    return found
