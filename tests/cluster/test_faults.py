"""A worker that is killed or cancelled at any step, and forwarders, pods and changes that come in between."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

import nbdeploy
from nbdeploy import deploying, process
from nbdeploy.cli import main
from nbdeploy.config import EngineSettings
from nbdeploy.deploying import deploy
from nbdeploy.endpoint import engine_named
from nbdeploy.engines.kubernetes.workload import object_name
from nbdeploy.errors import EndpointNotFoundError, EngineError, UnreachableError
from nbdeploy.jobs import Event, Job, all_jobs
from nbdeploy.spec import Autoscaling, Resources
from tests.conftest import leftovers, wait_until
from tests.engines.conftest import at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.cluster.running import Namespace

LITTLE = Resources(cpus=0.05, memory="256Mi")
KINDS = (
    "configmaps,secrets,services,serviceaccounts,deployments,replicasets,pods,poddisruptionbudgets,networkpolicies,"
    "endpointslices"
)
# A worker that stops where a function is entered: it kills itself there, or says so and waits for its end.
FAULT = """
import importlib, os, signal
def main(argument):
    module, _, path = argument["point"].partition(":")
    holder = importlib.import_module(module)
    *owners, last = path.split(".")
    for one in owners:
        holder = getattr(holder, one)
    real = getattr(holder, last)
    def there(*arguments, **named):
        if argument["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        open(argument["job"] + "/there", "w").close()
        while True:
            signal.pause()
    setattr(holder, last, there)
    importlib.import_module("nbdeploy.worker").main(argument)
"""
_APPLYING = "nbdeploy.engines.kubernetes.applying:Applying"
POINTS = {
    "before the push": "nbdeploy.engines.kubernetes.applying:publish",
    "layers sent": "nbdeploy.oci.push:_Push.put_manifest",
    "record written": f"{_APPLYING}._apply",
    "objects applied": f"{_APPLYING}._follow",
    "rolled out": f"{_APPLYING}._commit",
    "asking": "nbdeploy.worker:Work._ask",
}


def answers(word: str, *, with_model: bool = False) -> Any:
    """Return a predict that answers with this word."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parameters = "model, x: int" if with_model else "x: int"
    exec(f"def predict({parameters}) -> str:\n    return {word!r}\n", namespace)  # noqa: S102 - the cell is the test's own
    return namespace["predict"]


def put(word: str, name: str = "one", **options: Any) -> Any:
    """Deploy a predict that answers with this word; with a model, one that has it."""
    options = {"verify": False, "resources": LITTLE, **options}
    model = options.pop("model", None)
    given = (answers(word),) if model is None else (model, answers(word, with_model=True))
    return deploy(*given, name=name, engine="cluster", sample={"x": 1}, **options)


@pytest.fixture
def ended_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Deploy, and have the worker end itself, or wait for its end, at a point."""
    (tmp_path / "faults.py").write_text(FAULT, encoding="utf-8")

    def deploy_until(point: str, *, kill: bool, **options: Any) -> Job:
        def launch(_entry: str, argument: dict[str, Any], *, path: list[str], **rest: Any) -> Any:
            argument = {**argument, "point": POINTS[point], "kill": kill}
            return process.launch("faults:main", argument, path=[str(tmp_path), *path], **rest)

        with monkeypatch.context() as patch:
            patch.setattr(deploying, "launch", launch)
            put("new", wait=False, **options)
        job = all_jobs(nbdeploy.config.home())[0]  # type: ignore[attr-defined] # a submodule
        worker = wait_until(job.worker)
        wait_until(lambda: not worker.alive() or (job.folder / "there").exists())
        assert kill == (not worker.alive())
        return job

    return deploy_until


@pytest.fixture
def place(on_cluster: Namespace, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The namespace, with Replicas that end soon; at the end nothing may run for this home."""
    real = EngineSettings.arguments
    arguments = lambda self, name: real(self, name) | ({"drain": 1.0} if self.kind == "kubernetes" else {})  # noqa: E731
    monkeypatch.setattr(EngineSettings, "arguments", arguments)
    yield on_cluster
    for endpoint in nbdeploy.endpoints("cluster"):
        endpoint.delete()
    wait_until(lambda: not leftovers(home))


def run(*arguments: str, status: int = 0) -> str:
    """Run `nbdeploy` and return what it printed."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status, result.output
    return result.output


def objects(place: Namespace, name: str = "one") -> list[str]:
    """Name every object of an Endpoint, as the administrator sees them."""
    found = place.cluster.get("-n", place.name, KINDS, "-l", f"nbdeploy.dev/endpoint={name}")["items"]
    return [f"{one['kind']} {one['metadata']['name']}" for one in found]


def deleted(place: Namespace, home: Path, name: str = "one") -> None:
    """Delete, and prove that neither objects, files nor processes are left."""
    run("delete", name)
    assert objects(place, name) == []
    assert not (home / "clusters" / "cluster" / name).exists()
    wait_until(lambda: not leftovers(home))


@pytest.mark.parametrize(
    ("point", "then"),
    [
        ("before the push", "deploy"),
        ("record written", "deploy"),
        ("objects applied", "delete"),
        ("rolled out", "deploy"),
    ],
)
def test_a_killed_first_deploy(
    place: Namespace, home: Path, ended_at: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, point: str, then: str
) -> None:
    """Status and listing say that it was ended half-way and what to do; the next deploy heals it, delete removes it."""
    monkeypatch.setenv("TOKEN", "s3cret")
    job = ended_at(point, kill=True, secrets=("TOKEN",))
    told = run("status", "one")
    assert not (job.folder / "secrets.json").exists()
    if point == "before the push":
        assert "failed" in told
        assert "killed" in told
        assert objects(place) == []
    else:
        assert "ended half-way" in told
        assert "ended half-way" in run("ls")
        assert "deploy it again, or nbdeploy delete one" in told
        assert "first deploy" in run("scale", "one", "--min", "2", status=1)
    if then == "deploy" or point == "before the push":
        assert put("healed")(x=1) == "healed"
        assert [one.number for one in nbdeploy.connect("one").history()] == [1]
        assert [row for row in objects(place) if row.startswith("Secret")] == [f"Secret {object_name('one')}-key"]
        assert "half-way" not in run("ls")
    deleted(place, home)


@pytest.mark.parametrize(
    ("point", "then"), [("record written", "start"), ("objects applied", "deploy"), ("rolled out", "start")]
)
def test_a_killed_update(
    place: Namespace, home: Path, ended_at: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, point: str, then: str
) -> None:
    """Something serves all the time; the next deploy heals it, `nbdeploy start` goes back; no Secret of it stays."""
    monkeypatch.setenv("TOKEN", "s3cret")
    old = put("old")
    job = ended_at(point, kill=True, secrets=("TOKEN",))
    assert old(x=1) == "old" if point == "record written" else old(x=1) in {"old", "new"}
    assert run("history", "one").split()[0] == "1"
    assert "revision 2" in run("status", "one")
    if point != "record written":
        assert "the cluster may go on" in list(job.follow())[-1].detail
    if then == "deploy":
        assert put("healed")(x=1) == "healed"
    else:
        run("start", "one")
        wait_until(lambda: old(x=1) == "old")
    assert [row for row in objects(place) if row.startswith("Secret")] == [f"Secret {object_name('one')}-key"]
    assert "revision 2" not in run("status", "one") + run("ls")
    deleted(place, home)


@pytest.mark.parametrize(
    ("point", "served"),
    [("record written", False), ("rolled out", False), ("asking", False), ("objects applied", True), ("asking", True)],
)
def test_a_cancelled_deploy(
    place: Namespace, home: Path, ended_at: Callable[..., Job], *, point: str, served: bool
) -> None:
    """`nbdeploy cancel` leaves what served before, or nothing where nothing did."""
    old = put("old") if served else None
    job = ended_at(point, kill=False)
    assert "cancelled" in run("cancel", "one")
    assert [event.state for event in job.events() if event.ends] == ["cancelled"]
    if old is not None:
        wait_until(lambda: old(x=1) == "old")
        assert "rolled out" not in run("status", "one")
        assert old.status().reason == ""
        assert put("next")(x=1) == "next"
        deleted(place, home)
        return
    with pytest.raises(EndpointNotFoundError):
        nbdeploy.connect("one")
    wait_until(lambda: objects(place) == [])
    wait_until(lambda: not leftovers(home))


def test_killed_while_asking(place: Namespace, home: Path, ended_at: Callable[..., Job]) -> None:
    """It serves already: the record says so, and the words that no request proved it."""
    put("old")
    ended_at("asking", kill=True)
    endpoint = nbdeploy.connect("one")
    assert (endpoint.revision, endpoint(x=1)) == (2, "new")
    assert endpoint.status().reason == ""
    deleted(place, home)


def test_killed_after_layers_were_sent(place: Namespace, home: Path, ended_at: Callable[..., Job]) -> None:
    """What a killed worker had brought to the registry is not sent again."""
    model = {"w": np.frombuffer(os.urandom(20_000_000), np.uint8)}
    ended_at("layers sent", kill=True, model=model)
    assert "killed" in run("status", "one")
    events: list[Event] = []
    assert put("new", model=model, on_event=events.append)(x=1) == "new"
    assert not any(event.data.get("bytes", 0) > 1_000_000 for event in events)
    deleted(place, home)


EXITS = """
import os
def predict(x: int) -> str:
    if x < 0:
        print('predict ends here', flush=True)
        os._exit(9)
    return os.environ['HOSTNAME']
"""


def test_replicas_that_end_under_load(place: Namespace) -> None:
    """A pod is killed, another ends in predict: of eight callers only those with a call on it hear of it, in words."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(EXITS, namespace)  # noqa: S102 - the cell is the test's own
    options = {"resources": LITTLE, "verify": False, "autoscaling": Autoscaling(2, 2)}
    endpoint = deploy(namespace["predict"], name="one", engine="cluster", **options)
    over, answers_, failures = threading.Event(), [], []

    def call() -> None:
        mine = nbdeploy.connect("one")
        while not over.is_set():
            try:
                answers_.append(mine(x=1))
            except UnreachableError as error:
                failures.append(str(error))

    def more() -> None:
        enough = len(answers_) + 200
        wait_until(lambda: len(answers_) > enough)

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    try:
        more()
        place.kubectl("delete", "pod", min(set(answers_)), "--force", "--grace-period=0")
        more()
        wait_until(lambda: endpoint.status().ready == 2)
        with pytest.raises(UnreachableError, match="predict may have run"):
            endpoint(x=-1)

        def told() -> bool:
            reason = endpoint.status().reason
            return "status 9" in reason and "predict ends here" in reason

        wait_until(told)
        more()
    finally:
        over.set()
        for caller in callers:
            caller.join(60)
    wait_until(lambda: endpoint.status().ready == 2)
    assert len(failures) <= 8, failures  # each caller had one call in flight
    assert str(endpoint.logs()).count("predict ends here") == 1


def test_a_full_quota(place: Namespace, home: Path) -> None:
    """An update whose new Replica does not fit is told in words; what served serves, and the record is as it was."""
    old = put("old")
    place.kubectl("create", "quota", "full", "--hard=pods=1")
    place.in_force("ResourceQuota", "full")
    with pytest.raises(EngineError, match="quota full"):
        put("new")
    assert (old(x=1), old.revision, old.status().reason) == ("old", 1, "")
    assert [one.number for one in old.history()] == [1]
    place.kubectl("delete", "quota", "full")
    assert put("new")(x=1) == "new"
    deleted(place, home)


def test_the_longest_name(place: Namespace, home: Path) -> None:
    """A name of 63 characters is deployed, asked, told, read and deleted as any other."""
    name = "n" * 63
    assert put("long", name=name)(x=1) == "long"
    assert "ready" in run("status", name)
    wait_until(lambda: "revision 1" in run("logs", name))  # a line takes a moment from the pod
    assert forwarder(name).alive()
    deleted(place, home, name)


def forwarder(name: str = "one") -> Any:
    """Return who forwards for an Endpoint."""
    return engine_named("cluster")._forwarders._state.forwarder(name)  # type: ignore[attr-defined]


def refuses(url: str) -> bool:
    """Whether nobody listens there any more: the last thread of a killed process closes its sockets."""
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False
    return False


def test_a_forwarder_that_is_killed(place: Namespace, home: Path) -> None:
    """An Endpoint that a notebook holds has its forwarder brought up by its next call, at the same port."""
    endpoint = put("old")
    assert endpoint(x=1) == "old"
    url = endpoint.url
    os.kill(forwarder().pid, signal.SIGKILL)
    wait_until(lambda: refuses(url))
    assert endpoint(x=1) == "old"
    assert forwarder().alive()
    assert endpoint.url == url
    os.kill(forwarder().pid, signal.SIGKILL)
    wait_until(lambda: refuses(url))
    assert nbdeploy.connect("one")(x=1) == "old"
    deleted(place, home)


def test_changes_while_a_deploy_rolls_out(place: Namespace, home: Path, ended_at: Callable[..., Job]) -> None:
    """A scale that comes into a roll-out wins; the deploy that was overtaken undoes nothing of it."""
    old = put("old")
    job = ended_at("objects applied", kill=False)
    old.scale(min_replicas=2)
    assert "cancelled" in run("cancel", "one")
    assert [event.state for event in job.events() if event.ends] == ["cancelled"]
    status = old.status()
    assert (status.revision, status.ready, status.desired, status.reason) == (2, 2, 2, "")
    assert {old(x=1) for _ in range(20)} == {"old"}
    deleted(place, home)


WAITS = """
import time, os
def setup():
    if os.path.exists('/opt/nbdeploy'):
        time.sleep(600)
def predict(model, x: int) -> str:
    return 'late'
"""


def starting(job: Job) -> bool:
    """Whether its Replicas load."""
    return any("loading" in event.detail for event in job.events())


@pytest.mark.parametrize("change", ["stop", "scale", "delete"])
def test_a_change_ends_a_roll_out(place: Namespace, home: Path, change: str) -> None:
    """Stop, scale and delete in the midst of a roll-out are done; the deploy hears at once that another came first."""
    old = put("old")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(WAITS, namespace)  # noqa: S102 - the cell is the test's own
    options = {"resources": LITTLE, "verify": False, "wait": False, "setup": namespace["setup"]}
    deploy(namespace["predict"], name="one", engine="cluster", **options)
    job = all_jobs(home)[0]
    wait_until(lambda: starting(job))
    engine = engine_named("cluster")
    if change == "delete":
        engine.delete("one")  # as from another machine: Endpoint.delete cancels the deploy first
    elif change == "stop":
        old.stop()
    else:
        old.scale(min_replicas=2)
    last = list(job.follow())[-1]
    assert last.state == "failed"
    if change == "delete":
        assert "was deleted" in last.detail
        assert objects(place) == []
        return
    assert "came first" in last.detail
    status = old.status()
    assert (status.revision, status.desired, status.phase) == (2, 0, "idle") if change == "stop" else (2, 2, "ready")
    deleted(place, home)


def test_two_scales_at_once(place: Namespace) -> None:
    """One wins, or both in turn; what is told, recorded and running agree."""
    put("old")
    endpoints = {number: nbdeploy.connect("one") for number in (2, 3)}
    outcomes = at_once(lambda number: endpoints[number].scale(min_replicas=number), 2, 3)
    assert "" in outcomes.values()
    assert all("came first" in words for words in outcomes.values() if words)
    status = nbdeploy.connect("one").status()
    assert status.autoscaling.min_replicas == status.desired == status.ready
    assert outcomes[status.desired] == ""
    assert status.reason == ""
