"""The port for probes and numbers of a Replica in a container."""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from nbdeploy_server.metrics import Metrics, machine_text
from nbdeploy_server.probes import Probes
from nbdeploy_server.progress import DRAINING, READY, STUCK, Progress
from nbdeploy_server.sockets import bind
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import wait_until
from tests.server.containers import GATE, SLEEP

if TYPE_CHECKING:
    from pathlib import Path


def test_probes_are_up_before_the_model(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """While the model loads, it is alive and not ready, tells its phase, and the users' port refuses."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle(GATE, PATH=str(gate)), revision=2)
    wait_until(lambda: one.phase() == "loading")
    assert one.probe("/livez").status_code == 200
    refused = one.probe("/readyz")
    assert (refused.status_code, refused.json()["revision"]) == (503, 2)
    assert "nbdeploy_memory_bytes" in one.probe("/metrics").text
    assert one.probe("/else").status_code == 404
    with pytest.raises(httpx.ConnectError):
        one.post({"x": 1})
    gate.write_text("opened ", encoding="utf-8")
    assert one.ready().post({"x": 1}).json() == "opened 1"


def test_predict_does_not_hold_the_probes(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """Probes and numbers come while predict runs, and count it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle("def predict(path: str) -> str:\n    return open(path).read()\n"), timeout=60.0).ready()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.post, {"path": str(gate)})
        try:
            wait_until(lambda: "\nnbdeploy_inflight 1\n" in one.probe("/metrics").text)
            assert one.probe("/livez").status_code == 200
            assert one.probe("/readyz").status_code == 200
            assert not call.done()
        finally:
            gate.write_text("opened", encoding="utf-8")
        assert call.result().json() == "opened"
    families = {family.name: family for family in text_string_to_metric_families(one.metrics())}
    assert families["nbdeploy_requests"].samples[0].value == 1
    assert families["nbdeploy_memory_bytes"].samples[0].value > 10e6


def test_scrapes_at_once_are_each_whole(bundle: Any, begin: Any) -> None:
    """Scraped from many sides under load, every text parses, and the counts of a histogram agree with themselves."""
    one = begin(bundle(SLEEP), queue=100).ready()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(trust_env=False) as client:
            while not stop.is_set():
                assert client.post(f"http://127.0.0.1:{one.port}/predict", json={"seconds": 0}).status_code == 200

    def scrape() -> None:
        for _ in range(20):
            families = {f.name: f for f in text_string_to_metric_families(one.metrics())}
            samples = {
                s.name + str(s.labels.get("le", "")): s.value for s in families["nbdeploy_request_seconds"].samples
            }
            assert samples["nbdeploy_request_seconds_bucket+Inf"] == samples["nbdeploy_request_seconds_count"]
            answered = sum(s.value for s in families["nbdeploy_requests"].samples)
            assert answered == samples["nbdeploy_request_seconds_count"]

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for done in [pool.submit(scrape) for _ in range(4)]:
            done.result()
        stop.set()
        for done in asking:
            done.result()


def test_progress_and_stuck_loops() -> None:
    """Phases are timed; a loop that does not turn for a minute fails /livez, one that never began does not."""
    now = [100.0]
    progress = Progress(7, lambda: now[0])
    with bind("127.0.0.1", 0, "ANY") as sock:
        probes = Probes(sock, progress, lambda: "text")
        try:
            now[0] += STUCK + 1
            assert probes.answer("/livez")[0] == 200
            progress.beat()
            progress.enter(READY, "all well")
            now[0] += 5
            assert json.loads(probes.answer("/readyz")[2]) == {
                "phase": "ready", "seconds": 5.0, "revision": 7, "text": "all well",
            }  # fmt: skip
            assert (probes.answer("/livez")[0], probes.answer("/readyz")[0], progress.ready) == (200, 200, True)
            now[0] += STUCK
            assert probes.answer("/livez")[0] == 503
            progress.beat()
            progress.enter(DRAINING)
            assert (probes.answer("/livez")[0], probes.answer("/readyz")[0]) == (200, 503)

            def late() -> str:
                raise TimeoutError

            probes.scrape = late
            assert probes.answer("/metrics")[0] == 503
        finally:
            probes.close()


def test_a_slow_prober_does_not_hold_the_next() -> None:
    """A connection that asks nothing keeps nobody from asking."""
    with bind("127.0.0.1", 0, "ANY") as sock:
        probes = Probes(sock, Progress(1), lambda: "text")
        try:
            with socket.create_connection(("127.0.0.1", probes.port)):
                assert httpx.get(f"http://127.0.0.1:{probes.port}/metrics", trust_env=False).text == "text"
        finally:
            probes.close()


def test_memory_is_told() -> None:
    """The resident memory follows what the process holds."""
    before = next(iter(text_string_to_metric_families(machine_text()))).samples[0]
    with mmap.mmap(-1, 50_000_000) as held:  # pages of its own: bytes may come to lie in memory that others gave back
        for at in range(0, len(held), mmap.PAGESIZE):
            held[at] = 1
        after = next(iter(text_string_to_metric_families(machine_text()))).samples[0]
        assert before.name == "nbdeploy_memory_bytes"
        assert after.value - before.value > 0.8 * len(held)
    assert "nbdeploy_memory_bytes" in Metrics(1).text()
