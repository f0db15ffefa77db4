"""What any Engine must do: one suite for all, each Engine a parameter of the fixture `house`."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdeploy.engines.base import HasHistory, HasKey
from nbdeploy.errors import EndpointNotFoundError, EngineError
from nbdeploy.spec import Autoscaling, Phase, Serving, Status
from tests.conftest import DEADLINE, wait_until
from tests.engines.conftest import ADD, EXITS, NEVER_FITS, NEVER_LOADS, PRINTS, REPLICA, House, Raw

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shared(house: House) -> Iterator[str]:
    """An Endpoint for tests that only look."""
    house.apply("shared", PRINTS, {"x": 1}, replicas=2, notebook="/books/a.ipynb")
    yield "shared"
    house.engine.delete("shared")


def pids(house: House, name: str, calls: int = 24) -> set[str]:
    """Return the Replicas that answer new connections."""
    return {house.ask(name, x=0) for _ in range(calls)}


def settled(house: House, name: str, number: int) -> set[str]:
    """Return the Replicas that answer once they are so many; a Service hears of its pods a little later than apply."""
    found: set[str] = set()

    def so_many() -> bool:
        found.clear()
        found.update(pids(house, name))
        return len(found) == number

    wait_until(so_many)
    return found


def test_apply_makes_it_ready(house: House, name: str) -> None:
    """After apply the URL answers, and the status says what is there."""
    status = house.apply(name, ADD, {"x": 1}, notebook="/books/b.ipynb")
    assert (status.phase, status.reason, status.ready, status.desired) == (Phase.READY, "", 1, 1)
    assert (status.name, status.engine, status.revision, status.owner) == (name, house.engine.name, 1, "ada")
    assert status.notebook == "/books/b.ipynb"
    assert house.ask(name, x=41) == 42
    assert house.progress  # what happens meanwhile is told


def test_apply_is_idempotent(house: House, name: str) -> None:
    """The same Revision again changes nothing: same processes, same number."""
    bundle = house.bundle(REPLICA)
    revision = house.revision(name, bundle, replicas=2)
    first = house.engine.apply(revision, bundle, lambda _words, _data: None)
    before = settled(house, name, 2)
    again = house.engine.apply(revision, bundle, lambda _words, _data: None)
    assert (again.revision, again.url, again.phase) == (first.revision, first.url, Phase.READY)
    assert pids(house, name) == before
    assert len(house.engine.revisions(name)) == 1


def test_a_second_revision_keeps_url_and_key(house: House, name: str) -> None:
    """Clients need not know of an update: URL and key are the Endpoint's."""
    first = house.apply(name, ADD)
    key = house.engine.key(name)
    second = house.apply(name, ADD.replace("+ 1", "+ 100"))
    assert (second.url, house.engine.key(name)) == (first.url, key)
    assert (first.revision, second.revision) == (1, 2)
    wait_until(lambda: house.ask(name, x=1) == 101)


def test_a_number_that_was_taken_is_refused(house: House, name: str) -> None:
    """Two deploys that began at the same state do not overwrite each other: the later one is told."""
    bundle = house.bundle(ADD)
    late = house.revision(name, bundle, notebook="/books/late.ipynb")
    house.apply(name, ADD)
    with pytest.raises(EngineError, match="came first"):
        house.engine.apply(late, bundle, lambda _words, _data: None)
    assert house.engine.status(name).notebook == ""


def test_scaling_restarts_nothing(house: House, name: str) -> None:
    """1 → 3 → 1 Replicas by apply: those that run go on, connections are shared, soon among those that stay only."""
    house.apply(name, REPLICA)
    first = settled(house, name, 1)
    status = house.change(name, autoscaling=Autoscaling(3, 3))
    assert (status.ready, status.desired, status.phase) == (3, 3, Phase.READY)
    three = settled(house, name, 3)
    assert first < three
    status = house.change(name, autoscaling=Autoscaling(1, 1))
    assert status.desired == 1
    wait_until(lambda: house.engine.status(name).ready == 1)
    assert settled(house, name, 1) < three


def test_autoscaling_alone_restarts_nothing(house: House, name: str) -> None:
    """A change of the scaling's other numbers keeps the very processes, and is recorded."""
    house.apply(name, REPLICA, replicas=2)
    before = settled(house, name, 2)
    status = house.change(name, autoscaling=Autoscaling(2, 2, target_in_flight=7))
    assert status.autoscaling.target_in_flight == 7
    assert pids(house, name) == before


@pytest.mark.parametrize(
    ("source", "why"),
    [(NEVER_LOADS, "no weights here"), (EXITS, "exited with status 7"), (NEVER_FITS, "SIGKILL|memory")],
    ids=["raises", "exits", "never fits"],
)
def test_a_failing_revision_leaves_the_old_one(house: House, name: str, source: str, why: str) -> None:
    """A Revision whose Replica does not come up says why with its last lines; what served goes on as if nothing was."""
    house.apply(name, REPLICA)
    before = pids(house, name, 3)
    with pytest.raises(EngineError, match=why) as caught:
        house.apply(name, source)
    if "print" in source:
        assert "looking for weights" in str(caught.value) or "bye" in str(caught.value)
    status = house.engine.status(name)
    assert (status.revision, status.phase, status.ready) == (1, Phase.READY, 1)
    assert [revision.number for revision in house.engine.revisions(name)] == [1]
    assert pids(house, name, 3) == before
    assert house.apply(name, ADD).revision == 2


@pytest.mark.parametrize("source", [NEVER_LOADS, EXITS], ids=["raises", "exits"])
def test_a_failing_first_revision_leaves_nothing(house: House, name: str, source: str) -> None:
    """Where nothing served before, nothing is there afterwards."""
    with pytest.raises(EngineError):
        house.apply(name, source)
    assert name not in [status.name for status in house.engine.list()]
    with pytest.raises(EndpointNotFoundError):
        house.engine.status(name)


def test_status_and_list(house: House, shared: str) -> None:
    """The status carries every row of the interface, and `list` has it too."""

    def settled() -> Status | None:  # a call just ended, and a busy Replica may be late to tell of itself
        status = house.engine.status(shared)
        return status if status.memory_bytes and not status.in_flight else None

    status = wait_until(settled)
    row = status.to_json()
    assert row["replicas"] == {"ready": 2, "desired": 2}
    assert (row["autoscaling"]["min"], row["autoscaling"]["max"]) == (2, 2)
    assert row["memory_bytes"] > 1 << 20
    assert row["url"].startswith("http")
    assert row["notebook"] == "/books/a.ipynb"
    listed = {one.name: one for one in house.engine.list()}[shared]
    assert (listed.url, listed.phase, listed.revision) == (status.url, status.phase, status.revision)


def test_scrape_gives_each_replica(house: House, shared: str) -> None:
    """Each Replica has its own Prometheus text, which parses and has the scaling signal."""
    house.ask(shared, x=5)

    def samples() -> list[dict[str, float]]:
        families = [text_string_to_metric_families(text) for text in house.engine.scrape(shared).values()]
        return [{s.name: s.value for family in one for s in family.samples} for one in families]

    # one that is too busy to answer in time is left out, and the call may still be counted as under way
    found = wait_until(
        lambda: (rows := samples()) and len(rows) == 2 and not any(row["nbdeploy_inflight"] for row in rows) and rows
    )
    assert sum(row.get("nbdeploy_requests_total", 0) for row in found) >= 1


def test_logs_have_what_predict_prints(house: House, shared: str) -> None:
    """Lines of predict are in the logs, each with the Replica that printed it; an unasked line is not."""
    house.ask(shared, x=1234)
    wait_until(lambda: any("asked for 1234" in line for line in house.engine.logs(shared, follow=False)))
    line = next(line for line in house.engine.logs(shared, follow=False) if "asked for 1234" in line)
    wait_until(lambda: any(replica in line for replica in house.engine.scrape(shared)))
    assert not any("asked for 99" in line for line in house.engine.logs(shared, follow=False))


def test_logs_follow(house: House, name: str) -> None:
    """With follow, lines come as they are printed, and the end of the Endpoint ends it."""
    house.apply(name, PRINTS)
    seen: list[str] = []
    ended: list[str] = []

    def read() -> None:
        try:
            for line in house.engine.logs(name, follow=True):
                seen.append(line)  # noqa: PERF402 - each as it comes: others look on
        except EngineError as error:
            ended.append(repr(error))
        ended.append("the log ended")

    def comes(words: str) -> None:
        limit = time.monotonic() + DEADLINE
        while not any(words in line for line in seen):
            if time.monotonic() > limit or ended:
                unfollowed = list(house.engine.logs(name, follow=False))
                threads = [one.name for one in threading.enumerate()]
                pytest.fail(f"{words!r} did not come: {seen=}, {ended=}, {unfollowed=}, {threads=}")
            time.sleep(0.01)

    reader = threading.Thread(target=read)
    reader.start()
    house.ask(name, x=7)
    comes("asked for 7")
    house.ask(name, x=8)
    comes("asked for 8")
    house.engine.delete(name)
    reader.join(DEADLINE)
    assert not reader.is_alive()
    assert ended == ["the log ended"]
    assert len(seen) == len(set(seen))


def test_stop_and_start(house: House, name: str) -> None:
    """A stopped Endpoint is idle with its reason, refuses calls, and comes back with the same URL and key."""
    first = house.apply(name, ADD, replicas=2)
    key = house.engine.key(name)
    status = house.change(name, stopped=True)
    assert (status.phase, status.ready, status.desired) == (Phase.IDLE, 0, 0)
    assert "start" in status.reason
    assert house.engine.scrape(name) == {}
    with pytest.raises(OSError, match="refused"), Raw(first.url) as client:
        client.connect()
    status = house.change(name, stopped=True)  # twice is fine
    status = house.change(name, stopped=False)
    assert (status.phase, status.ready, status.url, house.engine.key(name)) == (Phase.READY, 2, first.url, key)
    assert house.ask(name, x=1) == 2


def test_delete_removes_everything(house: House, name: str) -> None:
    """Nothing is left, a second delete says that there is nothing, and the name is free again."""
    assert house.apply(name, ADD, replicas=2).ready == 2
    key = house.engine.key(name)
    house.engine.delete(name)
    with pytest.raises(EndpointNotFoundError):
        house.engine.delete(name)
    assert name not in [status.name for status in house.engine.list()]
    status = house.apply(name, ADD)
    assert status.revision == 1
    assert house.engine.key(name) != key


@pytest.mark.parametrize("unknown", ["nobody", "..", "", "a/b", "Shared"])
def test_unknown_names(house: House, shared: str, unknown: str) -> None:
    """Every method says the same for a name that there is not."""
    engine = house.engine
    for ask in (engine.status, engine.scrape, engine.delete, engine.key, engine.revisions):
        with pytest.raises(EndpointNotFoundError):
            ask(unknown)
    with pytest.raises(EndpointNotFoundError):
        list(engine.logs(unknown, follow=False))


def test_a_near_name_is_offered(house: House, shared: str) -> None:
    """A slip of the finger gets the nearest name."""
    with pytest.raises(EndpointNotFoundError, match="Did you mean 'shared'"):
        house.engine.status("sharde")


def test_key(house: House, shared: str) -> None:
    """The key opens the Endpoint; no key and a wrong one get 401."""
    assert isinstance(house.engine, HasKey)
    status = house.engine.status(shared)
    assert (status.public, bool(status.key_file)) == (False, True)
    for key in ("", "wrong"):
        with Raw(status.url, key) as client:
            code, body = client.request({"x": 1})
        assert code == 401
        assert "nbdeploy key" in json.loads(body)["detail"]


def answer(url: str) -> int:
    """Return the status that a call without a key gets."""
    with Raw(url) as client:
        return client.request({"x": 1})[0]


def test_public_and_back(house: House, name: str) -> None:
    """A public Endpoint asks no key; when it is no longer public, the key is the one it had."""
    house.apply(name, ADD)
    key = house.engine.key(name)
    status = house.apply(name, ADD, serving=Serving(public=True))
    assert (status.public, status.key_file, house.engine.key(name)) == (True, "", "")
    wait_until(lambda: answer(status.url) == 200)
    with pytest.raises(EngineError):  # a failing change of it changes nothing
        house.apply(name, NEVER_LOADS)
    with Raw(status.url) as client:
        assert client.ask({"x": 1}) == 2
    status = house.apply(name, ADD)
    assert (status.public, house.engine.key(name)) == (False, key)
    wait_until(lambda: answer(status.url) == 401)


def test_history(house: House, name: str) -> None:
    """Revisions are kept oldest first, the last one is what is to be, and going back is an apply."""
    assert isinstance(house.engine, HasHistory)
    house.apply(name, ADD)
    house.apply(name, ADD.replace("+ 1", "+ 2"))
    first, second = house.engine.revisions(name)
    assert (first.number, second.number) == (1, 2)
    assert first.bundle != second.bundle
    house.change(name, bundle=first.bundle)
    wait_until(lambda: house.ask(name, x=1) == 2)
    assert [one.bundle for one in house.engine.revisions(name)] == [first.bundle, second.bundle, first.bundle]


def test_a_new_secret_restarts(house: House, name: str) -> None:
    """Another value of a secret is no change of numbers: new Replicas get it."""
    source = "import os\ndef predict(x: int) -> str:\n    return os.environ.get('TOKEN', '')\n"
    house.apply(name, source, secrets=("TOKEN",), secret_values={"TOKEN": "one"})
    assert house.ask(name, x=1) == "one"
    house.apply(name, source, secrets=("TOKEN",), secret_values={"TOKEN": "two"})
    wait_until(lambda: house.ask(name, x=1) == "two")
