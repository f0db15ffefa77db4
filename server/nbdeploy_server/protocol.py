"""uvicorn's httptools protocol, able to let go of an idle connection without closing it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class HandoverProtocol(HttpToolsProtocol):
    """One client connection of a Replica.

    A connection is idle when its last answer is complete and no byte of a next request has been read; only then may
    another process go on with it.
    """

    def __init__(self, *args: Any, owner: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = owner
        self._midway = False

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
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that it is read."""
        self._midway = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """While draining, let the connection go once its answer is out."""
        super().on_response_complete()
        if self._owner.draining:
            self.loop.call_soon(self.release)

    def release(self) -> bool:
        """Hand the connection back if it is idle and everything written has left; the drain asks again otherwise."""
        transport = self.transport
        if transport is None or transport.is_closing() or self._midway or self.pipeline:
            return False
        if self.cycle is not None and not self.cycle.response_complete:
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
