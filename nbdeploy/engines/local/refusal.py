"""What a connection gets that no Replica can take: an answer with words instead of a reset."""

from __future__ import annotations

import contextlib
import json
import socket

_BODY = json.dumps(
    {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "No Replica is ready. `nbdeploy status NAME` tells why.",
    }
).encode()
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


def refuse(sock: socket.socket) -> None:
    """Answer 503 and close, reading what has come: closing with unread bytes would reset the answer away."""
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sock.recv(65536):
                pass
        sock.send(_ANSWER)
        sock.shutdown(socket.SHUT_WR)
    sock.close()
