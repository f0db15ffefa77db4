"""Lanes: where predict runs. User code never runs on the event loop.

`ThreadLane` has one model thread per concurrent call; `AsyncLane` runs coroutine functions on a loop of its own. Both
take `Work` and hand it back on the server's loop. The slot belongs to the work, not to its caller: a caller that left
or timed out frees nothing until the work is really done. (The process lane will be a third class with these methods.)
"""

from __future__ import annotations

import asyncio
import collections
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

# Items a generator may be ahead of its reader.
STREAM_AHEAD = 256


class Work:
    """One call on its way through a lane.

    The front fills `arguments` (or `prepare`, which makes them in the lane when the body is large) and `encode`; the
    lane fills the times (perf_counter seconds) and either `result` or `error`.
    """

    __slots__ = (
        "abandoned",
        "admitted",
        "arguments",
        "cycle",
        "deadline",
        "encode",
        "ended",
        "error",
        "events",
        "finished",
        "future",
        "predicted",
        "prepare",
        "result",
        "room",
        "started",
        "task",
        "wake",
    )

    def __init__(self, future: asyncio.Future[None], cycle: Any, deadline: float) -> None:
        self.future = future
        self.cycle = cycle
        self.deadline = deadline
        self.admitted = time.perf_counter()
        self.arguments: dict[str, Any] = {}
        self.prepare: Callable[[], dict[str, Any]] | None = None
        self.encode: Callable[[Any], bytes] = bytes
        self.started = self.predicted = self.ended = 0.0
        self.result: Any = None
        self.error: BaseException | None = None
        self.abandoned = ""  # the stage at which the caller was found gone
        self.finished = False
        self.task: asyncio.Task[None] | None = None
        # Of a stream only: encoded items not yet sent, room for more, and the loop's wake-up.
        self.events: collections.deque[bytes] | None = None
        self.room: threading.Semaphore | None = None
        self.wake: asyncio.Event | None = None

    def gone(self) -> bool:
        """Whether the caller has left; uvicorn keeps that as a plain flag of the request's cycle."""
        return bool(getattr(self.cycle, "disconnected", False))

    def stream(self) -> None:
        """Make this work a stream: items are sent while the generator runs."""
        self.events = collections.deque()
        self.room = threading.Semaphore(STREAM_AHEAD)
        self.wake = asyncio.Event()


class Lane(Protocol):
    """What the front needs of a lane."""

    concurrency: int

    def start(self, loop: asyncio.AbstractEventLoop, on_done: Callable[[Work], None]) -> None:
        """Begin to take work; `on_done` is called on `loop` for each work that is really done."""

    def submit(self, work: Work) -> None:
        """Queue one call; called on the loop."""

    def cancel(self, work: Work) -> None:
        """Ask running work to stop, where the lane can."""


class Delivery:
    """Hands finished work back to the loop, with one wake-up per burst."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_done: Callable[[Work], None]) -> None:
        self._loop = loop
        self._on_done = on_done
        self._done: collections.deque[Work] = collections.deque()
        self._moved: collections.deque[Work] = collections.deque()
        self._woken = False

    def done(self, work: Work) -> None:
        """Tell the loop that work is finished; from any thread."""
        self._done.append(work)
        self._wake()

    def moved(self, work: Work) -> None:
        """Tell the loop that a stream has something to send; from any thread."""
        self._moved.append(work)
        self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError:
                return  # the loop has closed under an abandoned thread: nobody waits any more

    def _flush(self) -> None:
        self._woken = False  # first: what is appended from here on wakes again
        while self._moved:
            work = self._moved.popleft()
            if work.wake is not None:
                work.wake.set()
        while self._done:
            work = self._done.popleft()
            work.finished = True
            if work.wake is not None:
                work.wake.set()
            if not work.future.done():
                work.future.set_result(None)
            self._on_done(work)


class ThreadLane:
    """Synchronous functions and generators, on `concurrency` threads that live as long as the Replica."""

    def __init__(self, call: Callable[..., Any], *, concurrency: int, streams: bool) -> None:
        self.concurrency = concurrency
        self._call = call
        self._streams = streams
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._fresh: list[Work] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_done: Callable[[Work], None]) -> None:
        """Start the model threads."""
        self._loop = loop
        delivery = Delivery(loop, on_done)
        for number in range(self.concurrency):
            threading.Thread(target=self._run, args=(delivery,), name=f"predict-{number}", daemon=True).start()

    def submit(self, work: Work) -> None:
        """Queue one call; those of one turn of the loop wake the thread once, not one by one."""
        if not self._fresh and self._loop is not None:
            self._loop.call_soon(self._wake)
        self._fresh.append(work)

    def _wake(self) -> None:
        for work in self._fresh:
            self._queue.put(work)
        self._fresh.clear()

    def cancel(self, work: Work) -> None:
        """A thread cannot be stopped; a stream stops at its next item, because `gone` is asked between items."""

    def _run(self, delivery: Delivery) -> None:
        take, call, now = self._queue.get, self._call, time.perf_counter
        while True:
            work = take()
            work.started = now()
            if work.gone():
                work.abandoned = "queued"
            elif work.started > work.deadline:
                work.abandoned = "expired"
            else:
                try:
                    if work.prepare is not None:
                        work.arguments = work.prepare()
                        work.started = now()
                    value = call(**work.arguments)
                    if self._streams:
                        value = self._drain(work, value, delivery)
                    work.predicted = now()
                    if work.events is None:
                        work.result = work.encode(value)
                except BaseException as error:  # noqa: BLE001 - user code may raise anything; the caller gets it as a 500
                    work.error = error
                    work.predicted = work.predicted or now()
            work.ended = now()
            work.arguments = {}
            delivery.done(work)
            del work  # the last call's arrays must not stay alive while the lane is idle

    def _drain(self, work: Work, items: Iterator[Any], delivery: Delivery) -> list[Any] | None:
        """Run a generator to its end, or until its caller has left."""
        if work.events is None or work.room is None:
            collected = []
            for item in items:
                collected.append(item)
                if work.gone():
                    work.abandoned = "running"
                    break
            return collected
        for item in items:
            work.events.append(work.encode(item))
            delivery.moved(work)
            while not work.room.acquire(timeout=0.5):
                if work.gone() or work.abandoned:
                    break
            if work.gone() or work.abandoned:
                work.abandoned = work.abandoned or "running"
                close = getattr(items, "close", None)
                if close is not None:
                    close()
                break
        return None


class AsyncLane:
    """Coroutine functions and async generators, on an event loop in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *, concurrency: int, streams: bool) -> None:
        self.concurrency = concurrency
        self._call = call
        self._streams = streams
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(concurrency)
        self._delivery: Delivery | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_done: Callable[[Work], None]) -> None:
        """Start the loop's thread."""
        self._delivery = Delivery(loop, on_done)
        threading.Thread(target=self._loop.run_forever, name="predict-async", daemon=True).start()

    def submit(self, work: Work) -> None:
        """Queue one call."""
        self._loop.call_soon_threadsafe(self._create, work)

    def cancel(self, work: Work) -> None:
        """Cancel the coroutine at its next await."""
        self._loop.call_soon_threadsafe(self._cancel, work)

    def _create(self, work: Work) -> None:
        work.task = self._loop.create_task(self._one(work))

    @staticmethod
    def _cancel(work: Work) -> None:
        if work.task is not None:
            work.task.cancel()

    async def _one(self, work: Work) -> None:
        delivery = self._delivery
        if delivery is None:
            raise RuntimeError("the lane was not started")
        now = time.perf_counter
        try:
            async with self._slots:
                work.started = now()
                if work.gone():
                    work.abandoned = "queued"
                elif work.started > work.deadline:
                    work.abandoned = "expired"
                else:
                    await self._predict(work, delivery)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything, cancellation included
            work.error = error
        work.ended = now()
        work.predicted = work.predicted or work.ended
        work.started = work.started or work.ended
        work.arguments = {}
        delivery.done(work)

    async def _predict(self, work: Work, delivery: Delivery) -> None:
        if work.prepare is not None:
            work.arguments = work.prepare()
            work.started = time.perf_counter()
        value = self._call(**work.arguments)
        if not self._streams:
            value = await value if inspect.isawaitable(value) else value
        elif work.events is None:
            value = [item async for item in value]
        else:
            async for item in value:
                work.events.append(work.encode(item))
                delivery.moved(work)
                while work.room is not None and not work.room.acquire(blocking=False):
                    await asyncio.sleep(0.005)
                    if work.gone():
                        break
                if work.gone() or work.abandoned:
                    work.abandoned = work.abandoned or "running"
                    await value.aclose()
                    break
        work.predicted = time.perf_counter()
        if work.events is None:
            work.result = work.encode(value)
