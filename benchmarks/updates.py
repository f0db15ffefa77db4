"""16 raw keep-alive clients without retries call through 5 updates of an Endpoint. Goal: 0 failed requests.

    python benchmarks/updates.py [--clients 16] [--updates 5] [--think 0.005]

Each client is one socket that sends a request, reads the whole answer, waits a little, and sends the next. It opens a
new connection only where an answer asked for that (`Connection: close`); anything else but a right answer is a
failure: a refused connection, a cut one, another status. Latencies while an update was applied stand beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from _measure import record, show, temporary_home

LONGEST = 60.0  # seconds that clients run at most
ANSWER_TIMEOUT = 10.0  # seconds without an answer are a failure
SETTLE = 1.0  # seconds between updates
BODY = b'{"value": 4.0}'


@dataclass
class Caller:
    """One client: its connection, the answer so far, and when it asked."""

    address: tuple[str, int]
    request: bytes
    sock: socket.socket | None = None
    data: bytes = b""
    asked: float = 0.0
    due: float = 0.0
    connections: int = 0
    latencies: list[tuple[float, float]] = field(default_factory=list)

    def ask(self, selector: selectors.BaseSelector) -> None:
        """Send one request, over a new connection if there is none."""
        if self.sock is None:
            self.sock = socket.create_connection(self.address, timeout=ANSWER_TIMEOUT)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(self.sock, selectors.EVENT_READ, self)
            self.connections += 1
        self.asked, self.data = time.monotonic(), b""
        self.sock.sendall(self.request)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Give the connection up."""
        if self.sock is not None:
            selector.unregister(self.sock)
            self.sock.close()
            self.sock = None

    def read(self, selector: selectors.BaseSelector) -> bool:
        """Take what has come; True once the answer is whole. Raises OSError where it is no answer."""
        more = self.sock.recv(65536) if self.sock is not None else b""
        if not more:
            raise ConnectionError("cut before the answer was whole")
        self.data += more
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return False
        lines = head.lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:])
        if len(body) < int(headers[b"content-length"]):
            return False
        if b" 200 " not in lines[0] + b" " or not body.startswith(b'{"value":4.0,'):
            raise ConnectionError(f"{lines[0].decode()}: {body[:200].decode()}")
        self.latencies.append((self.asked, time.monotonic() - self.asked))
        if headers.get(b"connection") == b"close":
            self.close(selector)
        return True


def call_until_told(
    port: int, key: str, clients: int, think: float, host: str = "127.0.0.1", longest: float = LONGEST
) -> dict[str, Any]:
    """Call until standard input ends; returns latencies and failures."""
    request = (
        f"POST /predict HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    ).encode() + BODY
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    now = time.monotonic()
    callers = [Caller((host, port), request, due=now + think * number / clients) for number in range(clients)]
    failures: list[str] = []
    limit, told = now + longest, False

    def guard(caller: Caller, work: Any) -> None:
        try:
            done = work(selector)
        except (OSError, ValueError, KeyError) as error:
            failures.append(f"{type(error).__name__}: {error}")
            caller.close(selector)
            done = True
        if done:
            caller.due = time.monotonic() + think

    while not told or any(not one.due for one in callers):
        now = time.monotonic()
        told = told or now > limit
        for caller in callers:
            if caller.due and caller.due <= now and not told:
                caller.due = 0.0
                guard(caller, caller.ask)
            elif not caller.due and caller.asked and now - caller.asked > ANSWER_TIMEOUT:
                failures.append("no answer")
                caller.close(selector)
                caller.due = now
        wakes = [one.due - now for one in callers if one.due]
        for key_, _ in selector.select(max(0.0, min([0.1, *wakes])) if not told else 0.1):
            if key_.data is None:
                told = True
                selector.unregister(sys.stdin)
            else:
                guard(key_.data, key_.data.read)
    for caller in callers:
        caller.close(selector)
    rows = [row for caller in callers for row in caller.latencies]
    return {"rows": rows, "failures": failures, "connections": sum(one.connections for one in callers)}


def functions(count: int) -> list[Any]:
    """Return functions that differ, so that each makes a Bundle of its own."""
    made: list[Any] = []
    for number in range(count):
        scope: dict[str, Any] = {"__name__": "__main__"}
        source = f"def tiny(value: float) -> dict[str, float]:\n    return {{'value': value, 'version': {number}}}\n"
        exec(source, scope)  # noqa: S102 - as a notebook's cells, run again with a change
        made.append(scope["tiny"])
    return made


def measure(clients: int, updates: int, think: float) -> dict[str, Any]:
    """Run the clients in a process of their own through the updates."""
    with temporary_home() as home:
        import nbdeploy
        from nbdeploy import capture
        from nbdeploy.bundle import Bundle
        from nbdeploy.engines.local.engine import LocalEngine
        from nbdeploy.spec import Revision
        from nbdeploy.store import Store

        store, engine = Store(home / "store"), LocalEngine(home)
        revisions = []
        for number, function in enumerate(functions(updates + 1), start=1):
            taken = capture.take(capture.Request(predict=function, sample={"value": 4.0}), store)
            revisions.append(Revision(name="tiny", number=number, bundle=store.put_bundle(taken.manifest)))

        def apply(revision: Revision) -> str:
            status = engine.apply(revision, Bundle(store, revision.bundle), lambda _words, _data: None)
            return status.url

        port = int(apply(revisions[0]).rpartition(":")[2])
        argument = {"port": port, "key": engine.key("tiny"), "clients": clients, "think": think}
        caller = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(argument)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            spans = []
            time.sleep(2 * SETTLE)  # the clients start, and are measured alone
            for revision in revisions[1:]:
                began = time.monotonic()
                apply(revision)
                spans.append((began, time.monotonic() + 0.2))  # the old Replica hands its connections back
                time.sleep(SETTLE)
            output, _ = caller.communicate()  # closes its standard input: they finish and tell
            served = nbdeploy.connect("tiny")(value=4.0)["version"]
        finally:
            caller.kill()
            caller.wait()
    found = dict(json.loads(output.splitlines()[-1]))
    return {**found, "spans": spans, "served_last": served == updates}


def percentile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--think", type=float, default=0.005, help="seconds between an answer and the next request")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(call_until_told(**json.loads(options.child))))
        return
    os.environ.pop("NBDEPLOY_KEY", None)
    found = measure(options.clients, options.updates, options.think)
    during: list[float] = []
    between: list[float] = []
    for asked, seconds in found["rows"]:
        inside = any(began - seconds <= asked <= ended for began, ended in found["spans"])
        (during if inside else between).append(seconds)
    within, without = percentile(during, 0.99), percentile(between, 0.99)
    span = sum(ended - began for began, ended in found["spans"]) / len(found["spans"])
    print(f"{len(found['rows'])} requests done over {found['connections']} connections, updates of {span:.2f} s each")
    show(f"failed requests through {options.updates} updates", len(found["failures"]), 0)
    longest = f"longest {max(during) * 1e3:.1f} and {max(between) * 1e3:.1f} ms"
    words = f"{within * 1e3:.1f} ms, {without * 1e3:.1f} ms; {longest}"
    show("p99 latency during updates / between them", within / without, raw=words)
    for reason in sorted(set(found["failures"])):
        print(f"  {found['failures'].count(reason)} x {reason}")
    figures = {
        "clients": options.clients,
        "updates": options.updates,
        "done": len(found["rows"]),
        "failed": len(found["failures"]),
        "connections": found["connections"],
        "p99_ratio": within / without,
        "milliseconds": {"p99_during": within * 1e3, "p99_between": without * 1e3, "longest": max(during) * 1e3},
        "seconds_per_update": span,
        "served_last": found["served_last"],
    }
    record("updates", figures, ["uvicorn"])


if __name__ == "__main__":
    main()
