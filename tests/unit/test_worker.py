"""The worker: cancelled, killed or failing at any step, it leaves what served before and nothing half-made."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import nbdeploy
from nbdeploy.deploying import Context, deploy
from nbdeploy.errors import (
    CancelledError,
    DeployError,
    EndpointNotFoundError,
    OwnershipError,
    ParityError,
    VerificationError,
)
from nbdeploy.jobs import Event, Job, all_jobs, running_job
from nbdeploy.process import Identity, clean_environment
from tests.conftest import DEADLINE, leftovers, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

pytestmark = pytest.mark.slow  # each test starts kernels or processes; make test-quick leaves them out


def cell(source: str) -> dict[str, Any]:
    """Return what a notebook has after running this cell."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(source), "<cell>", "exec"), namespace)  # noqa: S102 - the cell is the test's own
    return namespace


OLD = cell("def predict(x: int) -> str:\n    return 'old'\n")["predict"]
NEW = cell("def predict(x: int) -> str:\n    return 'new'\n")["predict"]
# Lasts at each of its three calls outside this process until the test lets it pass, so that a signal finds the worker
# there; after a minute it ends by itself.
SLOW = """
    import os, sys, threading, time
    def predict(x: int) -> str:
        call = 'verified'
        if 'nbdeploy_server.replica' in sys.modules:
            call = 'asked' if threading.current_thread().name.startswith('predict-') else 'warmed up'
        limit = time.monotonic() + 60
        while os.getpid() != {here} and not os.path.exists({folder!r} + call) and time.monotonic() < limit:
            time.sleep(0.01)
        return 'slow'
    """
CALLS = ("verified", "warmed up", "asked")


def slow(home: Path) -> Any:
    """Return a predict that in every other process waits for `let`."""
    return cell(SLOW.format(here=os.getpid(), folder=f"{home.parent}/let-"))["predict"]


def let(home: Path, *calls: str) -> None:
    """Let these calls of the slow predict pass."""
    for call in calls:
        (home.parent / f"let-{call}").touch()


# The events at which a signal is sent: the first of each step, and the words that tell where within a step.
MOMENTS: dict[str, Callable[[Event], bool]] = {
    "captured": lambda event: event.step == "captured",
    "locked": lambda event: event.step == "locked" and event.state == "running",
    "verified": lambda event: event.step == "verified" and event.state == "running",
    "between": lambda event: event.step == "verified" and event.state == "done",
    "starting": lambda event: event.step == "starting",
    "warming up": lambda event: event.step == "starting" and "warm" in event.detail,
    "started": lambda event: event.step == "starting" and event.state == "done",
    "ready": lambda event: event.step == "ready" and event.state == "running",
}
# How many calls of the slow predict must pass for the deploy to come there; the next one holds it.
PASSED = {"between": 1, "starting": 1, "warming up": 1, "started": 2, "ready": 2}


def rows(steps: Iterable[str], first: str, update: str) -> list[Any]:
    """Return every step with and without a Revision that served before; the quick tests have those named here."""
    quick = [(False, first.split()), (True, update.split())]
    return [
        pytest.param(
            step,
            served,
            id=f"{step}-{'update' if served else 'first'}",
            marks=() if step in named else pytest.mark.slow,
        )
        for step in steps
        for served, named in quick
    ]


def begin(home: Path, **options: Any) -> Job:
    """Start a deploy of the slow predict without waiting, and return its Job."""
    deploy(slow(home), name="one", sample={"x": 1}, wait=False, **options)
    found = running_job(nbdeploy.config.home(), "one")  # type: ignore[attr-defined] # a submodule, imported above
    assert found is not None
    return found


def until(job: Job, moment: Callable[[Event], bool]) -> None:
    """Wait until the Job's log has an event of this kind."""
    wait_until(lambda: any(moment(event) for event in job.events()) or job.ended())
    assert not job.ended(), "the moment was missed"


def nothing_runs(home: Path, *, served: bool) -> None:
    """Prove that no process is left but those of what serves (a supervisor and a Replica)."""
    wait_until(lambda: len(leftovers(home)) == (2 if served else 0))
    assert not any((job.folder / "secrets.json").exists() for job in all_jobs(home))
    assert not any((job.folder / "child.json").exists() for job in all_jobs(home))


def at(step: str, home: Path, monkeypatch: pytest.MonkeyPatch, *, served: bool) -> tuple[Job, Identity]:
    """Begin a deploy with a secret, over an older one or not; return it and its worker once it has come to a step."""
    monkeypatch.setenv("TOKEN", "s3cret")
    if served:
        deploy(OLD, name="one", verify=False)
    let(home, *CALLS[: PASSED.get(step, 0)])
    job = begin(home, secrets=("TOKEN",))
    wait_until(job.worker)
    until(job, MOMENTS[step])
    worker = job.worker()
    assert worker is not None
    return job, worker


@pytest.mark.parametrize(("step", "served"), rows(MOMENTS, "locked starting ready", "captured verified started"))
def test_cancel_at_each_step(home: Path, monkeypatch: pytest.MonkeyPatch, step: str, served: bool) -> None:  # noqa: FBT001 - a parameter
    """SIGTERM ends the deploy as cancelled; what served before serves, a first deploy leaves nothing."""
    job, worker = at(step, home, monkeypatch, served=served)
    worker.signal(signal.SIGTERM)
    let(home, *CALLS)
    last = list(job.follow())[-1]
    assert (last.step, last.state) == ("job", "cancelled")
    check_what_serves(home, served=served)


@pytest.mark.parametrize(
    ("step", "served"),
    rows([*MOMENTS][:-2], "captured starting", "verified between"),  # then it serves already
)
def test_kill_at_each_step(home: Path, monkeypatch: pytest.MonkeyPatch, step: str, served: bool) -> None:  # noqa: FBT001 - a parameter
    """A worker that is killed leaves no word: whoever follows says it, nothing half-made serves, a new deploy works."""
    job, worker = at(step, home, monkeypatch, served=served)
    worker.signal(signal.SIGKILL)
    let(home, *CALLS)
    last = list(job.follow())[-1]
    assert (last.step, last.state, last.data["error"]) == ("job", "failed", "DeployError")
    assert "killed" in last.detail or "died" in last.detail
    assert [event.seq for event in job.events()] == list(range(1, len(job.events()) + 1))
    check_what_serves(home, served=served)


def check_what_serves(home: Path, *, served: bool) -> None:
    """Check that the deploy before is what serves, or nothing does, and that the next deploy works."""
    nothing_runs(home, served=served)
    if served:
        assert nbdeploy.connect("one")(x=1) == "old"
        assert nbdeploy.connect("one").status().reason == ""
    else:
        with pytest.raises(EndpointNotFoundError):
            nbdeploy.connect("one")
    assert deploy(NEW, name="one", verify=False)(x=1) == "new"


def test_a_kill_at_the_last_step_says_what_serves(home: Path) -> None:
    """Once the new Revision serves, a killed worker cannot take it back: the words say so."""
    let(home, *CALLS[: PASSED["ready"]])
    job = begin(home)
    until(job, MOMENTS["ready"])
    worker = job.worker()
    assert worker is not None
    worker.signal(signal.SIGKILL)
    let(home, *CALLS)
    assert "the new Revision serves" in list(job.follow())[-1].detail
    assert nbdeploy.connect("one")(x=1) == "slow"


SCRIPT = """
import sys, time, os
import nbdeploy
namespace = {{"__name__": "__main__"}}
exec({source!r}, namespace)
def show(event):
    print(event.step, event.state, event.detail, flush=True)
endpoint = nbdeploy.deploy(namespace["predict"], name="one", sample={{"x": 1}}, on_event=show)
print("back", repr(endpoint.name), flush=True)
"""


def kernel(source: str) -> subprocess.Popen[str]:
    """Start a process that deploys, as a kernel does."""
    script = SCRIPT.format(source=textwrap.dedent(source))
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    )


WAITS = """
import os, time
mine = os.getpid()
def predict(x: int) -> str:
    limit = time.monotonic() + 60
    while mine != os.getpid() and not os.path.exists({go!r}) and time.monotonic() < limit:
        time.sleep(0.01)
    return 'done'
"""


def test_an_interrupt_detaches(home: Path) -> None:
    """Ctrl+C in the cell ends the following, not the deploy."""
    go = home.parent / "go"
    with kernel(WAITS.format(go=str(go))) as process:
        assert process.stdout is not None
        assert any(line.startswith("verified running") for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(DEADLINE) == 0, rest
    go.touch()
    assert "job note Detached" in rest
    assert "nbdeploy cancel one" in rest
    assert "back 'one'" in rest
    (job,) = all_jobs(home)
    assert list(job.follow())[-1].state == "done"
    assert nbdeploy.connect("one")(x=1) == "done"


def test_the_kernel_may_die(home: Path) -> None:
    """A killed kernel changes nothing: the deploy goes on to its end."""
    go = home.parent / "go"
    with kernel(WAITS.format(go=str(go))) as process:
        assert process.stdout is not None
        assert any(line.startswith("locked") for line in iter(process.stdout.readline, ""))
        process.kill()
    go.touch()
    (job,) = all_jobs(home)
    assert list(job.follow())[-1].state == "done"
    assert nbdeploy.connect("one")(x=1) == "done"


def test_cancel_raises_in_the_cell(home: Path) -> None:
    """A deploy that is cancelled from elsewhere raises CancelledError where it was begun."""

    def cancel(event: Event) -> None:
        if event.step == "verified" and event.state == "running":
            job = running_job(home, "one")
            assert job is not None
            job.cancel()

    with pytest.raises(CancelledError, match="cancelled"):
        deploy(slow(home), name="one", sample={"x": 1}, on_event=cancel)
    nothing_runs(home, served=False)


def test_a_second_deploy_of_a_name_is_refused(home: Path) -> None:
    """One deploy of a name at a time; the words name the way out. Another name is free."""
    job = begin(home)
    with pytest.raises(DeployError, match="nbdeploy cancel one"):
        deploy(NEW, name="one")
    let(home, *CALLS)
    assert deploy(NEW, name="two", verify=False)(x=1) == "new"
    assert list(job.follow())[-1].state == "done"


def test_a_request_that_differs_is_undone(home: Path) -> None:
    """Where the Endpoint answers otherwise than the notebook, what served before serves again."""
    deploy(OLD, name="one", verify=False)
    events: list[Event] = []
    with pytest.raises(ParityError, match="depends on what was called before"):
        deploy(differs_in_replicas(), name="one", sample={"x": 1}, on_event=events.append)
    assert any(event.step == "ready" for event in events)
    endpoint = nbdeploy.connect("one")
    assert endpoint(x=1) == "old"
    assert endpoint.status().phase == "ready"
    with pytest.raises(ParityError):
        deploy(differs_in_replicas(), name="fresh", sample={"x": 1})
    with pytest.raises(EndpointNotFoundError):
        nbdeploy.connect("fresh")
    nothing_runs(home, served=True)


def differs_in_replicas() -> Any:
    """Return a predict that answers otherwise when it serves: it runs on a lane's thread then."""
    return cell("""
        def predict(x: int) -> int:
            import threading
            return int(threading.current_thread().name.startswith("predict-"))
        """)["predict"]


def test_a_stopped_endpoint_stays_stopped(home: Path) -> None:
    """A failed deploy over a stopped Endpoint leaves it as it was, with its history and key."""
    endpoint = deploy(OLD, name="one", verify=False)
    endpoint.stop()
    with pytest.raises(ParityError):
        deploy(differs_in_replicas(), name="one", sample={"x": 1})
    assert nbdeploy.connect("one").status().phase == "idle"
    endpoint.start()
    assert endpoint(x=1) == "old"


def test_no_verify(home: Path) -> None:
    """--no-verify skips the clean process and says so; the request through the URL still is compared."""
    events: list[Event] = []
    deploy(NEW, name="one", sample={"x": 1}, verify=False, on_event=events.append)
    assert [event.detail for event in events if event.step == "verified"] == ["skipped (--no-verify)"]
    card = events[-1].data["card"]
    assert card["parity"]["state"] == "unverified"
    assert "--no-verify" in card["parity"]["note"]


def test_dry_run_deploys_nothing(home: Path) -> None:
    """A dry run verifies and reports; there is no Endpoint and no process afterwards."""
    events: list[Event] = []
    endpoint = deploy(NEW, name="one", sample={"x": 1}, dry_run=True, on_event=events.append)
    card = events[-1].data["card"]
    assert (card["dry_run"], card["url"], card["revision"], card["parity"]["state"]) == (True, "", 0, "equal")
    assert not any(event.step in {"starting", "ready"} for event in events)
    with pytest.raises(EndpointNotFoundError):
        endpoint.status()
    with pytest.raises(EndpointNotFoundError):
        endpoint.receipt()
    nothing_runs(home, served=False)


def test_owners(home: Path) -> None:
    """The name of another notebook is refused unless it is taken over; the same notebook may deploy again."""
    mine, other = Context(notebook="/books/mine.ipynb"), Context(notebook="/books/other.ipynb")
    deploy(OLD, name="one", verify=False, context=mine)
    deploy(OLD, name="one", verify=False, context=mine)
    with pytest.raises(OwnershipError, match=r"/books/mine\.ipynb.*--replace"):
        deploy(NEW, name="one", verify=False, context=other)
    assert nbdeploy.connect("one")(x=1) == "old"
    deploy(NEW, name="one", verify=False, context=other, replace=True)
    status = nbdeploy.connect("one").status()
    assert (status.notebook, nbdeploy.connect("one")(x=1)) == ("/books/other.ipynb", "new")


def inherited() -> str:
    """Return a variable that this process was started with, and that is on no allow-list: it does not travel."""
    names = [row.partition("=")[0] for row in Path("/proc/self/environ").read_text(encoding="utf-8").split("\0")]
    fit = [name for name in names if re.fullmatch("[A-Z][A-Z_]+", name) and not clean_environment({name: ""})]
    return next((name for name in fit if name in os.environ), "PWD")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "from pathlib import Path\ndef predict(x: int) -> str:\n    return Path('labels.txt').read_text()\n",
            ["labels.txt", "--file"],
        ),
        (f"import os\ndef predict(x: int) -> str:\n    return os.environ[{inherited()!r}]\n", [inherited(), "--env"]),
        (
            "import colorsys\ndef predict(x: int) -> str:\n    return colorsys.patched\n",
            ["patched", "does not travel", "--setup"],
        ),
        (
            "import sys\ndef predict(x: int) -> str:\n    import only_here\n    return only_here.WORD\n",
            ["only_here", "module"],
        ),
    ],
    ids=["file", "variable", "state of a library", "module"],
)
def test_what_fails_only_in_the_clean_process(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: list[str]
) -> None:
    """The module, file, variable or state that is missing outside the notebook is named, with the next step."""
    import colorsys
    import types

    monkeypatch.setattr(colorsys, "patched", "yes", raising=False)
    module = types.ModuleType("only_here")
    module.WORD = "x"  # type: ignore[attr-defined] # that is the point
    monkeypatch.setitem(sys.modules, "only_here", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("cat", encoding="utf-8")
    namespace = cell(source)
    with pytest.raises(VerificationError) as caught:
        deploy(namespace["predict"], name="one", sample={"x": 1})
    for word in words:
        assert word in str(caught.value)
    nothing_runs(home, served=False)


def test_the_job_folder_is_private(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither key nor secret values stay in a Job's folder, and only the owner can look into it."""
    monkeypatch.setenv("TOKEN", "s3cret-value")
    endpoint = deploy(NEW, name="one", sample={"x": 1}, secrets=("TOKEN",))
    (job,) = all_jobs(home)
    key = (home / "endpoints" / "one" / "key").read_bytes()
    assert endpoint(x=1) == "new"
    for path in job.folder.rglob("*"):
        if path.is_file():
            assert key not in path.read_bytes()
            assert b"s3cret-value" not in path.read_bytes()
            assert path.stat().st_mode & 0o007 == 0 or job.folder.stat().st_mode & 0o077 == 0
    assert json.loads((job.folder / "job.json").read_text(encoding="utf-8"))["name"] == "one"
