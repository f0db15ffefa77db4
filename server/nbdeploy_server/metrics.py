"""What a Replica counts, and its Prometheus text.

One process, plain numbers, no locks: everything is written from the event loop. The gauges are made at the HTTP edge,
before any queue, because `nbdeploy_inflight` is the signal that autoscaling follows.
"""

from __future__ import annotations

import bisect
import collections
import os
import resource
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from nbdeploy_server import gpu

# Seconds. From a small numpy call to a long generation; Prometheus' own defaults start too late for the former.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
WINDOW = 10  # seconds of `nbdeploy_inflight_avg10s`: a 15 s scrape of a bare gauge misses bursts


class Histogram:
    """Counts per bucket and a sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value (seconds, or items)."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """Return the Prometheus lines."""
        sums = list(accumulate(self.counts))
        rows = [f'{name}_bucket{{le="{bound}"}} {n}' for bound, n in zip(self.bounds, sums, strict=False)]
        return [*rows, f'{name}_bucket{{le="+Inf"}} {sums[-1]}', f"{name}_sum {self.total}", f"{name}_count {sums[-1]}"]


class Metrics:
    """Everything a Replica measures; `inflight` is running plus queued work, answered or not."""

    def __init__(self, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.concurrency = concurrency
        self.gpus = 0  # that this Replica was given
        self._clock = clock
        self.inflight = 0
        self.requests: dict[int, int] = {}
        self.rejected: dict[str, int] = {}
        self.abandoned: dict[str, int] = {}
        self.request_seconds = Histogram()
        self.queue_seconds = Histogram()
        self.predict_seconds = Histogram()
        self.batch_size = Histogram(BATCH_BUCKETS)
        self.loop_lag = 0.0
        self.ready_seconds = 0.0
        self.last_request = 0.0
        self._area = 0.0
        self._since = clock()
        self._marks: collections.deque[tuple[float, float]] = collections.deque([(self._since, 0.0)])

    def change(self, by: int) -> int:
        """Move the in-flight count and return it."""
        now = self._clock()
        self._area += self.inflight * (now - self._since)
        self._since = now
        self.inflight += by
        return self.inflight

    def mark(self) -> None:
        """Remember the area under the in-flight curve; called about once a second."""
        self.change(0)
        self._marks.append((self._since, self._area))
        while len(self._marks) > 2 and self._since - self._marks[1][0] >= WINDOW:  # noqa: PLR2004 - keep two ends
            self._marks.popleft()

    def average(self) -> float:
        """Return the time-weighted in-flight count of the last 10 s."""
        self.change(0)
        when, area = self._marks[0]
        span = self._since - when
        return (self._area - area) / span if span > 0 else float(self.inflight)

    def text(self) -> str:
        """Return the Prometheus text exposition; like all of this class, on the event loop."""
        return self.counted() + machine_text(self.gpus)

    def counted(self) -> str:
        """Return the part of the text that is counted here."""
        queued = max(0, self.inflight - self.concurrency)
        gauges: list[tuple[str, str, float]] = [
            ("nbdeploy_inflight", "Requests accepted and not finished: running and queued.", self.inflight),
            ("nbdeploy_inflight_avg10s", "Time-weighted mean of nbdeploy_inflight over 10 s.", self.average()),
            ("nbdeploy_queued", "Requests that wait for the model.", queued),
            ("nbdeploy_running", "Requests in the model.", self.inflight - queued),
            ("nbdeploy_capacity", "Requests that can run at once.", self.concurrency),
            ("nbdeploy_loop_lag_seconds", "How late the event loop was, worst of the last second.", self.loop_lag),
            ("nbdeploy_ready_seconds", "From process start to ready.", self.ready_seconds),
            ("nbdeploy_last_request_timestamp_seconds", "Unix time of the last request.", self.last_request),
        ]
        out: list[str] = []
        for name, help_, value in gauges:
            out += [f"# HELP {name} {help_}", f"# TYPE {name} gauge", f"{name} {value:.10g}"]
        for name, label, help_, rows in (
            ("nbdeploy_requests", "code", "Answered requests.", self.requests),
            ("nbdeploy_rejected", "reason", "Requests refused before the model.", self.rejected),
            ("nbdeploy_abandoned", "stage", "Requests whose caller left.", self.abandoned),
        ):
            out += [f"# HELP {name}_total {help_}", f"# TYPE {name}_total counter"]
            out += [f'{name}_total{{{label}="{key}"}} {count}' for key, count in sorted(rows.items(), key=str)]
        for name, help_, histogram in (
            ("nbdeploy_request_seconds", "Whole request.", self.request_seconds),
            ("nbdeploy_queue_seconds", "Waiting for the model.", self.queue_seconds),
            ("nbdeploy_predict_seconds", "In the model.", self.predict_seconds),
            ("nbdeploy_batch_size", "Requests answered by one call.", self.batch_size),
        ):
            out += [f"# HELP {name} {help_}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(out) + "\n"


def machine_text(gpus: int = 0) -> str:
    """Return the text on what this process uses: memory, and the GPUs; from any thread, as asking a GPU may wait."""
    rows: list[gpu.Gauge] = [("nbdeploy_memory_bytes", "Resident memory of this process.", [("", memory())])]
    out: list[str] = []
    for name, help_, values in [*rows, *gpu.gauges(gpus)]:
        out += [f"# HELP {name} {help_}", f"# TYPE {name} gauge"]
        out += [f"{name}{{{labels}}} {value:.10g}" if labels else f"{name} {value:.10g}" for labels, value in values]
    return "\n".join(out) + "\n"


def memory() -> float:
    """Return the resident memory of this process in bytes; of weights mapped from disk, what was touched counts."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        return pages * float(os.sysconf("SC_PAGE_SIZE"))
    except OSError:  # no Linux: the most it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
