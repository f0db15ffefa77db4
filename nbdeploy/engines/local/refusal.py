"""What a connection gets that no Replica can take: an answer with words instead of a reset."""

from __future__ import annotations

import contextlib
import socket

from nbdeploy.engines.loopback import problem

_ANSWER = problem(503, "No Replica is ready. `nbdeploy status NAME` tells why.")


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
