"""What a diagnosis looks at and what it says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

_LINES = 8  # of a Replica's last words


@dataclass(frozen=True)
class Finding:
    """One thing that keeps an Endpoint from being ready.

    Attributes:
        row: which one, for programs: "quota", "no-gpu", "oom", …
        words: cause, object and next step, for a data scientist.
        fatal: waiting cannot help.
        pod: name of the pod, or "".
        cause, way_out: of a wait for a node: why none fits, and what to do once it is not waited for any longer.
    """

    row: str
    words: str
    fatal: bool
    pod: str = ""
    cause: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class Case:
    """One pod of an Endpoint.

    Attributes:
        name: of the Endpoint.
        pod: as the API server gives it.
        events: those that concern this pod, oldest first.
        now: Unix seconds.
        weights: bytes, 0 where not known.
        holders: old Replicas of this Endpoint that hold GPUs.
    """

    name: str
    pod: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    now: float
    weights: int = 0
    holders: tuple[str, ...] = ()

    @property
    def pod_name(self) -> str:
        """Name of the pod."""
        return str(self.pod["metadata"]["name"])

    @property
    def status(self) -> Mapping[str, Any]:
        """Status of the pod."""
        return self.pod.get("status") or {}

    @property
    def container(self) -> Mapping[str, Any]:
        """The server's container as asked for."""
        return dict((self.pod.get("spec") or {}).get("containers", [{}])[0])

    @property
    def state(self) -> Mapping[str, Any]:
        """Status of the server's container, {} before there is one."""
        return dict((self.status.get("containerStatuses") or [{}])[0])

    @property
    def waiting(self) -> tuple[str, str]:
        """Reason and message for which the container waits, "" for none."""
        waiting = (self.state.get("state") or {}).get("waiting") or {}
        return waiting.get("reason", ""), waiting.get("message", "")

    def asked(self, resource: str) -> str:
        """Return how much of a resource the Replica asks for, as Kubernetes writes it."""
        resources = self.container.get("resources") or {}
        return str({**resources.get("limits", {}), **resources.get("requests", {})}.get(resource, ""))

    def event(self, *reasons: str) -> Mapping[str, Any] | None:
        """Return the newest event with one of these reasons."""
        return next((event for event in reversed(self.events) if event.get("reason") in reasons), None)

    def found(self, row: str, words: str, *, fatal: bool) -> Finding:
        """Return a finding on this pod."""
        return Finding(row, words, fatal, self.pod_name)

    def waits(self, row: str, cause: str, meanwhile: str, way_out: str) -> Finding:
        """Return the finding that this pod waits for a node; `meanwhile` is what is said while it does."""
        return Finding(row, f"{cause} {meanwhile}", False, self.pod_name, cause, way_out)


def condition(thing: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return a condition of an object's status, {} where there is none."""
    rows: Iterable[Mapping[str, Any]] = (thing.get("status") or {}).get("conditions") or ()
    return next((row for row in rows if row.get("type") == kind), {})


def seconds(text: str | None) -> float:
    """Return a timestamp of the API server as Unix seconds, 0.0 for none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def times(event: Mapping[str, Any]) -> int:
    """Return how often an event happened."""
    return int(event.get("count") or (event.get("series") or {}).get("count") or 1)


def quoted(message: str) -> str:
    """Return the last lines of what a program printed, each indented below the sentence before."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    return "".join(f"\n    {line}" for line in lines[-_LINES:])


def sentence(message: str) -> str:
    """Return a message of Kubernetes on one line, without generated ids, with a full stop."""
    text = re.sub(r"\s+", " ", re.sub(r" ?\(pod: [^)]*\)", "", message)).strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
