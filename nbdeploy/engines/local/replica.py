"""One Replica seen from its supervisor: the process, its channel, its counters."""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nbdeploy_server import channel

from nbdeploy.engines.local.layout import Layout
from nbdeploy.engines.local.logfile import LogFile
from nbdeploy.process import Identity, launch
from nbdeploy.spec import Revision

MOST_LAST_READS = 64  # of 64 KiB each, from the output of a Replica that has ended


class State(enum.StrEnum):
    """Where a Replica stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class Replica:
    """A child process that serves connections.

    Attributes:
        name: "r<revision>-<count>".
        reason: why it is gone, in words.
        handed: connections given to it.
        turn: when it was last given one; the lowest is next.
        told: every text on its progress, in order: how far it got is told on, however soon it was ready.
        gone: set once the process has ended and its output is read.
        serves: it may be given connections, once ready.
    """

    def __init__(self, name: str, revision: Revision, on_change: Callable[[Replica], None]) -> None:
        self.name = name
        self.revision = revision
        self.state = State.STARTING
        self.reason = ""
        self.told: list[str] = []
        self.handed = 0
        self.turn = 0
        self.started = time.monotonic()
        self.changed = asyncio.Event()
        self.gone = asyncio.Event()
        self.let_go = asyncio.Event()  # drained of idle connections: a next request goes to its successors
        self.serves = False
        self.unwanted = False  # taken away on purpose: its end is no crash
        self.returned: Callable[[socket.socket], None] = lambda sock: sock.close()
        self.failed_reason = ""
        self._on_change = on_change
        self._metrics: list[asyncio.Future[str]] = []
        self._lines = channel.Lines()
        self._descriptors: list[int] = []

    def start(self, layout: Layout, settings: dict[str, Any], log: LogFile) -> None:
        """Start the process; raises OSError where the machine cannot."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        page = channel.Page.create()
        output, their_output = os.pipe()
        how = layout.launch(self.revision.number)
        try:
            self.process = launch(
                "nbdeploy_server.replica:main",
                {**settings, "control": theirs.fileno(), "shared": page},
                path=list(how.path),
                environment=how.environment,
                folder=layout.folder,
                output=their_output,
                descriptors=(theirs.fileno(), page),
                python=how.python,
            )
        except BaseException:
            ours.close()
            os.close(output)
            os.close(page)
            raise
        finally:
            theirs.close()
            os.close(their_output)
        self.identity = Identity.of(self.process.pid)
        self._page = channel.Page(page)
        os.close(page)
        self._log = log
        self._sock, self._output = ours, output
        self._loop = loop = asyncio.get_running_loop()
        ours.setblocking(False)
        os.set_blocking(output, False)
        loop.add_reader(ours, self._read)
        loop.add_reader(output, self._read_output)
        threading.Thread(target=self._wait, name=f"wait-{self.name}", daemon=True).start()

    @property
    def inflight(self) -> int:
        """Requests running or queued."""
        return int(self._page.slots[channel.INFLIGHT]) if self.state is not State.GONE else 0

    @property
    def connections(self) -> int:
        """Open connections, those on their way included."""
        if self.state is State.GONE:
            return 0
        slots = self._page.slots
        return int(slots[channel.CONNECTIONS]) + self.handed - int(slots[channel.ACCEPTED])

    def give(self, sock: socket.socket) -> bool:
        """Hand a connection over; False where the Replica does not take it now."""
        try:
            channel.send(self._sock, channel.CONNECTION, (sock.fileno(),))
        except OSError:  # its channel is full, or it is on its way out: another Replica takes the connection
            return False
        self.handed += 1
        return True

    def order(self, order: bytes) -> None:
        """Send an order; a Replica that is gone needs none."""
        try:
            channel.send(self._sock, order)
        except OSError:
            return

    def drain(self) -> None:
        """Ask it to give back, finish and stop; one that is still loading has nothing to finish."""
        self.unwanted = True
        if self.state is State.STARTING:
            self.state = State.DRAINING
            self.kill()
        elif self.state is State.READY:
            self.state = State.DRAINING
            self.order(channel.DRAIN)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal it and whatever it started: it leads a session of its own."""
        if self.state is not State.GONE:
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                return

    async def metrics(self) -> str:
        """Return its Prometheus text; "" if it does not answer within 2 s."""
        future: asyncio.Future[str] = self._loop.create_future()
        self._metrics.append(future)
        self.order(channel.METRICS)
        try:
            return await asyncio.wait_for(future, 2.0)
        except TimeoutError:
            return ""

    def _read(self) -> None:
        while (got := channel.receive(self._sock)) is not None:
            data, descriptors = got
            if not data:
                self._loop.remove_reader(self._sock)
                return
            self._descriptors += descriptors  # one may come with the first half of its message
            for message in self._lines.feed(data):
                self._told(message)

    def _told(self, message: dict[str, Any]) -> None:
        op = message["op"]
        if op == "back":
            self.returned(socket.socket(fileno=self._descriptors.pop(0)))
        elif op == "metrics":
            for future in self._metrics:
                if not future.done():
                    future.set_result(message["text"])
            self._metrics.clear()
        elif op == "ready":
            if self.state is State.STARTING:
                self.state = State.READY
            self._changed()
        elif op == "let go":
            self.let_go.set()
        elif op == "progress":
            self.told.append(message["text"])
            self._changed()
        elif op == "failed":
            self.failed_reason = "\n".join([message["reason"], *message["lines"]])

    def _changed(self) -> None:
        self.changed.set()
        self._on_change(self)

    def _read_output(self) -> None:
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return
        if data:
            self._log.feed(self.name, data)
        else:
            self._loop.remove_reader(self._output)

    def _wait(self) -> None:
        status = self.process.wait()
        try:
            self._loop.call_soon_threadsafe(self._gone, status)
        except RuntimeError:
            return  # the supervisor has stopped meanwhile

    def _gone(self, status: int) -> None:
        self._read()
        self.kill(signal.SIGKILL)  # children that the user's code left behind
        for _ in range(MOST_LAST_READS):  # one that left the session may print for ever
            if not self._printed():
                break
            self._read_output()
        last = self._log.end(self.name)
        self.state = State.GONE
        self.reason = "" if self.unwanted else _why(status, self.failed_reason, last)
        self.gone.set()
        self.let_go.set()
        self._loop.remove_reader(self._output)
        self._loop.remove_reader(self._sock)
        os.close(self._output)
        self._sock.close()
        self._page.close()
        self._changed()

    def _printed(self) -> bool:
        """Whether the pipe holds bytes, rather than its end; a grandchild may keep it open for ever."""
        import fcntl
        import termios

        count = bytearray(4)
        fcntl.ioctl(self._output, termios.FIONREAD, count)
        return int.from_bytes(count, sys.byteorder) > 0


def _why(status: int, told: str, last: list[str]) -> str:
    """Say why a process ended, in the user's words: what it told itself, and what it last printed."""
    if told:
        cause = told
    elif status < 0:
        name = signal.Signals(-status).name
        cause = {
            signal.SIGKILL: "The Replica was killed (SIGKILL): most often the machine ran out of memory.",
            signal.SIGSEGV: "The Replica crashed inside a C extension (SIGSEGV).",
            signal.SIGABRT: "The Replica was aborted inside a C extension (SIGABRT).",
        }.get(signal.Signals(-status), f"The Replica was ended by {name}.")
    else:
        cause = f"The Replica exited with status {status}."
    words = "\n".join(f"  {line}" for line in last[-8:] if not line.startswith("nbdeploy: "))
    return cause + (f"\nIt last printed:\n{words}" if words else "")
