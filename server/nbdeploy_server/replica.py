"""One Replica: load the Bundle, prove itself on the sample, serve the connections that the supervisor hands over."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import sys
import time
from typing import Any

from nbdeploy_server import channel, failure
from nbdeploy_server.connections import Connections, runner
from nbdeploy_server.front import Front
from nbdeploy_server.loading import prepare
from nbdeploy_server.progress import DRAINING, READY
from nbdeploy_server.protocol import HandoverProtocol
from nbdeploy_server.settings import ReplicaSettings


def main(argument: dict[str, Any]) -> None:
    """Entry of the process: `argument` is a ReplicaSettings as JSON."""
    began = time.monotonic()
    settings = ReplicaSettings.from_json(argument)
    control = socket.socket(fileno=settings.control)
    try:
        front = prepare(settings, functools.partial(_tell, control))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever stops the load is the reason that the user must read
        reason = failure.reason(error)
        channel.send(control, channel.encode({"op": "failed", "reason": reason, "lines": []}))
        print(f"nbdeploy: {reason}", file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
        sys.exit(3)
    runner()(Server(settings, control, front, began).serve())
    # Threads of the user's code must not keep a drained Replica alive; logs are flushed first.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tell(control: socket.socket, _phase: str, text: str) -> None:
    channel.send(control, channel.encode({"op": "progress", "text": text}))


class Server:
    """uvicorn's protocol over connections that come by descriptor.

    Draining hands idle connections back to the supervisor instead of closing them: a client that sends its next
    request just then must not see a reset.
    """

    def __init__(self, settings: ReplicaSettings, control: socket.socket, front: Front, began: float) -> None:
        self._settings = settings
        self._control = control
        self._front = front
        self._began = began
        self._page = channel.Page(settings.shared)
        self._stop = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None
        self._unsent = b""
        self.orphaned = False  # the supervisor is gone: nobody takes connections back

    async def serve(self) -> None:
        """Serve until drained, or until the supervisor is gone."""
        loop = asyncio.get_running_loop()
        front, slots = self._front, self._page.slots
        self._connections = Connections(front, HandoverProtocol, self)

        def count(value: int) -> None:
            slots[channel.INFLIGHT] = value

        front.on_inflight = count
        front.start()
        front.ready = True
        front.progress.enter(READY, front.note)
        front.metrics.ready_seconds = time.monotonic() - self._began
        loop.add_signal_handler(signal.SIGTERM, self.drain)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # the terminal's Ctrl+C is for the notebook
        self._control.setblocking(False)
        loop.add_reader(self._control, self._orders)
        ticker = asyncio.create_task(self._connections.tick())
        self._say({"op": "ready", "seconds": front.metrics.ready_seconds})
        await self._stop.wait()
        ticker.cancel()

    def _say(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> bool:
        """Tell the supervisor; False where it does not take it now, which a message without descriptors outwaits."""
        data = channel.encode(message)
        if self._unsent:
            if not descriptors:
                self._unsent += data
            return not descriptors
        try:
            sent = channel.send(self._control, data, descriptors)
        except (BlockingIOError, ConnectionError):
            return False
        if sent < len(data):  # a long text, and a supervisor that is behind: half a line must not stay alone
            self._unsent = data[sent:]
            asyncio.get_running_loop().add_writer(self._control, self._say_rest)
        return True

    def _say_rest(self) -> None:
        try:
            self._unsent = self._unsent[channel.send(self._control, self._unsent) :]
        except BlockingIOError:
            return
        except ConnectionError:
            self._unsent = b""
        if not self._unsent:
            asyncio.get_running_loop().remove_writer(self._control)

    def _orders(self) -> None:
        while (got := channel.receive(self._control)) is not None:
            data, descriptors = got
            if not data:  # the supervisor is gone: finish what is running, take nothing new
                asyncio.get_running_loop().remove_reader(self._control)
                self.orphaned = True
                self.drain()
                return
            for order in data:
                self._obey(bytes([order]), descriptors)

    def _obey(self, order: bytes, descriptors: list[int]) -> None:
        if order == channel.CONNECTION:
            self._page.slots[channel.ACCEPTED] += 1
            self._connections.enter(socket.socket(fileno=descriptors.pop(0)))
        elif order == channel.DRAIN:
            self.drain()
        elif order == channel.METRICS:
            self._say({"op": "metrics", "text": self._front.metrics.text()})
        elif order in {channel.SPREAD, channel.ALONE}:
            self._front.spread = order == channel.SPREAD

    def connections_changed(self, count: int) -> None:
        """Tell the supervisor how many connections are open."""
        self._page.slots[channel.CONNECTIONS] = count

    def give_back(self, descriptor: int) -> bool:
        """Hand an idle connection back; False where the supervisor does not take it."""
        return self._say({"op": "back"}, (descriptor,))

    @property
    def draining(self) -> bool:
        """Whether this Replica is being replaced."""
        return self._front.draining

    def drain(self) -> None:
        """Give idle connections back, finish what is running, then stop."""
        if not self._front.draining:
            self._front.draining = True
            self._front.progress.enter(DRAINING)
            self._leaving = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._settings.timeout + 5
        connections = self._connections
        told = False
        while loop.time() < limit:
            for connection in connections.open():
                connection.release()
            left = [one for one in connections.open() if one.idle]
            if not told and not connections.entering and not left:
                told = self._say({"op": "let go"})  # from now on no next request is answered here
            if connections.over:
                break
            await asyncio.sleep(0.01)
        self._say({"op": "drained"})
        self._stop.set()
