"""Answers that come item by item."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from nbdeploy_server import wire

from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.server.conftest import Served

from tests.server.asking import PACKED, PROBLEM, TICKS, TOKENS, counters

ITEMS = ["a", "", "line\nbreak", "ü", 1.5, None, {"k": [1]}]


def test_stream_as_a_list(tokens: Served) -> None:
    """A caller that asks for JSON gets the items of a generator as a list."""
    assert tokens.post({"items": ITEMS}).json() == ITEMS


def test_stream_as_events(tokens: Served) -> None:
    """Server-sent events: one per item, empty texts included, and an end that can be told from a break."""
    answer = tokens.post({"items": ITEMS}, headers={"accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    *events, end, empty = answer.text.split("\n\n")
    assert [json.loads(event.removeprefix("data: ")) for event in events] == ITEMS
    assert (end, empty) == ("event: end\ndata: {}", "")


def test_stream_as_lines(tokens: Served) -> None:
    """NDJSON: a line per item."""
    answer = tokens.post({"items": ITEMS}, headers={"accept": "application/x-ndjson"})
    assert [json.loads(line) for line in answer.text.splitlines()] == ITEMS


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Cut a packed stream into tags and payloads."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at + 1 : at + 5], "big")
        found.append((data[at], data[at + 5 : at + 5 + size]))
        at += 5 + size
    return found


def test_stream_packed(tokens: Served) -> None:
    """What `connect` reads: tagged frames, the last one says that the stream is whole."""
    answer = tokens.post({"items": ITEMS}, headers={"accept": PACKED + "-seq"})
    *items, end = frames(answer.content)
    assert [tag for tag, _ in items] == [0] * len(ITEMS)
    assert [wire.unpack(payload) for _, payload in items] == ITEMS
    assert end == (2, b"")


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson", PACKED + "-seq"])
def test_error_in_the_middle_of_a_stream(tokens: Served, accept: str) -> None:
    """Items that came before stay; the error comes as the last event in the stream's own form."""
    answer = tokens.post({"items": ["a", "b"], "fail_at": 1}, headers={"accept": accept})
    assert answer.status_code == 200
    if accept.endswith("-seq"):
        (_, first), (tag, last) = frames(answer.content)
        assert (wire.unpack(first), tag) == ("a", 1)
    elif accept.endswith("ndjson"):
        first, last = answer.text.splitlines()
        last = json.dumps(json.loads(last)["error"])
    else:
        first, last, _ = answer.text.split("\n\n")
        assert last.startswith("event: error\ndata: ")
        last = last.removeprefix("event: error\ndata: ")
    assert json.loads(last)["detail"] == "predict raised RuntimeError: broke"


def test_error_before_the_first_item_has_its_own_status(tokens: Served) -> None:
    """Nothing is sent before the first item, so a failing generator is a plain 500."""
    answer = tokens.post({"items": ["a"], "fail_at": 0}, headers={"accept": "text/event-stream"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == PROBLEM
    assert tokens.post({"items": 5}, headers={"accept": "text/event-stream"}).status_code == 422


def test_empty_stream(tokens: Served) -> None:
    """A generator without items is an empty, whole stream."""
    assert tokens.post({"items": []}).json() == []
    assert frames(tokens.post({"items": []}, headers={"accept": PACKED + "-seq"}).content) == [(2, b"")]


def test_items_come_as_they_are_made(tokens: Served, tmp_path: Path) -> None:
    """The first item is there while the generator still works on the second."""
    gate = tmp_path / "gate"
    call = {"items": [1, 2], "gate": str(gate)}
    try:
        with (
            tokens.client(headers={"accept": "application/x-ndjson"}) as client,
            client.stream("POST", "/predict", json=call) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines) == "1"
            gate.touch()
            assert next(lines) == "2"
    finally:
        gate.touch()


@pytest.mark.parametrize("name", ["tokens", "ticks"])
def test_caller_that_leaves_a_stream_closes_it(serve: Callable[..., Served], name: str, tmp_path: Path) -> None:
    """The generator is closed where it stands, its `finally` runs, and the slot is free; not only at the timeout."""
    path = tmp_path / "closed"
    if name == "tokens":
        served = serve("tokens", TOKENS, {"items": ["a", "b"]})
        call = {"items": list(range(10_000)), "wait": 0.02, "path": str(path)}
    else:
        served = serve("ticks", TICKS, {"count": 2})
        call = {"count": 10_000, "wait": 0.02, "path": str(path)}
    before = counters(served).get("nbdeploy_abandoned_total{running}", 0)
    with served.client(headers={"accept": "application/x-ndjson"}) as client:
        with client.stream("POST", "/predict", json=call) as answer:
            next(answer.iter_lines())
        wait_until(lambda: path.exists() and "closed" in path.read_text(encoding="utf-8"))
    wait_until(lambda: served.inflight() == 0)
    assert counters(served)["nbdeploy_abandoned_total{running}"] == before + 1


def test_stream_over_its_time_ends_with_an_error(serve: Callable[..., Served], tmp_path: Path) -> None:
    """A stream that goes on past the timeout is ended, in its own form."""
    late, path = serve("late-tokens", TOKENS, {"items": ["a", "b"]}, timeout=2.0), tmp_path / "closed"
    call = {"items": list(range(10_000)), "wait": 0.1, "path": str(path)}
    answer = late.post(call, headers={"accept": "application/x-ndjson"})
    assert json.loads(answer.text.splitlines()[-1])["error"]["status"] == 504
    wait_until(path.exists)


def test_async_generator(serve: Callable[..., Served], tmp_path: Path) -> None:
    """Async generators stream, many at once: none goes on before all have begun."""
    ticks = serve("ticks", TICKS, {"count": 2})
    call = {"count": 5, "path": str(tmp_path / "begun"), "company": 16}
    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(lambda _: ticks.post(call).json(), range(16)))
    assert done == [[0, 1, 2, 3, 4]] * 16
