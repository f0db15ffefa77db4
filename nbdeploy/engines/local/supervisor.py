"""The supervisor of one local Endpoint: accepts connections, hands each to a ready Replica, swaps Revisions, restarts
what crashes. It never reads a request: there is no proxy hop, and an update refuses and cuts nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from nbdeploy_server import channel

from nbdeploy.engines.local import orphans
from nbdeploy.engines.local.layout import Layout
from nbdeploy.engines.local.listener import Listener
from nbdeploy.engines.local.logfile import LogFile
from nbdeploy.engines.local.refusal import refuse
from nbdeploy.engines.local.replica import Replica, State
from nbdeploy.engines.loopback import PortTakenError
from nbdeploy.process import Identity, resident
from nbdeploy.spec import Phase, Revision

SHORT = 70  # bytes that leave room for the rest of a socket's path, on macOS (104) too
LET_GO = 3.0  # seconds an update waits at most for the old Replicas to hand their idle connections back
STABLE = 60.0  # seconds a Replica must live for its earlier crashes to be forgotten
MAX_BACKOFF = 30.0  # seconds between restarts at most
GIVE_UP = 6  # crashes in a row after which the phase is "failed"; restarts go on

Tell = Callable[[dict[str, Any]], None]


class ApplyError(Exception):
    """A Revision could not be made to serve; the message is for the user."""


def main(argument: dict[str, Any]) -> None:
    """Entry of the process: {"home", "name"}."""
    asyncio.run(Supervisor(Layout(Path(argument["home"]), argument["name"])).run())
    os._exit(0)


class Supervisor:
    """Listener, Replicas and control socket of one Endpoint."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._log = LogFile(layout.logs)
        self._listener = Listener(self._serving, lambda: self._crashes >= GIVE_UP or self._stopping.is_set())
        self._revision: Revision | None = None
        self._replicas: list[Replica] = []
        self._crashes = 0
        self._last_crash = 0.0
        self._reason = ""
        self._count = 0
        self._applying = ""
        self._change = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._abandoned: TextIO | None = None  # the Endpoint's lock, once nobody is left who wants this supervisor

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve orders until told to stop."""
        folder = _short_folder()
        control = folder / "control"
        server = await asyncio.start_unix_server(self._serve_control, path=str(control), limit=1 << 20)
        record = {"identity": Identity.of(os.getpid()).to_json(), "control": str(control)}
        self._layout.write("supervisor.json", record)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        orphans.adopt()
        self._task(self._sweep())
        try:
            await self._stopping.wait()
            await self._shut_down()
        finally:
            server.close()
            shutil.rmtree(folder, ignore_errors=True)
            self._log.close()
            if self._abandoned is not None:
                if self._layout.serving() == 0:
                    shutil.rmtree(self._layout.folder, ignore_errors=True)
                self._abandoned.close()

    def _task(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _shut_down(self) -> None:
        """Refuse new connections, let what runs finish, then end what is left."""
        self._listener.close()
        self._revision = None
        self._listener.refuse_all()
        for replica in self._replicas:
            replica.returned = refuse
            replica.drain()
        await self._until_gone(list(self._replicas), 10.0)
        orphans.end()

    async def _until_gone(self, replicas: list[Replica], patience: float) -> None:
        """Wait for Replicas that drain; those that take too long are killed."""
        for seconds in (patience, 5.0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    for replica in replicas:
                        await replica.gone.wait()
            for replica in replicas:
                replica.kill()

    async def _sweep(self) -> None:
        """Look after what waits and what is left over.

        A supervisor whose folder was removed, or whose deploy was killed before anything served, stops itself.
        """
        for ticks in itertools.count(1):
            await asyncio.sleep(0.25)
            self._listener.sweep()
            if ticks % 120 == 0:  # every 30 s
                orphans.reap(replica.process.pid for replica in self._replicas)
            if not (self._layout.folder / "supervisor.json").exists():
                self._stopping.set()
            elif self._revision is None and not self._change.locked() and not self._stopping.is_set():
                # whoever is about to give an order holds the lock
                self._abandoned = self._layout.try_lock()
                if self._abandoned is not None:
                    self._stopping.set()

    # -- Replicas -----------------------------------------------------------------------------------------------

    def _settings(self, revision: Revision) -> dict[str, Any]:
        layout, serving = self._layout, revision.serving
        key = "" if serving.public else layout.key()
        return {
            "store": str(layout.store),
            "bundle": revision.bundle,
            "unpacked": str(layout.store / "unpacked" / revision.bundle.partition(":")[2]),
            "name": revision.name,
            "revision": revision.number,
            "key_sha256": hashlib.sha256(key.encode()).hexdigest() if key else "",
            "concurrency": serving.concurrency,
            "target_in_flight": revision.autoscaling.target_in_flight or 0,
            "queue": serving.queue,
            "timeout": serving.timeout,
            "cors": list(serving.cors),
        }

    def _spawn(self, revision: Revision) -> Replica:
        self._count += 1
        replica = Replica(f"r{revision.number}-{self._count}", revision, self._changed)
        replica.returned = self._listener.hand
        try:
            replica.start(self._layout, self._settings(revision), self._log)
        except (OSError, KeyError, ValueError) as error:  # no such interpreter, no process left, a damaged launch file
            raise ApplyError(f"A Replica cannot be started: {error}. Deploy again.") from error
        self._replicas.append(replica)
        self._record()
        return replica

    def _record(self) -> None:
        """Keep the list of Replicas on disk true."""
        with contextlib.suppress(OSError):  # the folder is being removed
            self._layout.record_replicas([replica.identity for replica in self._replicas])

    def _changed(self, replica: Replica) -> None:
        """React to a Replica that became ready or is gone."""
        if replica.state is State.READY:
            if self._revision is not None and self._revision.number == replica.revision.number:
                self._serve_with(replica)
        elif replica.state is State.GONE and replica in self._replicas:
            self._replicas.remove(replica)
            self._record()
            self._spread()
            current = self._revision
            if current is not None and replica.revision.number == current.number and replica.reason:
                self._restart(replica, current)

    def _serving(self) -> list[Replica]:
        """Return the Replicas that get connections: a new Revision's only once all of them are ready."""
        return [one for one in self._replicas if one.state is State.READY and one.serves]

    def _serve_with(self, replica: Replica) -> None:
        replica.serves = True
        self._spread()
        self._listener.hand_waiting()

    def _spread(self) -> None:
        """Tell Replicas whether others could take their connections."""
        ready = self._serving()
        for one in ready:
            one.order(channel.SPREAD if len(ready) > 1 else channel.ALONE)

    def _restart(self, replica: Replica, revision: Revision) -> None:
        """Start a crashed Replica again, later and later while it keeps crashing."""
        now = time.monotonic()
        self._crashes = 1 if now - self._last_crash > STABLE else self._crashes + 1
        self._last_crash = now
        self._reason = replica.reason
        print(f"nbdeploy: {replica.name} is gone: {replica.reason}", file=sys.stderr, flush=True)  # noqa: T201 - the supervisor's log
        delay = min(MAX_BACKOFF, 0.1 * 4 ** (self._crashes - 1))
        self._task(self._restart_after(delay, revision))

    async def _restart_after(self, delay: float, revision: Revision) -> None:
        await asyncio.sleep(delay)
        current = self._revision
        if current is None or current.number != revision.number or self._stopping.is_set():
            return
        alive = [
            one for one in self._replicas if one.revision.number == current.number and one.state is not State.DRAINING
        ]
        if len(alive) < max(1, current.autoscaling.min_replicas):
            try:
                self._spawn(current)
            except ApplyError as error:
                self._reason = str(error)
                self._task(self._restart_after(MAX_BACKOFF, revision))

    # -- orders -------------------------------------------------------------------------------------------------

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(message: dict[str, Any]) -> None:
            writer.write(channel.encode(message))

        with contextlib.suppress(ConnectionError):
            order = json.loads(await reader.readline() or b"{}")
            try:
                await self._obey(order, tell, reader)
            except ApplyError as error:
                tell({"op": "failed", "reason": str(error)})
            except Exception as error:  # noqa: BLE001 - a fault of nbdeploy: whoever waits for the answer must hear of it
                traceback.print_exc()
                words = f"The supervisor failed: {type(error).__name__}: {error}. Its log has the traceback."
                tell({"op": "failed", "reason": words})
            await writer.drain()
            writer.close()

    async def _obey(self, order: dict[str, Any], tell: Tell, reader: asyncio.StreamReader) -> None:
        op = order.get("op")
        if op == "apply":
            async with self._change:
                await self._apply(self._layout.revision(order["revision"]), tell, reader)
            tell({"op": "done"})
        elif op == "status":
            tell({"op": "done", "status": self._status()})
        elif op == "scrape":
            replicas = [one for one in self._replicas if one.state in {State.READY, State.DRAINING}]
            texts = await asyncio.gather(*(one.metrics() for one in replicas))
            # A Replica that is silent is left out: without its counters, "" would pass for zeros in a sum.
            found = {one.name: text for one, text in zip(replicas, texts, strict=True) if text}
            tell({"op": "done", "metrics": found})
        elif op == "settle":
            async with self._change:
                tell({"op": "done"})
        elif op == "stop":
            self._stopping.set()
            tell({"op": "done"})
        else:
            raise ApplyError(f"This supervisor knows no order {op!r}; it may be of another version of nbdeploy.")

    async def _apply(self, revision: Revision, tell: Tell, reader: asyncio.StreamReader) -> None:
        """Make a Revision serve; what served before does so until its successors are ready."""
        current = self._revision
        wanted = max(1, revision.autoscaling.min_replicas)
        if current is not None and self._same_replicas(current, revision):
            await self._resize(current, revision, wanted, tell, reader)
        else:
            self._listen_if_free(revision)
            await self._replace(revision, wanted, tell, reader)
        self._reason, self._crashes = "", 0

    def _same_replicas(self, current: Revision, revision: Revision) -> bool:
        """Whether running Replicas can go on: same Revision but for their number, started in the same way."""
        try:
            alike = self._layout.launch(current.number) == self._layout.launch(revision.number)
        except KeyError:  # pruned
            return False
        return alike and current.same_replicas(revision)

    def _commit(self, revision: Revision) -> None:
        self._revision = revision
        self._layout.commit(revision.number, self._listener.port)

    def _listen_if_free(self, revision: Revision) -> None:
        """Find out that a port is taken before the model is loaded, not after."""
        if not self._listener.port:
            self._listen(revision)

    def _listen(self, revision: Revision) -> None:
        try:
            self._listener.open(revision.serving.port, int(self._layout.read("endpoint.json").get("port", 0)))
        except PortTakenError as error:
            raise ApplyError(str(error)) from error

    async def _replace(self, revision: Revision, wanted: int, tell: Tell, reader: asyncio.StreamReader) -> None:
        self._applying = f"starting revision {revision.number}"
        fresh: list[Replica] = []
        try:
            fresh += (self._spawn(revision) for _ in range(wanted))
            await self._until_ready(fresh, tell, reader)
            self._listen(revision)
        except BaseException:
            for replica in fresh:
                replica.unwanted = True
                replica.kill()
            if self._revision is None:
                self._listener.close()
            raise
        finally:
            self._applying = ""
        old = [one for one in self._replicas if one not in fresh]
        self._commit(revision)
        for replica in fresh:
            self._serve_with(replica)
        for replica in old:
            replica.drain()
        patience = max((one.revision.serving.timeout for one in old), default=0.0) + 15
        self._task(self._until_gone(old, patience))
        # Done means that a next request is answered by this Revision, on a connection that is kept open too.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LET_GO):
                for replica in old:
                    await replica.let_go.wait()

    async def _resize(
        self, current: Revision, revision: Revision, wanted: int, tell: Tell, reader: asyncio.StreamReader
    ) -> None:
        """Only the number of Replicas changes: none is restarted."""
        mine = [one for one in self._replicas if one.state in {State.STARTING, State.READY}]
        fresh: list[Replica] = []
        try:
            fresh += (self._spawn(revision) for _ in range(wanted - len(mine)))
            # One that crashed and is being restarted counts too: ready means all of them.
            await self._until_ready([one for one in mine if one.state is State.STARTING] + fresh, tell, reader)
            self._listen(revision)
        except BaseException:
            for replica in fresh:
                replica.unwanted = True
                replica.kill()
            raise
        for replica in mine:
            replica.revision = revision
        self._commit(revision)
        for replica in fresh:
            self._serve_with(replica)
        mine = [one for one in mine if one.state is not State.GONE]
        spare = sorted(mine, key=lambda one: (one.state is State.READY, one.inflight))[: max(0, len(mine) - wanted)]
        for replica in spare:
            replica.drain()
        self._spread()
        self._task(self._until_gone(spare, current.serving.timeout + 15))

    async def _until_ready(self, fresh: list[Replica], tell: Tell, reader: asyncio.StreamReader) -> None:
        """Wait for new Replicas; one that ends, or an asker that leaves, ends it all.

        Each text on their progress is told once, also where they were ready or gone before anybody looked.
        """
        left = asyncio.ensure_future(reader.read())
        try:
            said: set[str] = set()
            while True:
                for text in itertools.chain.from_iterable(replica.told for replica in fresh):
                    if text not in said:
                        said.add(text)
                        tell({"op": "progress", "text": text})
                if all(replica.state is State.READY for replica in fresh):
                    return
                for replica in fresh:
                    if replica.state is State.GONE:
                        raise ApplyError(replica.reason or "The Replica ended before it was ready.")
                if left.done():
                    raise ApplyError("The deploy was cancelled.")
                waits = [asyncio.ensure_future(replica.changed.wait()) for replica in fresh]
                await asyncio.wait([*waits, left], timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                for replica in fresh:
                    replica.changed.clear()
        finally:
            left.cancel()

    def _status(self) -> dict[str, Any]:
        revision = self._revision
        ready = self._serving()
        desired = max(1, revision.autoscaling.min_replicas) if revision is not None else 0
        phase, reason = self._phase(revision, len(ready), desired)
        return {
            "phase": phase,
            "reason": reason,
            "revision": revision.number if revision is not None else 0,
            "port": self._listener.port,
            "ready": len(ready),
            "desired": desired,
            "in_flight": sum(one.inflight for one in self._replicas),
            "memory_bytes": sum(resident(one.process.pid) for one in self._replicas if one.state is not State.GONE),
            "replicas": [
                {
                    "name": one.name,
                    "pid": one.process.pid,
                    "state": one.state,
                    "in_flight": one.inflight,
                    "connections": one.connections,
                }
                for one in self._replicas
            ],
        }

    def _phase(self, revision: Revision | None, ready: int, desired: int) -> tuple[Phase, str]:
        if revision is None:
            return Phase.STARTING, self._applying or "the first Replica has not started yet"
        if ready >= desired:
            return Phase.READY, self._applying or (f"restarted after: {self._reason}" if self._reason else "")
        if ready:
            return Phase.READY, f"{ready} of {desired} Replicas ready. {self._reason}".rstrip()
        if self._crashes >= GIVE_UP:
            return Phase.FAILED, f"crashed {self._crashes} times in a row. {self._reason}"
        return Phase.STARTING, self._reason or self._applying or "restarting"


def _short_folder() -> Path:
    """Make a folder for the control socket: the path of a Unix socket holds 108 bytes, a home or TMPDIR may not."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="nbdeploy-", dir=folder if len(os.fsencode(folder)) < SHORT else "/tmp"))  # noqa: S108 - mkdtemp makes it private
