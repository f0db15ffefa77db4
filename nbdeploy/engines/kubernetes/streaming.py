"""Answers that go on: lines as they come, and an end that another thread can bring about."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

_CHUNK = 65536  # bytes


class Stream:
    """The open answer to one request.

    Attributes:
        rest: after `lines`, what came behind the last newline.
        cut: the answer did not come to its own end: it broke off, was silent for too long, or was stopped.
    """

    def __init__(self, response: Any, on_end: Callable[[Stream], None]) -> None:
        self.rest = b""
        self.cut = True
        self._response = response
        self._on_end = on_end
        self._stopped = threading.Event()
        # urllib3 forgets the connection at the end of the answer; a stop from elsewhere needs the socket itself
        self._socket: socket.socket | None = getattr(response.connection, "sock", None)

    def lines(self) -> Iterator[bytes]:
        """Yield whole lines without their newline until the answer ends, is stopped, or breaks off."""
        import urllib3

        rest = b""
        try:
            for chunk in self._chunks():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
            if not self._stopped.is_set():
                self.rest, self.cut = rest, False
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError):
            # cut, silent for too long, or stopped: urllib3 then meets a socket that is closed under its hands
            return
        finally:
            self.stop()

    def _chunks(self) -> Iterator[bytes]:
        """Yield bytes as they come; where they are not chunked, urllib3's own `stream` would wait for a whole block."""
        if self._response.chunked:
            return iter(self._response.stream(_CHUNK, decode_content=True))
        return iter(lambda: self._response.read1(_CHUNK, decode_content=True), b"")

    def stop(self) -> None:
        """End it; a thread that waits for the next line gets none."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._on_end(self)
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # past the TLS layer, which another thread may be reading through
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with contextlib.suppress(Exception):  # whatever state the reader left it in: it is to end
            self._response.close()
