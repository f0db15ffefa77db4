"""The channel between a supervisor and one Replica: a Unix socket pair for orders and connections, and a shared page.

Downwards, one byte an order: `c` serve the connection that comes with it, `d` drain, `m` tell your metrics, `s`/`n`
other Replicas could / could not take connections. Upwards, JSON lines; {"op": "back"} carries a connection that is
handed back. The shared page holds counters that the supervisor reads when it chooses a Replica, so that a request
costs no message.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import socket
from collections.abc import Iterator
from typing import Any

PAGE = 4096  # bytes: one page
INFLIGHT, CONNECTIONS, ACCEPTED = range(3)  # int64 slots of the shared page

CONNECTION, DRAIN, METRICS, SPREAD, ALONE = b"c", b"d", b"m", b"s", b"n"


class Page:
    """Counters in memory shared between supervisor and Replica; each slot has one writer."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, PAGE)
        self.slots = memoryview(self._map).cast("q")

    @staticmethod
    def create() -> int:
        """Make an unnamed page and return its descriptor."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("nbdeploy")
        else:  # macOS
            import tempfile

            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, PAGE)
        return descriptor

    def close(self) -> None:
        """Unmap the page."""
        self.slots.release()
        self._map.close()


def send(sock: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> int:
    """Send bytes with descriptors and return how many went; raises BlockingIOError where the peer does not read."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return sock.sendmsg([data], ancillary)


def receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """Receive what is there, or None if nothing is; b"" means the peer is gone."""
    try:
        data, descriptors, _flags, _address = socket.recv_fds(sock, 65536, 64)
    except (BlockingIOError, InterruptedError):
        return None
    except ConnectionError:
        return b"", []
    return data, list(descriptors)


class Lines:
    """Cuts JSON lines out of a stream of bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield each complete message."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line:
                yield json.loads(line)


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as one JSON line."""
    return json.dumps(message, ensure_ascii=False).encode() + b"\n"
