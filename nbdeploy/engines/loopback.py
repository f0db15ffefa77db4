"""What engines offer on this machine's own address: a bound port, and an answer in words where nobody can serve."""

from __future__ import annotations

import json
import socket
import time
from http import HTTPStatus

from nbdeploy.errors import EngineError


class PortTakenError(EngineError):
    """A port that was asked for belongs to another program."""


def bound(port: int, *, patience: float = 0.0) -> socket.socket:
    """Return a socket bound to a port of this machine.

    Args:
        port: 0 for any.
        patience: seconds; a port whose process was just killed may be held for some milliseconds.

    Raises PortTakenError.
    """
    limit = time.monotonic() + patience
    while True:
        fresh = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            fresh.bind(("127.0.0.1", port))
        except OSError as error:
            fresh.close()
            if time.monotonic() >= limit:
                raise PortTakenError(
                    f"Port {port} of this machine is taken ({error.strerror}). Choose another with --port, or stop the "
                    "program that has it."
                ) from error
            time.sleep(0.01)
        else:
            return fresh


def problem(status: int, detail: str) -> bytes:
    """Return a whole HTTP answer with application/problem+json, after which the connection ends."""
    title = HTTPStatus(status).phrase
    body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail}).encode()
    head = (
        f"HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
