"""How far a Replica is, told to whoever asks from any thread: phase, for how long, and whether its loop still turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

READY, DRAINING = "ready", "draining"
# Seconds without a turn of the event loop after which the process counts as dead. Far above any pause that user code
# can cause by holding the interpreter's lock, since a restart costs a whole load of the model.
STUCK = 60.0


class Progress:
    """Phase of one Replica: starting, checking, loading, warming up, ready, draining.

    Written by the main thread and the loop, read by the probes' threads: what belongs together is one tuple, replaced
    at once, so that no reader sees half of a change and nobody takes a lock.
    """

    def __init__(self, revision: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._revision = revision
        self._state = ("starting", clock(), "")
        self._beat: float | None = None

    def enter(self, phase: str, text: str = "") -> None:
        """Begin a phase; `text` tells a person more about it."""
        self._state = (phase, self._clock(), text)

    def beat(self) -> None:
        """Note that the event loop turns; called by the loop about once a second."""
        self._beat = self._clock()

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._state[0] == READY

    @property
    def stuck(self) -> float:
        """Seconds since the event loop last turned where that is too long, else 0; before it first turns, 0."""
        if self._beat is None:
            return 0.0
        since = self._clock() - self._beat
        return since if since > STUCK else 0.0

    def report(self) -> dict[str, Any]:
        """Return what `/readyz` answers: phase, seconds in it, revision, text."""
        phase, since, text = self._state
        seconds = round(self._clock() - since, 3)
        return {"phase": phase, "seconds": seconds, "revision": self._revision, "text": text}
