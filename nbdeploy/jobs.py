"""Jobs: one deploy under way is a folder with its event log, so that it survives the kernel that began it.

    jobs/<id>/job.json        what to do (JobSpec)
    jobs/<id>/events.jsonl    what happened: one Event a line, `seq` grows by one
    jobs/<id>/worker.json     Identity of the worker
    jobs/<id>/child.json      Identity of the clean process, while it runs
    jobs/<id>/secrets.json    0600, only while the Job runs

The folder is the truth on progress; kernels, cells and the sidebar are views of it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nbdeploy.private import write_private
from nbdeploy.process import Identity

STEPS = ("captured", "locked", "verified", "pushed", "starting", "ready")
KEPT = 30  # finished Jobs that stay for `nbdeploy ls` and for looking back
STARTING = 30.0  # seconds that a worker may take to write who it is
_POLL = 0.02  # seconds between looks at the log: below what a person notices


@dataclass(frozen=True)
class Event:
    """One line of a Job's log.

    Attributes:
        seq: grows by one.
        time: Unix seconds.
        step: one of STEPS, or "job" for its end.
        state: "running", "done", "failed", "cancelled" or "note".
        detail: words for the user.
        seconds: how long the step took, once done.
        data: what the card needs (parity, lines, result ...).
    """

    seq: int
    time: float
    step: str
    state: str
    detail: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Event:
        """Read a line of the log; what a later version added is left out."""
        return cls(**{row.name: data[row.name] for row in fields(cls) if row.name in data})

    @property
    def ends(self) -> bool:
        """Whether the Job is over with this event."""
        return self.step == "job" and self.state in {"done", "failed", "cancelled"}


class Job:
    """A Job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @classmethod
    def create(cls, home: Path, spec: dict[str, Any], secret_values: dict[str, str]) -> Job:
        """Make a new Job; `spec` is what the worker is to do."""
        now = dt.datetime.now(tz=dt.UTC)
        name = f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(4)}"  # sorts by time
        folder = home / "jobs" / name
        folder.mkdir(mode=0o700, parents=True)
        job = cls(folder)
        write_private(folder / "job.json", json.dumps(spec).encode())
        if secret_values:
            write_private(folder / "secrets.json", json.dumps(secret_values).encode())
        (folder / "events.jsonl").touch(mode=0o600)
        _prune(home)
        return job

    @property
    def spec(self) -> dict[str, Any]:
        """What the worker is to do."""
        return dict(json.loads((self.folder / "job.json").read_text(encoding="utf-8")))

    def readable(self) -> bool:
        """Whether this version understands the folder."""
        try:
            spec = self.spec
            self.events()
            self.worker()
        except (ValueError, KeyError, TypeError, OSError):
            return False
        return isinstance(spec.get("name"), str) and isinstance(spec.get("engine"), str)

    def secret_values(self) -> dict[str, str]:
        """Values of --secret, which leave the folder with the end of the Job."""
        try:
            return dict(json.loads((self.folder / "secrets.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def forget_secrets(self) -> None:
        """Remove the values of --secret."""
        (self.folder / "secrets.json").unlink(missing_ok=True)

    def record_worker(self, identity: Identity) -> None:
        """Remember who works on this Job."""
        write_private(self.folder / "worker.json", json.dumps(identity.to_json()).encode())

    def worker(self) -> Identity | None:
        """Who works on this Job, if anyone has begun."""
        try:
            return Identity.from_json(json.loads((self.folder / "worker.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def events(self, after: int = 0) -> list[Event]:
        """Return the complete lines of the log with a `seq` above `after`."""
        try:
            data = (self.folder / "events.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        events = [Event.from_json(json.loads(line)) for line in lines]
        return [event for event in events if event.seq > after]

    def last(self) -> Event | None:
        """Return the newest event."""
        events = self.events()
        return events[-1] if events else None

    def is_of(self, name: str, engine: str | None = None) -> bool:
        """Whether it deploys this Endpoint; None stands for any engine."""
        spec = self.spec
        return spec["name"] == name and engine in {None, spec["engine"]}

    @property
    def revision(self) -> int:
        """Number of the Revision that the worker has begun to bring up, 0 before it came to that."""
        return max((event.data.get("revision", 0) for event in self.events() if event.step != "job"), default=0)

    def half_way(self, serving: int) -> bool:
        """Whether its worker was killed while it brought up a Revision later than the one that serves."""
        last = self.last()
        return last is not None and bool(last.data.get("killed")) and self.revision > serving

    def record_child(self, identity: Identity | None) -> None:
        """Remember the clean process that the worker has started; None once it is gone."""
        if identity is None:
            (self.folder / "child.json").unlink(missing_ok=True)
        else:
            write_private(self.folder / "child.json", json.dumps(identity.to_json()).encode())

    def ended(self) -> bool:
        """Whether its log says that it is over."""
        return any(event.ends for event in self.events())

    def running(self) -> bool:
        """Whether its worker still works, or is about to begin."""
        if self.ended():
            return False
        worker = self.worker()
        if worker is None:
            return time.time() - (self.folder / "job.json").stat().st_mtime < STARTING
        return worker.alive()

    def cancel(self, seconds: float = 30.0) -> None:
        """End its worker: asked first, and after `seconds` made to; what served before goes on serving."""
        limit = time.monotonic() + STARTING
        while (worker := self.worker()) is None and self.running() and time.monotonic() < limit:
            time.sleep(_POLL)
        if worker is not None:
            worker.end(seconds)
        self.bury("cancelled", "The deploy was cancelled.", "CancelledError")

    def bury(self, state: str, detail: str, error: str) -> None:
        """Write the end that a killed worker could not write, and end what it left; a cancel was no accident."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            Identity.from_json(json.loads((self.folder / "child.json").read_text(encoding="utf-8"))).end_group()
        self.record_child(None)
        self.forget_secrets()
        with (self.folder / "events.jsonl").open("rb") as file:
            with contextlib.suppress(ImportError):  # Windows has none, and no worker either
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)  # several may find it dead at once
            if not self.ended():
                journal = Journal(self)
                journal.write("job", state, detail, error=error, killed=state == "failed")
                journal.close()

    def bury_if_dead(self) -> None:
        """Write the end of a Job that nobody follows any more, and whose worker was killed on this machine."""
        worker = self.worker()
        if worker is not None and worker.is_here() and not worker.alive() and not self.ended():
            self.bury("failed", self._last_words(), "DeployError")

    def follow(self) -> Iterator[Event]:
        """Yield events as they come, to the end of the Job; a worker that died without a word ends it as failed."""
        seen = 0
        while True:
            for event in self.events(seen):
                seen = event.seq
                yield event
                if event.ends:
                    return
            if not self.running() and not self.events(seen):  # dead, and nothing was written just before
                self.bury("failed", self._last_words(), "DeployError")
            else:
                time.sleep(_POLL)

    def _last_words(self) -> str:
        events = self.events()
        if any(event.step == "ready" for event in events):
            return (
                "The worker of this deploy was killed at its last step: the new Revision serves, but no request "
                "through the URL has proved it. Deploy again to have it proved."
            )
        if any((event.step, event.state) == ("pushed", "done") for event in events):  # a cluster goes on by itself
            return (
                "The worker of this deploy was killed while its Replicas were starting; the cluster may go on with "
                f"them. nbdeploy status {self.spec['name']} tells what serves. Deploy again."
            )
        log = self.folder / "worker.log"
        with contextlib.suppress(OSError):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            if lines:
                return "The worker of this deploy died. Its last words:\n  " + "\n  ".join(lines)
        return "The worker of this deploy was killed. Deploy again; what was serving before still serves."


class Journal:
    """Writes a Job's log; used by one process at a time."""

    def __init__(self, job: Job) -> None:
        self._file = (job.folder / "events.jsonl").open("ab", buffering=0)
        self._seq = max((event.seq for event in job.events()), default=0)
        self._began: dict[str, float] = {}

    def write(self, step: str, state: str, detail: str = "", seconds: float = 0.0, **data: Any) -> None:
        """Append one event; `seconds` of a done step is measured from its first event where it is not given."""
        self._seq += 1
        now = time.monotonic()
        self._began.setdefault(step, now)
        if state == "done" and not seconds:
            seconds = now - self._began[step]
        event = Event(self._seq, time.time(), step, state, detail, round(seconds, 4), data)
        self._file.write(json.dumps(asdict(event), ensure_ascii=False, default=str).encode() + b"\n")

    def close(self) -> None:
        """Close the log."""
        self._file.close()


def all_jobs(home: Path) -> list[Job]:
    """Return the Jobs of a home, newest first; folders that cannot be read (of another version) are left out."""
    folder = home / "jobs"
    if not folder.is_dir():
        return []
    found = [Job(path) for path in sorted(folder.iterdir(), reverse=True) if (path / "job.json").is_file()]
    return [job for job in found if job.readable()]


def running_job(home: Path, name: str, engine: str | None = None) -> Job | None:
    """Return the newest Job under way for an Endpoint, if there is one."""
    job = last_job(home, name, engine)
    return job if job is not None and job.running() else None


def last_job(home: Path, name: str, engine: str | None = None) -> Job | None:
    """Return the newest Job of an Endpoint, the one under way if there is one; one found dead has its end written."""
    return last_of(job for job in all_jobs(home) if job.is_of(name, engine))


def last_of(jobs: Iterable[Job]) -> Job | None:
    """Return of an Endpoint's Jobs, newest first, the one that `last_job` means."""
    newest: Job | None = None
    for job in jobs:
        if job.running():
            return job
        job.bury_if_dead()
        newest = newest or job
    return newest


def jobs_of(home: Path) -> dict[tuple[str, str], list[Job]]:
    """Return the Jobs of each Endpoint, newest first, by its name and its engine's."""
    found: dict[tuple[str, str], list[Job]] = {}
    for job in all_jobs(home):
        spec = job.spec
        found.setdefault((spec["name"], spec["engine"]), []).append(job)
    return found


def _prune(home: Path) -> None:
    for job in all_jobs(home)[KEPT:]:
        if not job.running():
            job.bury("failed", "The worker of this deploy was killed.", "DeployError")
            shutil.rmtree(job.folder, ignore_errors=True)
