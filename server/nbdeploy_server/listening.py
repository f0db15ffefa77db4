"""A Replica that listens on a port of its own, as in a container, and leaves in three phases.

Being told to end and being out of every router's list are two events, seconds apart, and nobody says when the second
has happened. So a Replica that ends

1. serves on for a fixed time, new connections too, but asks each caller to reconnect: `Connection: close` makes the
   caller's own HTTP library do it, with no request lost;
2. lets go of idle connections too, and serves on until for QUIET seconds nobody came and nobody was connected, for at
   most LONGEST times the fixed time in all. Who was let go and comes again shows that a router still leads here, as a
   node's proxy without a spare core may for long; a connection that were refused then would be a request lost;
3. stops listening, and finishes what is running.
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
STEP = 0.01  # seconds between looks at what a Replica that ends still waits for
# Seconds without a connection after which routers count as knowing. Who is let go is back within a round trip; a client
# that waits before it connects again, or one whose first packet was lost, within a second.
QUIET = 1.5
# A Replica listens for at most so many times its drain seconds: some callers never go elsewhere, as health checks and
# those with this address of its own. Kubernetes must wait for it: see nbdeploy/engines/kubernetes/pod.py.
LONGEST = 3


class Listener:
    """Serves a front on a socket until the process is told to end."""

    def __init__(self, front: Front, sock: socket.socket, drain_seconds: float) -> None:
        self._front = front
        self._socket = sock
        self._drain_seconds = drain_seconds
        self._last_caller = 0.0  # loop time at which one came, and in a drain, at which one was still connected
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
            self._last_caller = asyncio.get_running_loop().time()
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
        """Begin to leave: phase 1 for so many seconds, then the others; 0 means at once with phase 3, as told again."""
        if self._drain is not None:
            self._hurry.set()
            return
        self._front.draining = self._front.closing = True
        self._front.progress.enter(DRAINING, "finishing; new connections are served until routers know")
        self._drain = asyncio.get_running_loop().create_task(self._leave(seconds))

    async def _leave(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() + LONGEST * seconds
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), seconds)
        while not self._hurry.is_set() and loop.time() < latest and not self._quiet():
            self._let_go()
            await asyncio.sleep(STEP)
        self._stop_listening()
        limit = loop.time() + self._front.settings.timeout + GRACE
        while loop.time() < limit and not self._connections.over:
            self._let_go()
            await asyncio.sleep(STEP)
        self._stop.set()

    def _let_go(self) -> None:
        """Close the connections on which nothing is asked."""
        for connection in self._connections.open():
            connection.close_unasked()

    def _quiet(self) -> bool:
        """Whether routers seem to know; asked again and again from the end of phase 1 on.

        A caller whose answer is still to come counts: it reconnects only then, and a slow model must not hide it.
        """
        now = asyncio.get_running_loop().time()
        if not self._connections.over:
            self._last_caller = now
        if now - self._last_caller >= QUIET:
            self._accept()  # where the loop was held up, some wait at the door
        return now - self._last_caller >= QUIET

    def _stop_listening(self) -> None:
        """Take in who waits already, for closing a listener resets them; then refuse."""
        self._accept()
        asyncio.get_running_loop().remove_reader(self._socket)
        with contextlib.suppress(OSError):  # children that the user's code forked hold this socket too
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._front.progress.enter(DRAINING, "finishing what is running")
