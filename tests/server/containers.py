"""Replicas as they run in containers, for tests: the real process, told by environment variables, on real sockets."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import nbdeploy_server
import pytest

from tests.conftest import wait_until

if TYPE_CHECKING:
    import subprocess

PROGRAM = Path(nbdeploy_server.__file__).parent / "__main__.py"
KEY = "open sesame"
ADD = "def predict(x: int) -> int:\n    print('asked for', x)\n    return x + 1\n"
SLEEP = "import time\ndef predict(seconds: float) -> float:\n    time.sleep(seconds)\n    return seconds\n"
GATE = (  # a pipe that nobody writes to yet: the load lasts until the test says so
    "def setup():\n    return open(PATH).read()\ndef predict(model, x: int) -> str:\n    return model + str(x)\n"
)


def taken_port() -> int:
    """Return a port that is free now; not of the range from which the kernel takes ports for clients."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 21_000 + worker * 500 + os.getpid() % 100
    for port in range(first, first + 400):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port
    pytest.fail("no port is free")


_GIVEN: set[int] = set()


@dataclass
class Container:
    """One process, its ports and what it prints."""

    process: subprocess.Popen[bytes]
    port: int
    probes_port: int
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, arguments: Any, **options: Any) -> httpx.Response:
        """Call it on a connection of its own."""
        url = f"http://127.0.0.1:{self.port}/predict"
        return httpx.post(url, json=arguments, headers=self.headers, trust_env=False, timeout=30, **options)

    def probe(self, path: str) -> httpx.Response:
        """Ask the probes' port."""
        return httpx.get(f"http://127.0.0.1:{self.probes_port}{path}", trust_env=False, timeout=10)

    def metrics(self) -> str:
        """Return its Prometheus text; asks again where its event loop is too busy to answer."""

        def told() -> str:
            answer = self.probe("/metrics")
            assert answer.status_code in {200, 503}
            return answer.text if answer.status_code == 200 else ""

        return str(wait_until(told))

    def ready(self) -> Container:
        """Wait until it is ready."""

        def ready() -> bool:
            assert self.process.poll() is None, self.text()
            try:
                return self.probe("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready)
        return self

    def phase(self) -> str:
        """Return the phase that it tells, "" before it answers."""
        try:
            return str(self.probe("/readyz").json()["phase"])
        except httpx.TransportError:
            return ""

    def text(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(encoding="utf-8")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def until(sock: socket.socket, end: bytes) -> bytes:
    """Read until something has come."""
    data = b""
    while end not in data:
        got = sock.recv(65536)
        assert got, data
        data += got
    return data
