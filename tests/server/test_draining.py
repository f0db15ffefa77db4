"""How a Replica in a container leaves: no request is lost, nobody keeps it for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from nbdeploy_server import listening
from nbdeploy_server.protocol import NEW

from tests.conftest import wait_until
from tests.server.callers import Caller, Switch
from tests.server.containers import ADD, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.containers import Container

TICKS = (
    "import time\ndef predict(count: int, wait: float):\n"
    "    for number in range(count):\n        time.sleep(wait)\n        yield number\n"
)
# From a pipe, so that a call takes as long as the test says.
READS = "def predict(path: str) -> int:\n    return len(open(path).read()) if path else 0\n"


@pytest.mark.slow
def test_a_handover_loses_no_request(bundle: Any, begin: Any) -> None:
    """16 keep-alive callers that never try again see no failure when one Replica leaves and another takes over."""
    made_of = bundle(ADD.replace("    print('asked for', x)\n", ""))
    old, new = (
        begin(made_of, queue=100, revision=number, environment={"NBDEPLOY_DRAIN_SECONDS": "5"}) for number in (1, 2)
    )
    old.ready()
    switch = Switch()
    switch.target = old.port
    stop = threading.Event()

    def call(number: int) -> tuple[int, int]:
        caller, count = Caller(switch.port), 0
        while not stop.is_set():
            assert caller.ask(b'{"x": %d}' % number) == (200, b"%d" % (number + 1))
            count += 1
            if number % 4 == 0:
                stop.wait(0.02)  # some ask seldom: their connections are idle most of the time
        caller.close()
        return count, caller.connections

    with ThreadPoolExecutor(17) as pool:
        calls = [pool.submit(call, number) for number in range(16)]
        new.ready()
        left = pool.submit(old.end)
        wait_until(lambda: old.phase() == "draining")
        refused = old.probe("/readyz")
        assert (refused.status_code, old.probe("/livez").status_code) == (503, 200)
        assert old.post({"x": 1}).headers["connection"] == "close"  # routers do not know yet: it still serves
        switch.target = new.port
        assert left.result() == 0
        stop.set()
        results = [one.result() for one in calls]
    switch.close()
    assert sum(count for count, _ in results) > 100
    assert all(connections >= 2 for _, connections in results)


def test_what_runs_is_finished_and_who_only_waits_is_let_go(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """Told twice, the wait for routers ends: idle connections close, nobody new is taken, the running answer comes."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle(READS), concurrency=2, environment={"NBDEPLOY_DRAIN_SECONDS": "600"}).ready()
    idle = socket.create_connection(("127.0.0.1", one.port), timeout=30)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.post, {"path": str(gate)})
        wait_until(lambda: "\nnbdeploy_inflight 1\n" in one.probe("/metrics").text)
        one.process.send_signal(signal.SIGTERM)
        wait_until(lambda: one.phase() == "draining")
        assert one.post({"path": ""}).headers["connection"] == "close"
        one.process.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""
        with pytest.raises(httpx.ConnectError):
            one.post({"path": ""})
        gate.write_text("four", encoding="utf-8")
        answer = call.result()
        assert (answer.json(), answer.headers["connection"]) == (4, "close")
    assert one.process.wait(30) == 0
    idle.close()


def test_half_a_request_is_waited_for(bundle: Any, begin: Any) -> None:
    """A request whose first bytes came before the listener closed is answered."""
    one = begin(bundle(ADD)).ready()
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as sock:
        sock.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\n")
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(one.end)
            wait_until(lambda: one.phase() == "draining")
            sock.sendall(b'content-length: 8\r\n\r\n{"x": 1}')
            assert b"200 OK" in until(sock, b"\r\n\r\n")
            assert left.result() == 0


def test_a_refused_body_is_still_answered_while_draining(bundle: Any, begin: Any) -> None:
    """413 before the body has come is read by its caller, and not reset away by the closing connection."""
    one = begin(bundle(ADD), max_body=1000, environment={"NBDEPLOY_DRAIN_SECONDS": "600"}).ready()
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: one.phase() == "draining")
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as sock:
        sock.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n")
        assert b" 413 " in until(sock, b'reads."}')
        sock.sendall(b" " * 3_000_000)
        sock.sendall(b'POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n{"x": 1}')
        assert b"connection: close" in until(sock, b"\r\n\r\n")


def test_a_stream_ends_before_its_replica(bundle: Any, begin: Any) -> None:
    """A stream under way when the Replica leaves comes whole."""
    one = begin(bundle(TICKS)).ready()
    url, asked = f"http://127.0.0.1:{one.port}/predict", {"count": 5, "wait": 0.2}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", url, json=asked, headers={"accept": "application/x-ndjson"}, trust_env=False) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        left = pool.submit(one.end)
        assert [first, *lines] == ["0", "1", "2", "3", "4"]
        assert left.result() == 0


def test_ctrl_c_ends_it(bundle: Any, begin: Any) -> None:
    """By hand, an interrupt drains without waiting for routers."""
    one = begin(bundle(ADD), environment={"NBDEPLOY_DRAIN_SECONDS": "600"}).ready()
    assert one.end(signal.SIGINT) == 0


def knock(one: Container, enough: Callable[[], bool]) -> tuple[float, float]:
    """Call on new connections until `enough`, or until one is not taken; each one that is taken must be answered.

    Returns:
        Monotonic time of the last answer, and the longest time between two connections, in seconds.
    """
    last = began = time.monotonic()
    gap = 0.0
    while not enough():
        now = time.monotonic()
        gap, began = max(gap, now - began), now
        caller = Caller(one.port)
        try:
            assert caller.ask(b'{"x": 1}') == (200, b"2")
        except ConnectionError:  # the one that comes just as the listener closes may be reset instead of refused
            break
        finally:
            caller.close()
        last = time.monotonic()
    return last, max(gap, time.monotonic() - began)


@pytest.mark.slow
def test_it_listens_for_as_long_as_callers_come(bundle: Any, begin: Any) -> None:
    """Callers whom a router still sends here are answered beyond the drain's time, but not for ever."""
    one = begin(bundle(ADD), environment={"NBDEPLOY_DRAIN_SECONDS": "1"}).ready()
    one.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    last, gap = knock(one, lambda: time.monotonic() - told > 60)
    assert last - told < 60
    assert gap > listening.QUIET / 2 or last - told > listening.LONGEST - 0.5  # a starved test calls too seldom
    assert one.process.wait(60) == 0


@pytest.mark.slow
def test_it_ends_soon_after_the_last_caller(bundle: Any, begin: Any) -> None:
    """Once nobody comes any more it stops listening and ends, and does not wait for the longest time."""
    drain = 4.0
    one = begin(bundle(ADD), environment={"NBDEPLOY_DRAIN_SECONDS": str(drain)}).ready()
    one.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    last, gap = knock(one, lambda: time.monotonic() - told > drain + 0.5)
    assert gap > listening.QUIET / 2 or last - told > drain
    assert one.process.wait(60) == 0
    assert time.monotonic() - told < drain * listening.LONGEST
    with pytest.raises(httpx.ConnectError):
        one.post({"x": 1})


@pytest.mark.slow
def test_idle_connections_are_let_go_while_it_listens(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """A kept connection that asks nothing is closed while a new one is still taken, as long as somebody is served."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle(READS), concurrency=2, environment={"NBDEPLOY_DRAIN_SECONDS": "4"}).ready()
    kept = Caller(one.port)
    assert kept.ask(b'{"path": ""}') == (200, b"0")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.post, {"path": str(gate)})
        wait_until(lambda: "\nnbdeploy_inflight 1\n" in one.probe("/metrics").text)
        one.process.send_signal(signal.SIGTERM)
        kept.wait_for_end()
        answer = one.post({"path": ""})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        one.process.send_signal(signal.SIGTERM)
        gate.write_text("four", encoding="utf-8")
        assert call.result().json() == 4
    assert one.process.wait(30) == 0
    kept.close()


def test_a_new_connection_may_ask_once(bundle: Any, begin: Any) -> None:
    """Who connected just before the end has a moment to send the request, and is answered."""
    one = begin(bundle(ADD)).ready()
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as sock:
        one.process.send_signal(signal.SIGTERM)
        wait_until(lambda: one.phase() == "draining" or one.process.poll() is not None)
        with contextlib.suppress(ConnectionError):  # after the moment, which is judged next
            sock.sendall(b'POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n{"x": 1}')
        if time.monotonic() - began > NEW / 2:
            pytest.skip("this machine was too busy to ask in time")
        assert b"200 OK" in until(sock, b"\r\n\r\n")
    assert one.process.wait(30) == 0
