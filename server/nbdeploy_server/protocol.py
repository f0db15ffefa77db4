"""uvicorn's httptools protocol, able to let go of an idle connection: by closing it, or without closing it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LINGER = 30.0  # seconds for which the rest of a refused body, or of a request's head, is waited for
PATIENCE = 5.0  # seconds that a drain waits for the second half of a request
NEW = 1.0  # seconds for which a drain leaves alone who has asked nothing yet: a request follows its connection


class Connection(HttpToolsProtocol):
    """One client connection of a Replica.

    A connection is idle when its last answer is complete and no byte of a next request has been read.
    """

    def __init__(self, *args: Any, owner: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = owner
        self.idle_since = self.loop.time()  # of the last answer, the begin of a request, or of the connection
        self._midway = False
        self._stalled = 0.0  # loop time at which a drain first found half a request here

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Count the connection."""
        super().connection_made(transport)
        self._owner.connections_changed(len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out."""
        super().connection_lost(exc)
        self._owner.connections_changed(len(self.connections))

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        self._midway = True
        self.idle_since = self.loop.time()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that it is read."""
        self._midway = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request.

        In place of uvicorn's own: a timer for each answer, which the next request cancels, costs more than all the
        rest of this. `close_if_idle` is asked once a second instead.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self.idle_since = self.loop.time()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        if self._midway:
            # Answered before all of the body came, as a 413 is. Closing now would reset the answer away, so uvicorn
            # reads and forgets the rest; but not for ever.
            self.loop.call_later(LINGER, self._end_if_unread, self.cycle)

    def _end_if_unread(self, cycle: Any) -> None:
        if self._midway and self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()

    def close_if_idle(self, seconds: float) -> None:
        """Close a connection that has asked nothing for so long, or has stopped for LINGER in the midst of asking."""
        limit = max(seconds, LINGER) if self._midway else seconds
        if self._answered and self.loop.time() - self.idle_since > limit and not self.transport.is_closing():
            self.transport.close()

    def _close_if_stalled(self) -> None:
        """Close the connection where a drain has waited long enough for the second half of a request."""
        self._stalled = self._stalled or self.loop.time()
        if self.loop.time() - self._stalled > PATIENCE:
            self.transport.close()

    @property
    def idle(self) -> bool:
        """Whether nothing is asked here: the last answer is complete, and no byte of a next request has been read."""
        return self._answered and not self._midway

    @property
    def _answered(self) -> bool:
        return (self.cycle is None or bool(self.cycle.response_complete)) and not self.pipeline


class ListenedConnection(Connection):
    """A connection that this process accepted and closes itself."""

    def close_unasked(self) -> None:
        """Close the connection unless something is asked or being answered; a drain asks again.

        Bytes that the kernel has and this process has not read are a request too: closing would reset it. The first
        request of a new connection may still be on its way.
        """
        if self.transport is None or self.transport.is_closing():
            return
        if self._midway and self._answered:  # half a request, or half a body that nobody wants
            self._close_if_stalled()
            return
        new = self.cycle is None and self.loop.time() - self.idle_since < NEW  # type: ignore[unreachable] # as uvicorn has it
        if self.idle and not new and not _waiting(self.transport.get_extra_info("socket").fileno()):
            self.transport.close()


def _waiting(descriptor: int) -> int:
    """Return how many bytes have come that were not read."""
    return struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0\0\0\0"))[0]  # type: ignore[no-any-return]


class HandoverProtocol(Connection):
    """A connection that another process may go on with once it is idle."""

    def on_response_complete(self) -> None:
        """Go on with the next request; while draining, let the connection go once its answer is out."""
        super().on_response_complete()
        if self._owner.draining and not self.transport.is_closing():
            self.loop.call_soon(self.release)

    def release(self) -> bool:
        """Hand the connection back if it is idle and everything written has left; the drain asks again otherwise."""
        transport = self.transport
        if transport is None or transport.is_closing() or not self._answered:
            return False
        if self._midway:  # bytes that this process has read cannot be handed over: they must become a request here
            self._close_if_stalled()
            return False
        if transport.get_write_buffer_size():
            return False
        if self._owner.orphaned:
            transport.close()
            return True
        transport.pause_reading()
        self._unset_keepalive_if_required()
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        try:
            given = self._owner.give_back(descriptor)
        finally:
            os.close(descriptor)
        if not given:
            transport.resume_reading()
            return False
        transport.abort()  # closes this process's descriptor only; nothing is left to write
        self.connections.discard(self)
        return True


def whole(cycle: Any, head: bytes, body: bytes) -> bool:
    """Write a complete answer of status 200 in one go; False asks the caller to go by way of ASGI's `send`.

    uvicorn's `send` checks each header by regular expressions and is awaited twice: a third of a small answer's cost.

    Args:
        cycle: uvicorn's state of the request.
        head: header lines, each with its line end, fit to be sent.
        body: as long as the head says.
    """
    if cycle is None or cycle.response_started or cycle.disconnected or not cycle.keep_alive or cycle.flow.write_paused:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    lines = [b"%b: %b\r\n" % pair for pair in cycle.default_headers]
    cycle.transport.write(b"".join([b"HTTP/1.1 200 OK\r\n", *lines, head, b"\r\n", body]))
    cycle.message_event.set()
    cycle.on_response()
    return True
