"""What a Replica counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbdeploy_server.metrics import BUCKETS, Histogram, Metrics
from prometheus_client.parser import text_string_to_metric_families


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_text_is_prometheus_text() -> None:
    """Every name of the interface is there, with help and type, and parses."""
    metrics = Metrics(1)
    metrics.requests = {200: 3, 422: 1}
    metrics.rejected = {"key": 2}
    metrics.abandoned = {"queued": 1}
    metrics.last_request = 1_795_363_200.0
    for _ in range(3):
        metrics.change(+1)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text())}
    gauges = ("inflight", "inflight_avg10s", "queued", "running", "loop_lag_seconds", "ready_seconds")
    for name in (*gauges, "last_request_timestamp_seconds"):
        assert families[f"nbdeploy_{name}"].type == "gauge"
        assert families[f"nbdeploy_{name}"].documentation
    for name, label in (("requests", "code"), ("rejected", "reason"), ("abandoned", "stage")):
        assert families[f"nbdeploy_{name}"].type == "counter"
        assert all(list(sample.labels) == [label] for sample in families[f"nbdeploy_{name}"].samples)
    for name in ("request_seconds", "queue_seconds", "predict_seconds", "batch_size"):
        assert families[f"nbdeploy_{name}"].type == "histogram"
    value = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert (value["nbdeploy_inflight"], value["nbdeploy_running"], value["nbdeploy_queued"]) == (3, 1, 2)
    assert value["nbdeploy_last_request_timestamp_seconds"] == 1_795_363_200.0


def test_average_is_weighted_by_time() -> None:
    """4 in flight for 5 of 10 seconds are 2 on average, however seldom anybody looks."""
    clock = Clock()
    metrics = Metrics(1, clock)
    for second in range(20):
        clock.now += 1
        metrics.mark()
        if second == 9:
            metrics.change(+4)
        elif second == 14:
            metrics.change(-4)
    assert metrics.average() == pytest.approx(2.0)
    for _ in range(12):
        clock.now += 1
        metrics.mark()
    assert metrics.average() == pytest.approx(0.0)


def test_average_sees_bursts_between_marks() -> None:
    """A burst that begins and ends between two looks counts."""
    clock = Clock()
    metrics = Metrics(1, clock)
    clock.now += 4
    metrics.change(+10)
    clock.now += 1
    metrics.change(-10)
    clock.now += 5
    assert metrics.average() == pytest.approx(1.0)


def test_average_at_the_first_moment() -> None:
    """Before any time has passed the average is the count."""
    metrics = Metrics(1, Clock())
    metrics.change(+2)
    assert metrics.average() == 2.0


@given(st.lists(st.floats(0, 100), max_size=50))
def test_histogram_buckets_are_cumulative(values: list[float]) -> None:
    """Each bucket counts what is at most its bound; the last one counts all."""
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    rows = dict(line.rsplit(" ", 1) for line in histogram.lines("h"))
    for bound in BUCKETS:
        assert int(rows[f'h_bucket{{le="{bound}"}}']) == sum(value <= bound for value in values)
    assert int(rows['h_bucket{le="+Inf"}']) == int(rows["h_count"]) == len(values)
    assert float(rows["h_sum"]) == pytest.approx(sum(values))
