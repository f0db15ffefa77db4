"""Bytes of one client's connection and one tunnel, both ways, until either side has closed."""

from __future__ import annotations

import asyncio
import contextlib

from nbdeploy.engines.kubernetes.portforward import Tunnel, TunnelError

HALF_CLOSED = 5.0  # seconds that an answer may take once the client has closed its half, or is gone: both look alike
_QUIET = 0.5  # seconds of silence that end an answer to such a client
_CHUNK = 1 << 16
_KEPT = 1 << 18  # bytes kept of what no pod has answered yet, so that another pod can get them
_LINGER = 2.0  # seconds that a client may go on sending after the answer: closing at once would reset the answer away


class Relay:
    """One client and one tunnel; neither side is read faster than the other takes it.

    Args:
        reader: of the client.
        writer: of the client.
        tunnel: to the pod.
        unanswered: what the client has sent already; grows by what it sends until the pod's first byte.

    Attributes:
        tunnel: to the pod.
        waits: whether the client sent something last, so that an answer is due.
        repeatable: whether `unanswered` is all that was sent, and nothing was answered.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tunnel: Tunnel, unanswered: list[bytes]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.tunnel = tunnel
        self._unanswered = unanswered
        self._moved = 0
        self.waits = True
        self.repeatable = True

    async def run(self) -> None:
        """Pipe until the pod has closed, or the client is gone.

        Raises:
            TunnelError: the tunnel broke.
            OSError: the client's connection broke.
        """
        up, down = asyncio.ensure_future(self._up()), asyncio.ensure_future(self._down())
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if not down.done():
                await self._finish(up, down)
            if down.done():
                down.result()
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _finish(self, up: asyncio.Task[None], down: asyncio.Task[None]) -> None:
        """See to the end of a connection whose client has closed its half, is gone, or whose tunnel takes no more."""
        error = up.exception()
        if isinstance(error, TunnelError):
            await asyncio.wait({down}, timeout=1.0)  # why it broke comes the other way
        if error is not None and not down.done():
            raise error
        while not down.done():
            moved = self._moved
            await asyncio.wait({down}, timeout=HALF_CLOSED if self.waits else _QUIET)
            if moved == self._moved:
                return

    async def _up(self) -> None:
        for part in tuple(self._unanswered):
            await self.tunnel.send(part)
        while data := await self._reader.read(_CHUNK):
            self.waits = True
            if self.repeatable:
                self._unanswered.append(data)
                if sum(map(len, self._unanswered)) > _KEPT:
                    self._no_more()
            await self.tunnel.send(data)

    async def _down(self) -> None:
        while data := await self.tunnel.receive():
            if self.repeatable:
                self._no_more()
            self._moved += 1
            self.waits = False
            self._writer.write(data)
            await self._writer.drain()

    def _no_more(self) -> None:
        self.repeatable = False
        self._unanswered.clear()


async def linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that nothing more comes, and read on for a moment until the client closes as well."""
    with contextlib.suppress(OSError, TimeoutError):
        writer.write_eof()
        async with asyncio.timeout(_LINGER):
            while await reader.read(_CHUNK):
                pass
