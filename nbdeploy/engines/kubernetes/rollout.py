"""Follows a roll-out until it is complete, or until it is plain that it will not be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nbdeploy.engines.kubernetes.diagnosis import Finding, Snapshot, complete, diagnose, given_up, newest_pods
from nbdeploy.errors import EngineError

PATIENCE = 300.0  # seconds on end without a fitting node and without one being added, until a roll-out is given up
_TRACEBACK = "Traceback (most recent call last):"
_SHOWN = 8  # lines of a Replica that did not come up
_PRINTS = {"crash", "killed", "module", "versions", "native", "oom", "cuda-memory", "startup"}
_WAITS_FOR_NODE = {"unschedulable", "no-gpu", "gpu-held"}

Say = Callable[[str], None]


def follow(
    snapshots: Iterable[Snapshot],
    say: Say,
    *,
    patience: float = PATIENCE,
    weights: int = 0,
    last_lines: Callable[[str], list[str]] = lambda _pod: [],
) -> None:
    """Return once the roll-out is complete.

    Args:
        snapshots: what `Client.watch` yields.
        say: told what happens, in words, whenever the words change.
        patience: seconds.
        weights: bytes, for words on memory.
        last_lines: gives what a pod printed last.

    Raises:
        EngineError: in the words of the diagnosis, at once where waiting cannot help.
    """
    began = time.monotonic()
    words, finding, waits_since = "", None, 0.0
    for snapshot in snapshots:
        if complete(snapshot):
            return
        finding = diagnose(snapshot, now=time.time(), weights=weights)
        waits_since = (waits_since or time.monotonic()) if finding and finding.row in _WAITS_FOR_NODE else 0.0
        waits = time.monotonic() - waits_since if waits_since else 0.0
        if finding is not None and waits > patience:
            finding = given_up(finding, waits)
        if finding is not None and finding.fatal:
            raise EngineError(finding.words + _printed(finding, last_lines))
        told = finding.words if finding is not None else progress(snapshot)
        if told != words:
            words = told
            say(words)
    reason = finding.words if finding is not None else words
    raise EngineError(f"The roll-out did not come to an end in {(time.monotonic() - began) / 60:.0f} minutes. {reason}")


def _printed(finding: Finding, last_lines: Callable[[str], list[str]]) -> str:
    """Return the Replica's last lines, where the words do not have them already."""
    lines = last_lines(finding.pod) if finding.row in _PRINTS else []
    if "cannot start" in finding.words and _TRACEBACK in lines:  # the words have the reason, and the notebook's lines
        lines = lines[: lines.index(_TRACEBACK)]
    new = [line for line in lines if line.strip() and line.strip() not in finding.words][-_SHOWN:]
    return "".join(["\nIt last printed:", *(f"\n    {line}" for line in new)]) if new else ""


def progress(snapshot: Snapshot) -> str:
    """Say how far the newest Replicas are."""
    steps = [_step(pod, snapshot.events) for pod in newest_pods(snapshot)]
    for words in ("loading the Bundle", "pulling the Image", "starting a container", "waiting for a node"):
        count = steps.count(words)
        if count:
            return f"{words} ({count} replica{'s' if count > 1 else ''})"
    return "waiting for Replicas"


def _step(pod: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> str:
    status = pod.get("status", {})
    containers = status.get("containerStatuses") or []
    if containers and "running" in containers[0].get("state", {}):
        return "" if containers[0].get("ready") else "loading the Bundle"
    if not any(
        row.get("type") == "PodScheduled" and row.get("status") == "True" for row in status.get("conditions", ())
    ):
        return "waiting for a node"
    name = pod["metadata"]["name"]
    reasons = {one.get("reason") for one in events if one.get("involvedObject", {}).get("name") == name}
    return "pulling the Image" if "Pulling" in reasons and "Pulled" not in reasons else "starting a container"


def emptied(snapshots: Iterable[Snapshot]) -> None:
    """Return once no Replica counts as one any more; those that still finish their last requests do not."""
    for snapshot in snapshots:
        status = (snapshot.deployment or {}).get("status", {})
        generation = (snapshot.deployment or {}).get("metadata", {}).get("generation", 0)
        if status.get("observedGeneration", 0) >= generation and not status.get("replicas"):
            return
    raise EngineError("The Replicas did not end in time. `kubectl get pods` shows what holds them.")
