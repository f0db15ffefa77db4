"""Functions to serve, and ways to ask them through real sockets."""

from __future__ import annotations

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.server.conftest import Served

PACKED = "application/vnd.nbdeploy+msgpack"
PROBLEM = "application/problem+json"
PAGE = "http://page.example"

SQUARE = """
def predict(input: float) -> dict:
    return {"output": input * input}
"""

WORK = '''
import os, time

def deeper(message):
    raise ValueError(message)

def predict(action: str, value=None, path: str = ""):
    """Do what a test asks for."""
    if path:
        with open(path, "a") as file:
            file.write(action + "\\n")
    if action == "sleep":
        time.sleep(value)
    elif action == "wait":
        while not os.path.exists(value):
            time.sleep(0.01)
    elif action == "spin":
        while not os.path.exists(value):
            for _ in range(1_000_000):
                pass
    elif action == "raise":
        deeper(value)
    elif action == "print":
        print(value)
    elif action == "exit":
        raise SystemExit(3)
    elif action == "unsendable":
        return open(os.devnull)
    return value
'''

TOKENS = '''
import os, time

def predict(items: list, fail_at: int = -1, wait: float = 0.0, path: str = "", gate: str = ""):
    """Give items one by one, those after the first once the gate is there."""
    try:
        for at, item in enumerate(items):
            if at == fail_at:
                raise RuntimeError("broke")
            if wait and at:
                time.sleep(wait)
            while gate and at and not os.path.exists(gate):
                time.sleep(0.01)
            yield item
    finally:
        if path:
            with open(path, "w") as file:
                file.write("closed")
'''

NAP = """
import asyncio, os

async def predict(seconds: float, path: str = "", company: int = 0) -> float:
    with open(path or os.devnull, "a", buffering=1) as file:
        file.write("begun\\n")
        try:
            while company and len(open(path).readlines()) < company:
                await asyncio.sleep(0.02)
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            file.write("cancelled\\n")
            raise
    return seconds
"""

TICKS = """
import asyncio, os

async def predict(count: int, wait: float = 0.0, path: str = "", company: int = 0):
    with open(path or os.devnull, "a", buffering=1) as file:
        file.write("begun\\n")
        try:
            while company and len(open(path).readlines()) < company:
                await asyncio.sleep(0.02)
            for number in range(count):
                await asyncio.sleep(wait)
                yield number
        finally:
            file.write("closed\\n")
"""


def raw(served: Served, data: bytes) -> socket.socket:
    """Send bytes on a new connection."""
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    sock.sendall(data)
    return sock


def request(served: Served, body: bytes, *lines: str, method: str = "POST", path: str = "/predict") -> bytes:
    """Return a request as bytes."""
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {served.key}", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


def answers(sock: socket.socket, count: int = 1) -> list[tuple[int, dict[str, str], bytes]]:
    """Read so many answers with Content-Length from a connection."""
    found, rest = [], b""
    while len(found) < count:
        while b"\r\n\r\n" not in rest:
            data = sock.recv(65536)
            assert data, f"the connection ended after {len(found)} answers with {rest!r}"
            rest += data
        head, _, rest = rest.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", 0))
        while len(rest) < size:
            rest += sock.recv(65536)
        found.append((int(status.split()[1]), headers, rest[:size]))
        rest = rest[size:]
    return found


def counters(served: Served) -> dict[str, float]:
    """Return the metrics as {"name{label}": value}."""
    rows = {}
    for family in text_string_to_metric_families(served.metrics()):
        for one in family.samples:
            labels = ",".join(one.labels.values())
            rows[one.name + (f"{{{labels}}}" if labels else "")] = one.value
    return rows


@contextmanager
def calling(served: Served, gate: Path) -> Iterator[Callable[[dict[str, Any]], Future[httpx.Response]]]:
    """Yield what sends a call and returns once it is in flight, or answered; at the end the gate opens for all."""
    wait_until(lambda: served.inflight() == 0)
    with ThreadPoolExecutor(4) as pool:

        def send(call: dict[str, Any]) -> Future[httpx.Response]:
            wanted = served.inflight() + 1
            future = pool.submit(served.post, call)
            wait_until(lambda: served.inflight() >= wanted or future.done())
            return future

        try:
            yield send
        finally:
            gate.touch()
