"""What predict does with a request: it raises, prints, lasts, waits, is left by its caller."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.server.conftest import Served

from tests.server.asking import NAP, WORK, calling, counters, raw, request


def test_predict_raises(work: Served) -> None:
    """500 carries type, message and the notebook's own lines; the log has them too."""
    answer = work.post({"action": "raise", "value": "no such thing"})
    problem = answer.json()
    assert answer.status_code == 500
    assert problem["exception"] == "ValueError"
    assert problem["detail"] == "predict raised ValueError: no such thing"
    assert any("raise ValueError(message)" in line for line in problem["traceback"])
    assert not any("nbdeploy_server" in line or "site-packages" in line for line in problem["traceback"])
    wait_until(lambda: "no such thing" in work.logs())
    assert work.post({"action": "exit"}).json()["exception"] == "SystemExit"
    assert work.post({"action": "unsendable"}).status_code == 500
    assert work.post({"action": "echo", "value": 1}).json() == 1


def test_what_predict_prints_is_in_the_logs(work: Served) -> None:
    """Standard output reaches the logs at once."""
    work.post({"action": "print", "value": "said by predict"})
    wait_until(lambda: "said by predict" in work.logs())


def test_timeout_keeps_the_slot(serve: Callable[..., Served], tmp_path: Path) -> None:
    """504 comes before the call is done; the next call starts only when the late one is really done."""
    late, gate, ran = serve("late", WORK, queue=2, timeout=2.0), tmp_path / "gate", tmp_path / "ran"
    with calling(late, gate) as send:
        answer = send({"action": "wait", "value": str(gate), "path": str(ran)}).result()
        assert answer.status_code == 504
        assert "--timeout" in answer.json()["detail"]
        assert late.inflight() == 1
        send({"action": "echo", "path": str(ran)})
        assert late.inflight() == 2
        assert ran.read_text(encoding="utf-8") == "wait\n"
    wait_until(lambda: late.post({"action": "echo", "value": 1}).text == "1")
    assert counters(late)["nbdeploy_abandoned_total{timeout}"] >= 1


def test_full_queue(work: Served, tmp_path: Path) -> None:
    """One runs, two wait, the next gets 429 with the time after which to try again."""
    gate = tmp_path / "gate"
    with calling(work, gate) as send:
        futures = [send({"action": "wait", "value": str(gate)}) for _ in range(3)]
        answer = work.post({"action": "echo"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "queue is full" in answer.json()["detail"]
        rows = counters(work)
        assert (rows["nbdeploy_inflight"], rows["nbdeploy_running"], rows["nbdeploy_queued"]) == (3, 1, 2)
    assert [future.result().status_code for future in futures] == [200] * 3
    wait_until(lambda: work.inflight() == 0)
    assert counters(work)["nbdeploy_rejected_total{queue_full}"] >= 1


def test_caller_that_left_is_not_worked_for(work: Served, tmp_path: Path) -> None:
    """A queued call whose caller left never runs."""
    gate, path = tmp_path / "gate", tmp_path / "ran"
    body = json.dumps({"action": "echo", "path": str(path)}).encode()
    with calling(work, gate) as send:
        send({"action": "wait", "value": str(gate)})
        gone = raw(work, request(work, body, "Content-Type: application/json"))
        wait_until(lambda: work.inflight() == 2)
        gone.close()
        after = send({"action": "echo", "value": 5})
    assert after.result().json() == 5
    assert not path.exists()
    rows = counters(work)
    assert rows["nbdeploy_abandoned_total{queued}"] >= 1
    assert rows["nbdeploy_requests_total{499}"] >= 1


def test_probes_answer_while_predict_spins(work: Served, tmp_path: Path) -> None:
    """Pure Python in the model thread does not hold up health checks, nor the refusal of wrong keys."""
    gate, began = tmp_path / "gate", tmp_path / "began"
    with calling(work, gate) as send, httpx.Client(base_url=work.url, trust_env=False, timeout=30.0) as client:
        spinning = send({"action": "spin", "value": str(gate), "path": str(began)})
        wait_until(began.exists)
        for path in ("/livez", "/readyz", "/livez"):
            assert client.get(path).status_code == 200
        assert client.post("/predict", json={}).status_code == 401
        assert not spinning.done()
    assert spinning.result().status_code == 200


def test_concurrent_coroutines(serve: Callable[..., Served], tmp_path: Path) -> None:
    """32 calls of an async function run at once: none ends before all have begun."""
    nap = serve("nap", NAP, {"seconds": 0.0})
    call = {"seconds": 0.5, "path": str(tmp_path / "begun"), "company": 32}
    with nap.client(limits=httpx.Limits(max_connections=40)) as client, ThreadPoolExecutor(32) as pool:
        done = list(pool.map(lambda _: client.post("/predict", json=call).json(), range(32)))
    assert done == [0.5] * 32


def test_coroutine_is_cancelled_when_nobody_waits(serve: Callable[..., Served], tmp_path: Path) -> None:
    """A coroutine over its time, or whose caller left, is cancelled at its next await."""
    nap = serve("nap", NAP, {"seconds": 0.0})
    late_nap = serve("late-nap", NAP, {"seconds": 0.0}, timeout=2.0)
    late, left = tmp_path / "late", tmp_path / "left"
    body = json.dumps({"seconds": 600, "path": str(left)}).encode()
    gone = raw(nap, request(nap, body, "Content-Type: application/json"))
    wait_until(left.exists)
    gone.close()
    wait_until(lambda: "cancelled" in left.read_text(encoding="utf-8"))
    assert late_nap.post({"seconds": 600, "path": str(late)}).status_code == 504
    wait_until(lambda: "cancelled" in late.read_text(encoding="utf-8"))
    for served, reason in ((nap, "running"), (late_nap, "timeout")):
        wait_until(lambda served=served: served.inflight() == 0)
        assert counters(served)[f"nbdeploy_abandoned_total{{{reason}}}"] >= 1


def test_threads_do_not_disturb_each_other(work: Served) -> None:
    """Answers reach the caller who asked, under many callers at once."""
    wrong = []

    def ask(number: int) -> None:
        with work.client() as client:
            for turn in range(10):
                answer = client.post("/predict", json={"action": "echo", "value": [number, turn]})
                if answer.status_code != 429 and answer.json() != [number, turn]:
                    wrong.append(answer.text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
