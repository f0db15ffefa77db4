"""Lanes: what runs where, in which order, and what becomes of work that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from nbdeploy_server import wire
from nbdeploy_server.lanes import STREAM_AHEAD, AsyncLane, ThreadLane, Work

from tests.conftest import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from nbdeploy_server.lanes import Lane


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - another thread's state has no event of this loop
            await asyncio.sleep(0.001)


@dataclass
class Caller:
    """A caller that may leave."""

    disconnected: bool = False


@dataclass
class Bench:
    """A lane on a running loop, with what it has finished."""

    lane: Lane
    done: list[Work] = field(default_factory=list)

    def work(self, seconds: float = DEADLINE, caller: Caller | None = None, **arguments: Any) -> Work:
        """Make work for the lane; stream it where asked."""
        loop = asyncio.get_running_loop()
        work = Work(loop.create_future(), caller or Caller(), time.perf_counter() + seconds)
        work.arguments = arguments
        work.encode = wire.to_json
        return work

    def submit(self, **options: Any) -> Work:
        """Make work and queue it."""
        work = self.work(**options)
        self.lane.submit(work)
        return work

    async def finished(self, work: Work) -> Work:
        """Wait until the work is really done."""
        await until(lambda: work in self.done)
        return work


def on_loop(lane: Lane, test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a loop with a started lane."""

    async def run() -> None:
        bench = Bench(lane)
        lane.start(asyncio.get_running_loop(), bench.done.append)
        await test(bench)

    asyncio.run(run())


def double(x: float) -> float:
    """Return at once."""
    return x * 2


async def slowly_double(x: float, seconds: float = 0.0) -> float:
    """Return after a while."""
    await asyncio.sleep(seconds)
    return x * 2


def raises(x: Any) -> Any:
    """End the process, as a careless predict does."""
    raise SystemExit(x)


@pytest.mark.parametrize(
    "lane",
    [
        ThreadLane(double, concurrency=1, streams=False),
        ThreadLane(double, concurrency=3, streams=False),
        AsyncLane(slowly_double, concurrency=1, streams=False),
        AsyncLane(slowly_double, concurrency=32, streams=False),
    ],
    ids=["thread", "threads", "coroutine", "coroutines"],
)
def test_answers_reach_their_callers(lane: Lane) -> None:
    """Each of many calls gets its own answer, with its times in order, and is done exactly once."""

    async def test(bench: Bench) -> None:
        works = [bench.submit(x=float(number)) for number in range(200)]
        for number, work in enumerate(works):
            await work.future
            assert work.result == wire.to_json(number * 2.0)
            assert work.admitted <= work.started <= work.predicted <= work.ended
        assert len(bench.done) == 200
        assert all(work.arguments == {} for work in works)

    on_loop(lane, test)


def test_concurrency_of_threads() -> None:
    """`concurrency` calls run at once, and not one more."""
    running, most, lock, together = 0, 0, threading.Lock(), threading.Barrier(3, timeout=DEADLINE)

    def predict() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait()
        time.sleep(0.05)  # for a fourth one to come in, if it could
        with lock:
            running -= 1

    async def test(bench: Bench) -> None:
        await asyncio.gather(*(bench.submit().future for _ in range(9)))

    on_loop(ThreadLane(predict, concurrency=3, streams=False), test)
    assert most == 3


def test_concurrency_of_coroutines() -> None:
    """The semaphore of the async lane holds as well."""
    running = most = 0

    async def predict() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    async def test(bench: Bench) -> None:
        await asyncio.gather(*(bench.submit().future for _ in range(12)))

    on_loop(AsyncLane(predict, concurrency=4, streams=False), test)
    assert most == 4


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_callers_that_left_or_came_too_late(kind: str) -> None:
    """Queued work is not started for a caller that left, nor after its deadline."""
    ran: list[str] = []
    gate = threading.Event()

    def predict(name: str) -> None:
        ran.append(name)
        gate.wait(DEADLINE)

    async def apredict(name: str) -> None:
        ran.append(name)
        await asyncio.to_thread(gate.wait, DEADLINE)

    async def test(bench: Bench) -> None:
        caller = Caller()
        bench.submit(name="first")
        gone = bench.submit(caller=caller, name="gone")
        late = bench.submit(seconds=0.0, name="late")
        last = bench.submit(name="last")
        await until(lambda: ran)
        caller.disconnected = True
        gate.set()
        await bench.finished(last)
        assert (gone.abandoned, late.abandoned, last.abandoned) == ("queued", "expired", "")

    lane = (
        ThreadLane(predict, concurrency=1, streams=False)
        if kind == "thread"
        else AsyncLane(apredict, concurrency=1, streams=False)
    )
    on_loop(lane, test)
    assert ran == ["first", "last"]


@pytest.mark.parametrize("failing", ["predict", "prepare", "encode"])
def test_whatever_is_raised_is_the_work_s_error(failing: str) -> None:
    """SystemExit, a body that cannot be decoded, an answer that cannot be encoded: the lane goes on."""

    def fail(*_arguments: Any) -> Any:
        raise SystemExit(failing)

    async def test(bench: Bench) -> None:
        work = bench.work(x=1)
        if failing == "prepare":
            work.prepare = fail
        if failing == "encode":
            work.encode = fail
        bench.lane.submit(work)
        await work.future
        assert isinstance(work.error, SystemExit)
        following = bench.submit(x=2)
        await following.future
        assert following.result == b"4" or failing == "predict"

    call = raises if failing == "predict" else double
    on_loop(ThreadLane(call, concurrency=1, streams=False), test)


def test_large_bodies_are_decoded_in_the_lane() -> None:
    """`prepare` runs on the model's thread, not on the loop."""
    threads = []

    def prepare() -> dict[str, Any]:
        threads.append(threading.current_thread())
        return {"x": 3}

    async def test(bench: Bench) -> None:
        work = bench.work()
        work.prepare = prepare
        bench.lane.submit(work)
        await work.future
        assert work.result == b"6"
        assert threads[0] is not threading.current_thread()

    on_loop(ThreadLane(double, concurrency=1, streams=False), test)


def test_nothing_of_a_call_stays_alive() -> None:
    """Arguments and results of the last call are not held while the lane is idle."""
    import gc
    import weakref

    class Big:
        pass

    async def test(bench: Bench) -> None:
        big = Big()
        seen = weakref.ref(big)
        work = bench.submit(x=big)
        await work.future
        bench.done.clear()
        del big, work
        await until(lambda: gc.collect() >= 0 and seen() is None)

    on_loop(ThreadLane(lambda x: None, concurrency=1, streams=False), test)  # noqa: ARG005 - takes what it is given


class Source:
    """A generator function that tells how far it came and whether it was closed."""

    def __init__(self) -> None:
        self.given = 0
        self.closed = threading.Event()

    def items(self, count: int) -> Iterator[int]:
        try:
            for number in range(count):
                self.given = number + 1
                yield number
        finally:
            self.closed.set()

    async def aitems(self, count: int) -> AsyncIterator[int]:
        try:
            for number in range(count):
                self.given = number + 1
                yield number
                await asyncio.sleep(0)
        finally:
            self.closed.set()


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_a_generator_does_not_run_far_ahead(kind: str) -> None:
    """A slow reader holds the generator; one that leaves closes it and frees the slot."""
    source = Source()

    async def test(bench: Bench) -> None:
        caller = Caller()
        work = bench.work(caller=caller, count=100_000)
        work.stream()
        bench.lane.submit(work)
        await until(lambda: source.given > STREAM_AHEAD)
        assert source.given <= STREAM_AHEAD + 2
        assert not work.finished
        caller.disconnected = True
        await bench.finished(work)
        assert source.closed.is_set()
        assert work.abandoned == "running"
        assert source.given <= STREAM_AHEAD + 2

    lane = (
        ThreadLane(source.items, concurrency=1, streams=True)
        if kind == "thread"
        else AsyncLane(source.aitems, concurrency=1, streams=True)
    )
    on_loop(lane, test)


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_streams_end_and_lists_are_whole(kind: str) -> None:
    """As a stream the items come one by one, as a list all at once."""
    source = Source()

    async def test(bench: Bench) -> None:
        streamed, listed = bench.work(count=3), bench.submit(count=3)
        streamed.stream()
        bench.lane.submit(streamed)
        await bench.finished(streamed)
        assert list(streamed.events or ()) == [b"0", b"1", b"2"]
        assert (listed.result, streamed.error) == (b"[0,1,2]", None)

    lane = (
        ThreadLane(source.items, concurrency=1, streams=True)
        if kind == "thread"
        else AsyncLane(source.aitems, concurrency=1, streams=True)
    )
    on_loop(lane, test)


def test_cancel_reaches_a_coroutine_that_waits() -> None:
    """Work of the async lane stops at its next await, and its slot is free."""

    async def test(bench: Bench) -> None:
        work = bench.work(x=1.0)
        work.arguments["seconds"] = 60.0
        bench.lane.submit(work)
        await until(lambda: work.started)
        bench.lane.cancel(work)
        await bench.finished(work)
        assert isinstance(work.error, asyncio.CancelledError)
        assert await bench.submit(x=2.0).future is None

    on_loop(AsyncLane(slowly_double, concurrency=1, streams=False), test)
