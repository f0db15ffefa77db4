"""How Endpoints stand, as the shell tells it: what their engine knows, and the deploy under way or killed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbdeploy.config import home
from nbdeploy.jobs import Job, all_jobs, last_job, last_of
from nbdeploy.spec import Phase, Status


def row(status: Status, engine: str, jobs: Sequence[Job] | None = None) -> dict[str, Any]:
    """Return what `status --json` prints of an Endpoint; its engine cannot know who drives a roll-out.

    Args:
        status: from the engine.
        engine: its name.
        jobs: of this Endpoint, newest first; None reads them, which takes milliseconds: a listing reads all once.
    """
    found = status.to_json()
    found["job"] = None
    job = last_job(home(), status.name, engine) if jobs is None else last_of(jobs)
    if job is None:
        return found
    if job.running():
        found["job"] = _under_way(job)
        found["reason"] = _reason(job, status)
    elif job.half_way(status.revision) and status.reason:
        found["reason"] = _killed(job, status)
    return found


def of_job(name: str, engine: str | None) -> dict[str, Any] | None:
    """Return the state of an Endpoint whose first deploy has not come as far as its engine; None for no such deploy."""
    job = next((job for job in all_jobs(home()) if job.is_of(name, engine)), None)
    last = job.last() if job is not None else None
    if job is None or last is None or (last.ends and last.state == "done"):
        return None
    spec, failed = job.spec, not job.running()
    found = Status(
        name=name,
        engine=spec["engine"],
        phase=Phase.FAILED if failed else Phase.PENDING,
        reason=last.detail or ("the deploy ended without a word" if failed else f"{last.step} …"),
        owner=spec["owner"],
        notebook=spec["notebook"],
    )
    return row(found, spec["engine"])


def _under_way(job: Job) -> dict[str, Any]:
    last, worker = job.last(), job.worker()
    return {"id": job.id, "step": last.step if last else "", "pid": worker.pid if worker else 0}


def _reason(job: Job, status: Status) -> str:
    """Say what a deploy under way is at, where the engine can only say that there may be one."""
    last, number = job.last(), job.revision
    if status.phase == Phase.PENDING and not status.revision:
        return last.detail if last else ""
    if status.reason and number > status.revision:
        words = f"revision {number} is being rolled out"
        return f"{words}: {last.detail}" if last and last.detail else words
    return status.reason


def _killed(job: Job, status: Status) -> str:
    name, number = status.name, job.revision
    if not status.revision:
        return f"its first deploy was killed, and so ended half-way; deploy it again, or nbdeploy delete {name}"
    return (
        f"the deploy of revision {number} was killed, and so ended half-way: the cluster goes on with it, but nobody "
        f"proves it. Deploy again, or go back: nbdeploy rollback {name} {status.revision}"
    )
