"""What the shell says of roll-outs: driven by a live deploy of this machine, by a killed one, or from elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdeploy import states
from nbdeploy.engines.kubernetes import standing
from nbdeploy.engines.kubernetes.record import Summary
from nbdeploy.jobs import Job, Journal
from nbdeploy.process import Identity
from nbdeploy.spec import Autoscaling, Phase, Status


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def a_job(home: Path, worker: int, *rows: tuple[str, str, str], revision: int = 2) -> Job:
    """Return a Job of the Endpoint `one` whose worker has brought up a Revision so far."""
    job = Job.create(home, {"name": "one", "engine": "cluster", "owner": "ada", "notebook": ""}, {})
    job.record_worker(Identity.of(worker))
    journal = Journal(job)
    for step, state, words in rows:
        journal.write(step, state, words, **({"revision": revision} if step == "starting" else {}))
    journal.close()
    return job


def deployment(number: int, *, updated: int = 1) -> dict[str, Any]:
    """Return a Deployment of one Replica whose template is of this Revision."""
    counts = {"observedGeneration": 3, "replicas": 1, "updatedReplicas": updated, "availableReplicas": 1}
    labels = {"nbdeploy.dev/revision": str(number)}
    return {
        "metadata": {"generation": 3},
        "spec": {"replicas": 1, "template": {"metadata": {"labels": labels}}},
        "status": counts,
    }


def status(number: int, *, serving: int = 1, updated: int = 1) -> Status:
    """Return the Status of an Endpoint while Revision 2 is under way."""
    summary = Summary("one", "ada", "", serving, 2, False, True, Autoscaling())
    return standing.status("cluster", summary, deployment(number, updated=updated))


WAITS = (("pushed", "done", ""), ("starting", "running", "No node takes a Replica of one"))


def test_from_elsewhere() -> None:
    """What an engine says is true whoever drives it, and names both ways on; what serves already is told."""
    before, there = status(1), status(2)
    assert (before.phase, there.phase) == (Phase.READY, Phase.READY)
    assert before.reason.startswith("revision 2 is being rolled out (if that deploy was ended half-way, deploy again")
    assert "nbdeploy rollback one 1" in before.reason
    assert there.reason.startswith("revision 2 answers, but its deploy has not ended")
    assert status(2, updated=0).reason.startswith("revision 2 is being rolled out")


def test_driven_from_here(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """While a deploy of this machine drives it, its own words are told, and no way out."""
    a_job(home, sleeper.pid, *WAITS)
    row = states.row(status(1), "cluster")
    assert row["reason"] == "revision 2 is being rolled out: No node takes a Replica of one"
    assert (row["job"]["step"], row["job"]["pid"]) == ("starting", sleeper.pid)


def test_killed_here(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """A deploy that was killed here is told as killed, with what to do, until something later serves."""
    job = a_job(home, sleeper.pid, *WAITS)
    sleeper.kill()
    sleeper.wait()
    row = states.row(status(1), "cluster")
    assert row["job"] is None
    assert row["reason"].startswith("the deploy of revision 2 was killed")
    assert row["reason"].endswith("Deploy again, or go back: nbdeploy rollback one 1")
    assert job.half_way(1)
    assert not job.half_way(2)
    assert "killed" not in states.row(status(2, serving=2), "cluster")["reason"]
    plain = Status("one", "cluster", revision=1, phase=Phase.READY)
    assert states.row(plain, "cluster")["reason"] == ""


def test_a_first_deploy_that_was_killed(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Nothing serves yet: it is deployed again, or deleted."""
    a_job(home, sleeper.pid, *WAITS, revision=1)
    sleeper.kill()
    sleeper.wait()
    first = Status("one", "cluster", phase=Phase.PENDING, reason="No node takes a Replica of one")
    reason = states.row(first, "cluster")["reason"]
    assert reason == "its first deploy was killed, and so ended half-way; deploy it again, or nbdeploy delete one"


def test_a_failed_deploy_was_not_killed(home: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """A deploy that ended in words of its own has undone what it made."""
    job = a_job(home, sleeper.pid, *WAITS, ("job", "failed", "No node"))
    assert not job.half_way(1)
    assert states.of_job("one", "cluster") is not None
    assert states.of_job("one", "local") is None
