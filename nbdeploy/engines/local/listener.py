"""The listener of an Endpoint: accepts connections and hands each to a Replica, or lets it wait for one."""

from __future__ import annotations

import asyncio
import collections
import socket
import sys
import time
from collections.abc import Callable

from nbdeploy.engines.local.refusal import refuse
from nbdeploy.engines.local.replica import Replica
from nbdeploy.engines.loopback import bound

HOLD = 10.0  # seconds a connection waits while no Replica is ready, before it gets a 503
BACKLOG = 1024


class Listener:
    """A listening socket and the connections that no Replica has yet.

    Args:
        serving: gives the Replicas that may get connections.
        hopeless: tells that none will be ready soon, so that waiting is no use.
    """

    def __init__(self, serving: Callable[[], list[Replica]], hopeless: Callable[[], bool]) -> None:
        self._serving = serving
        self._hopeless = hopeless
        self._socket: socket.socket | None = None
        self._waiting: collections.deque[tuple[socket.socket, float]] = collections.deque()
        self._turns = 0

    @property
    def port(self) -> int:
        """The port, 0 while closed."""
        return int(self._socket.getsockname()[1]) if self._socket is not None else 0

    def open(self, port: int, kept: int) -> None:
        """Listen on a port; 0 means the present one, else the kept one, else any. Raises PortTakenError."""
        if self._socket is not None and port in {0, self.port}:
            return
        fresh = bound(port or kept)
        fresh.listen(BACKLOG)
        fresh.setblocking(False)
        self.close()
        self._socket = fresh
        asyncio.get_running_loop().add_reader(fresh, self._accept)

    def close(self) -> None:
        """Accept no more; connections that wait are kept."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _accept(self) -> None:
        """Take every connection that waits."""
        listener = self._socket
        for _ in range(BACKLOG):
            if listener is None:
                return
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors: leave the rest in the backlog for a moment
                print(f"nbdeploy: cannot accept: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the supervisor's log
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(1.0, self._accept_again, listener)
                return
            # Sockets that are passed on lack asyncio's TCP_NODELAY, which costs about 40 ms per kept connection's call.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.hand(sock)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener is self._socket:
            asyncio.get_running_loop().add_reader(listener, self._accept)

    def hand(self, sock: socket.socket, since: float | None = None) -> None:
        """Give a connection to the Replica with the fewest in flight, then connections, then in turn."""
        for replica in sorted(self._serving(), key=lambda one: (one.inflight, one.connections, one.turn)):
            if replica.give(sock):
                self._turns += 1
                replica.turn = self._turns
                sock.close()
                return
        if self._hopeless():
            refuse(sock)
        else:
            self._waiting.append((sock, time.monotonic() if since is None else since))

    def hand_waiting(self) -> None:
        """Try again for those that wait."""
        waiting, self._waiting = self._waiting, collections.deque()
        for sock, since in waiting:
            self.hand(sock, since)

    def sweep(self) -> None:
        """Tell those who have waited too long that nothing is ready; retry those a full channel held up."""
        now = time.monotonic()
        while self._waiting and now - self._waiting[0][1] > HOLD:
            refuse(self._waiting.popleft()[0])
        if self._waiting:
            self.hand_waiting()

    def refuse_all(self) -> None:
        """Tell everybody who waits."""
        while self._waiting:
            refuse(self._waiting.popleft()[0])
