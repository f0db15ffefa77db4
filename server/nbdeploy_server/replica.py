"""One Replica: load the Bundle, prove itself on the sample, serve the connections that the supervisor hands over."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from nbdeploy_server import channel, parity
from nbdeploy_server.bundle import Bundle
from nbdeploy_server.errors import LoadFailed, ServerError
from nbdeploy_server.front import Front
from nbdeploy_server.metrics import Metrics
from nbdeploy_server.predictor import Predictor, load, notebook_lines
from nbdeploy_server.settings import ReplicaSettings

KEEP_ALIVE = 75  # seconds: above the idle time of usual proxies, so that the proxy closes first (knative, nginx: 60)


def main(argument: dict[str, Any]) -> None:
    """Entry of the process: `argument` is a ReplicaSettings as JSON."""
    began = time.monotonic()
    settings = ReplicaSettings.from_json(argument)
    control = socket.socket(fileno=settings.control)
    try:
        front = _prepare(settings, control)
    except Exception as error:  # noqa: BLE001 - whatever stops the load is the reason that the user must read
        reason = str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
        channel.send(control, channel.encode({"op": "failed", "reason": reason, "lines": notebook_lines(error)}))
        print(f"nbdeploy: {reason}", file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
        sys.exit(3)
    gc.collect()
    gc.freeze()  # the model is not garbage: collections need not walk it
    run = _runner()
    run(Server(settings, control, front, began).serve())
    # Threads of the user's code must not keep a drained Replica alive; logs are flushed first.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _runner() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _prepare(settings: ReplicaSettings, control: socket.socket) -> Front:
    tell = functools.partial(_tell, control)
    bundle = Bundle.open(Path(settings.store), settings.bundle)
    bundle.check_platform()
    tell(text="checking the Bundle")
    bundle.check(full=False)
    tell(text="loading")
    unpacked = Path(settings.unpacked)
    predictor = load(bundle, unpacked)
    folder = unpacked / "files"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if predictor.sample is not None:
        tell(text="warming up")
        _warm_up(predictor)
    lane = predictor.lane(settings.concurrency)
    metrics = Metrics(lane.concurrency)
    return Front(predictor, lane, settings, metrics)


def _tell(control: socket.socket, **message: Any) -> None:
    channel.send(control, channel.encode({"op": "progress", **message}))


def _warm_up(predictor: Predictor) -> None:
    """Answer the sample before serving; with a known answer this is the parity check of this Replica."""
    try:
        answer = predictor.answer_sample()
    except Exception as error:
        lines = "\n".join(notebook_lines(error))
        raise LoadFailed(f"predict raised {type(error).__name__} on the sample: {error}\n{lines}".rstrip()) from error
    if predictor.has_answer:
        found = parity.compare(predictor.answer, answer, loose=True)
        if not found.equal:
            print(f"nbdeploy: the warm-up answered {found.reason} at {found.path or 'the answer'}", file=sys.stderr)  # noqa: T201 - the Replica's log


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
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unsent = b""
        self.orphaned = False  # the supervisor is gone: nobody takes connections back

    async def serve(self) -> None:
        """Serve until drained, or until the supervisor is gone."""
        import uvicorn

        from nbdeploy_server.app import build
        from nbdeploy_server.protocol import HandoverProtocol, whole

        loop = asyncio.get_running_loop()
        front, slots = self._front, self._page.slots
        front.app = build(front)
        front.whole = whole
        config = uvicorn.Config(
            front,
            http=HandoverProtocol,
            ws="none",
            log_level="critical",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        config.load()
        self._uvicorn = server = uvicorn.Server(config)
        self._make = functools.partial(
            HandoverProtocol, config=config, server_state=server.server_state, app_state={}, owner=self
        )

        def count(value: int) -> None:
            slots[channel.INFLIGHT] = value

        front.on_inflight = count
        front.start()
        front.ready = True
        front.metrics.ready_seconds = time.monotonic() - self._began
        loop.add_signal_handler(signal.SIGTERM, self.drain)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # the terminal's Ctrl+C is for the notebook
        self._control.setblocking(False)
        loop.add_reader(self._control, self._orders)
        ticker = asyncio.create_task(self._tick(server))
        self._say({"op": "ready", "seconds": front.metrics.ready_seconds})
        await self._stop.wait()
        ticker.cancel()

    async def _tick(self, server: Any) -> None:
        """Once a second: refresh uvicorn's Date header, close connections that are idle for too long."""
        from nbdeploy_server.protocol import HandoverProtocol

        ticks = 0
        while True:
            await server.on_tick(ticks * 10)
            ticks += 1
            for connection in list(server.server_state.connections):
                if isinstance(connection, HandoverProtocol):
                    connection.close_if_idle(KEEP_ALIVE)
            await asyncio.sleep(1.0)

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
            task = asyncio.get_running_loop().create_task(self._accept(descriptors.pop(0)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif order == channel.DRAIN:
            self.drain()
        elif order == channel.METRICS:
            self._say({"op": "metrics", "text": self._front.metrics.text()})
        elif order in {channel.SPREAD, channel.ALONE}:
            self._front.spread = order == channel.SPREAD

    async def _accept(self, descriptor: int) -> None:
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._make, sock)
        except OSError:  # the client left while it was handed over
            sock.close()

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
            task = asyncio.get_running_loop().create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        from nbdeploy_server.protocol import HandoverProtocol

        loop = asyncio.get_running_loop()
        limit = loop.time() + self._settings.timeout + 5
        state = self._uvicorn.server_state
        told = False
        while loop.time() < limit:
            for connection in list(state.connections):
                if isinstance(connection, HandoverProtocol):
                    connection.release()
            waiting = len(self._tasks) > 1  # connections just handed over, besides this task
            left = [one for one in state.connections if isinstance(one, HandoverProtocol) and one.idle]
            if not told and not waiting and not left:
                told = self._say({"op": "let go"})  # from now on no next request is answered here
            if not state.connections and not waiting and not self._front.metrics.inflight:
                break
            await asyncio.sleep(0.01)
        self._say({"op": "drained"})
        self._stop.set()
