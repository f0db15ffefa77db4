"""A Replica as it runs in a container: the real process, told by environment variables, on real sockets."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import httpx
from nbdeploy_server.sockets import bind

from tests.conftest import wait_until
from tests.server.containers import ADD, GATE, KEY

if TYPE_CHECKING:
    from pathlib import Path


def test_it_starts_answers_and_says_so(bundle: Any, begin: Any) -> None:
    """The user's port answers with the key only, tells what a Replica tells, and one line says that it is ready."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    one = begin(bundle(ADD, {"x": 1}), name="adder", revision=3, key_sha256=digest, concurrency=1, queue=8, timeout=5.0)
    answer = one.ready().post({"x": 4})
    assert (answer.status_code, answer.json(), answer.headers["x-nbdeploy-revision"]) == (200, 5, "3")
    assert "connection" not in answer.headers
    assert "date" in answer.headers
    assert httpx.post(f"http://127.0.0.1:{one.port}/predict", json={"x": 4}, trust_env=False).status_code == 401
    report = one.probe("/readyz").json()
    assert (report["phase"], report["revision"]) == ("ready", 3)
    assert report["seconds"] >= 0
    for path, status in (("/livez", 200), ("/readyz", 200), ("/metrics", 404)):  # numbers are not for users
        assert httpx.get(f"http://127.0.0.1:{one.port}{path}", trust_env=False).status_code == status
    wait_until(lambda: "asked for 4" in one.text())  # printed into a file: at once all the same
    assert one.text().count(" · revision 3\n") == 1
    assert one.end() == 0


def test_only_a_bundle_is_needed(bundle: Any, begin: Any) -> None:
    """Without settings it serves publicly under any Host name, as behind a Service or a published port."""
    one = begin(bundle(ADD)).ready()
    answer = httpx.post(
        f"http://127.0.0.1:{one.port}/predict", json={"x": 1}, headers={"host": "adder.models.svc"}, trust_env=False
    )
    assert answer.json() == 2
    page = {"host": "adder.example.com", "origin": "https://adder.example.com"}  # a gateway took the encryption off
    assert httpx.post(f"http://127.0.0.1:{one.port}/predict", json={"x": 1}, headers=page, trust_env=False).json() == 2
    page["origin"] = "https://elsewhere.example.com"
    assert httpx.post(f"http://127.0.0.1:{one.port}/predict", json={"x": 1}, headers=page).status_code == 403
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"http://127.0.0.1:{one.port}/openapi.json").json()["info"]["title"] == "model"


def test_it_can_be_ended_while_it_loads(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """A signal during the load ends the process, also where it is the first of its container."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle(GATE, PATH=str(gate)))
    wait_until(lambda: one.phase() == "loading")
    assert one.end() == 143


def test_a_killed_replica_can_start_again(bundle: Any, begin: Any) -> None:
    """What a killed process left in its folder does not keep the next from starting in it."""
    made_of = bundle(ADD)
    one = begin(made_of).ready()
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    folder = str(one.log.parent / "tmp0" / "nbdeploy")
    assert begin(made_of, environment={"NBDEPLOY_UNPACKED": folder}).ready().post({"x": 1}).json() == 2


def test_all_addresses_are_listened_on() -> None:
    """Without a host, both kinds of addresses reach it, as clusters of either kind need."""
    with bind("", 0, "ANY") as sock:
        sock.listen(1)
        socket.create_connection(("127.0.0.1", sock.getsockname()[1])).close()
