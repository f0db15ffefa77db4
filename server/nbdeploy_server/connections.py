"""The connections of a Replica, however they come: uvicorn's protocol over sockets that somebody else accepted."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn

from nbdeploy_server.app import build
from nbdeploy_server.front import Front
from nbdeploy_server.protocol import Connection, whole

KEEP_ALIVE = 75  # seconds: above the idle time of usual proxies, so that the proxy closes first (knative, nginx: 60)


def runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Return what runs the event loop: uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run  # type: ignore[no-any-return] # shipped without types


class Connections:
    """All open connections of one Replica.

    Args:
        front: answers the requests; its pages are made here.
        protocol: what speaks on a connection.
        owner: told by the protocol how many connections are open, asked what a drain wants.
    """

    def __init__(self, front: Front, protocol: type[Connection], owner: Any) -> None:
        front.app = build(front)
        front.whole = whole
        self._front = front
        config = uvicorn.Config(
            front,
            http=protocol,
            ws="none",
            log_level="critical",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._make = functools.partial(
            protocol, config=config, server_state=self._server.server_state, app_state={}, owner=owner
        )
        self._entering: set[asyncio.Task[None]] = set()

    def enter(self, sock: socket.socket) -> None:
        """Serve an accepted socket; called on the loop."""
        task = asyncio.get_running_loop().create_task(self._enter(sock))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    async def _enter(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._make, sock)
        except OSError:  # the client left meanwhile
            sock.close()

    def open(self) -> list[Any]:
        """Return the open connections, each of the protocol's class."""
        return list(self._server.server_state.connections)

    @property
    def entering(self) -> bool:
        """Whether sockets are on their way in."""
        return bool(self._entering)

    @property
    def over(self) -> bool:
        """Whether nothing is open, on its way in, or running."""
        return not (self._server.server_state.connections or self._entering or self._front.metrics.inflight)

    async def tick(self) -> None:
        """Go on for ever, once a second: refresh the Date header, close connections that are idle for too long."""
        ticks = 0
        while True:
            await self._server.on_tick(ticks * 10)
            ticks += 1
            self._front.progress.beat()
            for connection in self.open():
                connection.close_if_idle(KEEP_ALIVE)
            await asyncio.sleep(1.0)
