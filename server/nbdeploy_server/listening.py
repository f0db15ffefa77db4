"""A Replica that listens on a port of its own, as in a container, and leaves in two phases.

Being told to end and being out of every router's list are two events, seconds apart, and nobody says when the second
has happened. So a Replica that ends first serves on, new connections too, but asks each caller to reconnect
(`Connection: close` makes the caller's own HTTP library do it, with no request lost); only then it stops listening.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import socket
import sys
import time

from nbdeploy_server.connections import Connections
from nbdeploy_server.front import Front
from nbdeploy_server.metrics import machine_text
from nbdeploy_server.progress import DRAINING, READY
from nbdeploy_server.protocol import ListenedConnection

# Connections that may wait to be accepted: a burst must not meet a full queue, whose clients wait 1 s to try again.
BACKLOG = 2048
PAUSE = 0.2  # seconds without accepting once this process has no descriptor left
SCRAPE = 2.0  # seconds that a scrape waits for the event loop
GRACE = 5.0  # seconds beyond a request's timeout that its answer may take to leave


class Listener:
    """Serves a front on a socket until the process is told to end."""

    def __init__(self, front: Front, sock: socket.socket, drain_seconds: float) -> None:
        self._front = front
        self._socket = sock
        self._drain_seconds = drain_seconds
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, began: float) -> None:
        """Serve until drained; `began` is when the process began to get ready (monotonic seconds).

        The port is listened on only now. Before, a connection is refused, which every router and client may safely try
        elsewhere, because no byte of a request was taken; a 503 would have to be understood by each of them.
        """
        loop = self._loop = asyncio.get_running_loop()
        front = self._front
        self._connections = Connections(front, ListenedConnection, self)
        front.start()
        front.ready = True
        front.metrics.ready_seconds = time.monotonic() - began
        ticker = asyncio.create_task(self._connections.tick())
        self._socket.setblocking(False)
        self._socket.listen(BACKLOG)
        loop.add_reader(self._socket, self._accept)
        loop.add_signal_handler(signal.SIGTERM, self.drain, self._drain_seconds)
        loop.add_signal_handler(signal.SIGINT, self.drain, 0.0)
        front.progress.enter(READY, front.note)
        seconds, revision = front.metrics.ready_seconds, front.settings.revision
        print(f"nbdeploy: ready in {seconds:.1f} s · revision {revision}", flush=True)  # noqa: T201 - the Replica's log
        await self._stop.wait()
        ticker.cancel()

    def scrape(self) -> str:
        """Return the Prometheus text; called in any other thread. Raises TimeoutError where the loop does not answer.

        What is counted is read where it is written, on the loop, so no lock slows a request and no number is torn.
        """
        told: concurrent.futures.Future[str] = concurrent.futures.Future()
        if self._loop is None:
            return machine_text(self._front.settings.gpus)
        self._loop.call_soon_threadsafe(lambda: told.set_result(self._front.metrics.counted()))
        return told.result(SCRAPE) + machine_text(self._front.settings.gpus)

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                sock, _address = self._socket.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # the client left while it waited
                continue
            except OSError as error:  # no descriptor is left: the next turns would find the same
                print(f"nbdeploy: connections wait: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._socket)
                loop.call_later(PAUSE, self._resume)
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.enter(sock)

    def _resume(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def connections_changed(self, count: int) -> None:
        """Nobody else must know how many connections are open."""

    @property
    def draining(self) -> bool:
        """Whether this Replica is leaving."""
        return self._front.draining

    def drain(self, seconds: float) -> None:
        """Begin to leave: phase 1 for so many seconds, then phase 2. Told again, phase 1 ends at once."""
        if self._drain is not None:
            self._hurry.set()
            return
        self._front.draining = self._front.closing = True
        self._front.progress.enter(DRAINING, "finishing; new connections are served until routers know")
        self._drain = asyncio.get_running_loop().create_task(self._leave(seconds))

    async def _leave(self, seconds: float) -> None:
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), seconds)
        self._stop_listening()
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._front.settings.timeout + GRACE
        while loop.time() < limit and not self._connections.over:
            for connection in self._connections.open():
                connection.close_unasked()
            await asyncio.sleep(0.01)
        self._stop.set()

    def _stop_listening(self) -> None:
        """Take in who waits already, for closing a listener resets them; then refuse."""
        self._accept()
        asyncio.get_running_loop().remove_reader(self._socket)
        with contextlib.suppress(OSError):  # children that the user's code forked hold this socket too
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._front.progress.enter(DRAINING, "finishing what is running")
