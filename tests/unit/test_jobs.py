"""Jobs: the folder is the truth on progress, whoever dies."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.jobs import KEPT, STARTING, Event, Job, Journal, all_jobs, jobs_of, running_job
from nbdeploy.process import Identity
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPEC = {"name": "one", "engine": "local"}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A Job that no worker has begun."""
    return Job.create(tmp_path, dict(SPEC), {"TOKEN": "s3cret"})


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that works until it is told otherwise."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        yield process
        process.kill()


def write(job: Job, *rows: tuple[Any, ...]) -> None:
    """Write events as a worker does."""
    journal = Journal(job)
    for row in rows:
        journal.write(*row)
    journal.close()


def age(job: Job, seconds: float) -> None:
    """Make a Job look as if it had been created earlier."""
    then = time.time() - seconds
    os.utime(job.folder / "job.json", (then, then))


def test_events_are_numbered_over_writers(job: Job) -> None:
    """`seq` grows by one, whoever writes: the deploying process first, then the worker."""
    write(job, ("captured", "done", "f", 0.5))
    write(job, ("locked", "running"), ("locked", "done", "12 distributions"))
    events = job.events()
    assert [event.seq for event in events] == [1, 2, 3]
    assert (events[0].seconds, events[2].detail) == (0.5, "12 distributions")
    assert [event.seq for event in job.events(after=2)] == [3]
    assert events[2].time <= time.time()


def test_a_done_step_has_its_time(job: Job) -> None:
    """Seconds are counted from the first event of a step."""
    journal = Journal(job)
    journal.write("verified", "running")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 0.05)
    journal.write("verified", "done")
    journal.close()
    assert 0.05 <= job.events()[-1].seconds < 5


def test_half_a_line_is_no_event(job: Job) -> None:
    """A reader that looks while a line is written sees the whole lines only."""
    write(job, ("captured", "done", "été · 漢字"))
    with (job.folder / "events.jsonl").open("ab") as file:
        file.write(b'{"seq": 2, "time": 1, "st')
    assert [event.detail for event in job.events()] == ["été · 漢字"]


def test_events_of_a_later_version(job: Job) -> None:
    """Fields that this version does not know are left out; a lost number loses no event."""
    rows = [{"seq": seq, "time": 0, "step": "locked", "state": "done", "colour": "blue"} for seq in (1, 2, 5)]
    (job.folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [event.seq for event in job.events()] == [1, 2, 5]
    assert [event.seq for event in job.events(after=2)] == [5]


def test_follow_to_the_end(job: Job, sleeper: subprocess.Popen[bytes]) -> None:
    """A follower gets each event once, as it comes, and stops at the end."""
    job.record_worker(Identity.of(sleeper.pid))
    seen: list[Event] = []
    follower = threading.Thread(target=lambda: seen.extend(job.follow()))
    follower.start()
    for number in range(3):
        write(job, ("starting", "running", str(number)))
    assert job.running()
    write(job, ("job", "done"))
    follower.join(20)
    assert not follower.is_alive()
    assert [event.detail for event in seen] == ["0", "1", "2", ""]
    assert not job.running()
    assert [event.seq for event in job.follow()] == [1, 2, 3, 4]  # and once more from the start


def test_a_worker_that_dies_without_a_word(job: Job, sleeper: subprocess.Popen[bytes]) -> None:
    """Its end is written for it, with its last words; secrets go, and what it left behind is ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    job.record_worker(Identity.of(sleeper.pid))
    job.record_child(Identity.of(child.pid))
    (job.folder / "worker.log").write_text("Traceback\nMemoryError: no room\n", encoding="utf-8")
    write(job, ("locked", "running"))
    follower = job.follow()
    assert next(follower).step == "locked"
    sleeper.kill()
    last = next(follower)
    assert (last.seq, last.step, last.state, last.data) == (
        2,
        "job",
        "failed",
        {"error": "DeployError", "killed": True},
    )
    assert "MemoryError: no room" in last.detail
    assert list(follower) == []
    with child:
        assert child.wait(20) != 0
    assert job.secret_values() == {}
    assert [event.ends for event in job.follow()] == [False, True]


def test_a_worker_that_never_begins(job: Job) -> None:
    """A moment to start is granted; after that, silence is the end."""
    assert job.running()
    assert running_job(job.folder.parents[1], "one") is not None
    age(job, STARTING + 1)
    assert not job.running()
    (last,) = job.follow()
    assert last.state == "failed"
    assert "killed" in last.detail


def test_cancel_of_a_dead_worker(job: Job) -> None:
    """Cancelling what nobody works on writes its end, once."""
    age(job, STARTING + 1)
    job.cancel()
    job.cancel()
    assert [event.state for event in job.events()] == ["cancelled"]


def test_secrets(job: Job) -> None:
    """Values of secrets are the owner's alone, and leave with the Job."""
    file = job.folder / "secrets.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
    assert job.secret_values() == {"TOKEN": "s3cret"}
    assert "s3cret" not in (job.folder / "job.json").read_text(encoding="utf-8")
    job.forget_secrets()
    job.forget_secrets()
    assert job.secret_values() == {}


def test_running_job(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """The newest Job under way of a name, and of an engine where one is given."""
    done = Job.create(tmp_path, dict(SPEC), {})
    write(done, ("job", "done"))
    assert running_job(tmp_path, "one") is None
    under_way = Job.create(tmp_path, dict(SPEC), {})
    under_way.record_worker(Identity.of(sleeper.pid))
    found = running_job(tmp_path, "one", "local")
    assert found is not None
    assert found.id == under_way.id
    assert running_job(tmp_path, "one", "cluster") is None
    assert running_job(tmp_path, "other") is None


def test_jobs_of_all_endpoints(tmp_path: Path) -> None:
    """A listing reads the Jobs once: those of each Endpoint, newest first."""
    first, second = (Job.create(tmp_path, dict(SPEC), {}) for _ in range(2))
    other = Job.create(tmp_path, {**SPEC, "engine": "cluster"}, {})
    found = {whose: [job.id for job in jobs] for whose, jobs in jobs_of(tmp_path).items()}
    assert found == {("one", "local"): [second.id, first.id], ("one", "cluster"): [other.id]}


def test_foreign_folders_are_left_out(tmp_path: Path) -> None:
    """What another version or another program put there hides no Job."""
    good = Job.create(tmp_path, dict(SPEC), {})
    for name, file, text in [
        ("9-a", "job.json", "{"),
        ("9-b", "job.json", "[]"),
        ("9-c", "job.json", '{"title": "from the future"}'),
        ("9-d", "notes.txt", ""),
    ]:
        folder = tmp_path / "jobs" / name
        folder.mkdir()
        (folder / file).write_text(text, encoding="utf-8")
    broken = Job.create(tmp_path, dict(SPEC), {})
    (broken.folder / "events.jsonl").write_text("no json\n", encoding="utf-8")
    (tmp_path / "jobs" / "file").write_text("", encoding="utf-8")
    assert [job.id for job in all_jobs(tmp_path)] == [good.id]
    assert all_jobs(tmp_path / "elsewhere") == []


def test_old_jobs_go(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """The newest KEPT stay, and every Job that still runs."""
    running = Job.create(tmp_path, dict(SPEC), {})
    running.record_worker(Identity.of(sleeper.pid))
    made = []
    for _ in range(KEPT + 3):
        one = Job.create(tmp_path, dict(SPEC), {})
        write(one, ("job", "done"))
        made.append(one.id)
    left = {one.id for one in all_jobs(tmp_path)}
    assert running.id in left
    assert made[0] not in left
    assert set(made[-KEPT + 1 :]) <= left
    assert len(left) <= KEPT + 1
