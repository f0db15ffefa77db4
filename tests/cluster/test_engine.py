"""What only the Kubernetes engine promises, on a real cluster, with the rights of the printed Role alone."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.base import get_engine
from nbdeploy.engines.kubernetes.workload import object_name
from nbdeploy.errors import EndpointNotFoundError, EngineError
from nbdeploy.spec import Phase, Resources, Serving
from tests.conftest import wait_until
from tests.engines import conftest
from tests.engines.conftest import ADD, NEVER_LOADS, PRINTS, REPLICA, House, Raw, at_once, eventually, house_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.cluster.running import Namespace

name = conftest.name  # the fixture, with the house of this module
SECRET = "import os\ndef predict(x: int) -> list:\n    return [os.environ.get('OWN', ''), os.environ.get('TEAM', '')]\n"
INSIDE = """
import os, pathlib, re, tempfile
def predict(path: str) -> dict:
    def tried(action):
        try:
            action()
        except OSError as error:
            return type(error).__name__
        return "worked"
    return {
        "uid": os.getuid(),
        "root": tried(lambda: os.mkdir("/opt/nbdeploy/new")),
        "tmp": tried(lambda: os.rmdir(tempfile.mkdtemp())),
        "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"),
        "capabilities": re.findall("CapEff:.(.*)", pathlib.Path("/proc/self/status").read_text()),
        "ours": [name for name in os.environ if name.startswith("NBDEPLOY_")],
    }
"""


@pytest.fixture(scope="module")
def place(make_namespace: Callable[[], Namespace]) -> Namespace:
    """A namespace of this module's."""
    return make_namespace()


def settings_of(place: Namespace) -> dict[str, Any]:
    """Return what an engine of this namespace is made with."""
    return {
        "namespace": place.name,
        "registry": f"{place.cluster.registry}/{place.name}",
        "base_image": place.cluster.base_image,
        "drain": 1.0,
    }


@pytest.fixture(scope="module")
def house(place: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """An engine on the cluster with a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in place.environ().items():
            patch.setenv(key, value)
        yield from house_of("kubernetes", tmp_path_factory.mktemp("house") / "home", settings_of(place))


def pods(place: Namespace, name: str) -> list[dict[str, Any]]:
    """Return the pods of an Endpoint that are not ending, as the administrator sees them."""
    found = place.cluster.get("-n", place.name, "pods", "-l", f"nbdeploy.dev/endpoint={name}")["items"]
    return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]


def told(house: House, name: str, source: str) -> list[tuple[str, dict[str, Any]]]:
    """Apply a source as the next Revision; returns what was told of the push."""
    bundle, words = house.bundle(source, {"x": 1}), []
    house.engine.apply(house.revision(name, bundle), bundle, lambda text, data: words.append((text, dict(data))))
    return [(text, data) for text, data in words if data.get("step") == "pushed"]


def test_a_change_pushes_kilobytes_and_nothing_pushes_nothing(house: House, place: Namespace, name: str) -> None:
    """Only predict changed: at most 100 kB in 12 requests. Nothing changed: no byte, and the very same pod."""
    told(house, name, ADD)
    changed = told(house, name, ADD.replace("+ 1", "+ 7"))
    words = changed[-1][0]
    assert "kB of" in words
    assert float(words.split()[0]) <= 100
    assert int(words.split(", ")[1].split()[0]) <= 12
    before = pods(place, name)
    again = told(house, name, ADD.replace("+ 1", "+ 7"))
    assert again[-1][0].startswith("the registry has all")
    assert not [data for _, data in again if data.get("bytes")]
    assert [pod["metadata"]["uid"] for pod in pods(place, name)] == [pod["metadata"]["uid"] for pod in before]
    assert house.engine.status(name).revision == 3


def answered(client: Raw) -> bool:
    """Ask once; tell whether it was answered."""
    try:
        client.ask({"x": 1})
    except (OSError, AssertionError, ValueError):
        client.close()
        return False
    return True


def test_no_request_fails_through_a_roll_out(house: House, place: Namespace, name: str) -> None:
    """16 kept connections without retries call through the Service during an update; all are answered."""
    settings = {key: value for key, value in settings_of(place).items() if key != "drain"}  # every proxy gets its time
    house = House(house.home, get_engine("kubernetes", house.home, settings))
    enough = Resources(cpus=0.5, memory="256Mi")  # while other tests load the nodes
    house.apply(name, ADD, {"x": 1}, resources=enough)
    key = house.engine.key(name)
    address = place.cluster.get("-n", place.name, "service", object_name(name))["spec"]["clusterIP"]
    with Raw(f"http://{address}:80", key) as client:  # what is promised of a Service begins when proxies know it
        eventually(lambda: answered(client))
    over = threading.Event()
    answers: list[int] = []
    failures: list[str] = []

    def call() -> None:
        with Raw(f"http://{address}:80", key) as client:
            while not over.is_set():
                over.wait(0.01)  # the nodes share this machine: callers at full speed would starve their proxy
                try:
                    answers.append(client.ask({"x": 1}))
                except (OSError, AssertionError, ValueError) as error:
                    failures.append(f"{time.monotonic() - began:.2f} s: {error!r}")
                    client.close()

    began = time.monotonic()
    callers = [threading.Thread(target=call) for _ in range(16)]
    for caller in callers:
        caller.start()
    try:
        wait_until(lambda: len(answers) > 200)
        house.apply(name, ADD.replace("+ 1", "+ 100"), {"x": 1}, resources=enough)
        wait_until(lambda: len(pods(place, name)) == 1 and answers[-100:] == [101] * 100)
        wait_until(lambda: len(answers) > 2000)
    finally:
        over.set()
        for caller in callers:
            caller.join(30)
    assert failures == []
    assert set(answers) == {2, 101}


def test_pods_are_confined(house: House, name: str) -> None:
    """A Replica runs as nobody, writes only to /tmp, has no capability, no token, and sees no setting of ours."""
    house.apply(name, INSIDE, {"path": "x"})
    found = house.ask(name, path="x")
    assert found["uid"] == 10001
    assert (found["root"], found["tmp"]) == ("OSError", "worked")
    assert (found["token"], found["ours"]) == (False, [])
    assert set(found["capabilities"]) == {"0000000000000000"}


def test_secrets(house: House, place: Namespace, name: str) -> None:
    """A secret of the notebook goes into a Secret of the Endpoint, one that the team keeps stays where it is."""
    place.kubectl("create", "secret", "generic", "team", "--from-literal=word=xyzzy")
    house.apply(name, SECRET, {"x": 1}, secrets=("OWN", "TEAM=team/word"), secret_values={"OWN": "s3cret"})
    assert house.ask(name, x=1) == ["s3cret", "xyzzy"]
    whole = json.dumps(place.cluster.get("-n", place.name, "configmaps,deployments,pods"))
    assert "s3cret" not in whole
    assert house.engine.key(name) not in whole


def test_two_deploys_at_once(house: House, place: Namespace, name: str) -> None:
    """Of two first deploys of one name, one wins, and the other is told that it came later; nothing is mixed."""
    bundles = [house.bundle(ADD, {"x": 1}), house.bundle(ADD.replace("+ 1", "+ 50"), {"x": 1})]
    engines = [get_engine("kubernetes", house.home, settings_of(place)) for _ in bundles]
    revisions = [dataclasses.replace(house.revision(name, bundles[n]), owner=f"owner-{n}") for n in (0, 1)]
    outcomes = at_once(lambda n: engines[n].apply(revisions[n], bundles[n], lambda _words, _data: None), 0, 1)
    winner = next(number for number, words in outcomes.items() if not words)
    assert "came first" in outcomes[1 - winner]
    assert house.ask(name, x=1) == (2, 51)[winner]
    assert house.engine.status(name).owner == f"owner-{winner}"


def test_no_node_has_so_many_gpus(house: House, place: Namespace, name: str, tmp_path: Path) -> None:
    """More GPUs than any node has: told at once, given up after a while, and nothing is left."""
    impatient = get_engine("kubernetes", house.home, {**settings_of(place), "patience": 3.0})
    bundle = house.bundle(ADD, {"x": 1})
    revision = house.revision(name, bundle, resources=Resources(cpus=0.05, memory="256Mi", gpus=9))
    words: list[str] = []
    with pytest.raises(EngineError, match="GPU"):
        impatient.apply(revision, bundle, lambda text, _data: words.append(text))
    assert any("GPU" in text for text in words)
    assert name not in [status.name for status in house.engine.list()]
    wait_until(lambda: not pods(place, name))


def test_a_gpu_is_asked_for(house: House, place: Namespace, name: str) -> None:
    """--gpu 1 runs on the node that has GPUs, and counts as one of them (they are made up here: no driver)."""
    house.apply(name, PRINTS, {"x": 1}, resources=Resources(cpus=0.05, memory="256Mi", gpus=1))
    [pod] = pods(place, name)
    assert pod["spec"]["nodeName"] == "node1"
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_name_that_is_taken_by_others(house: House, place: Namespace, name: str) -> None:
    """An object that is not ours under the name we need is neither taken over nor deleted."""
    place.kubectl("create", "configmap", object_name(name), "--from-literal=a=b")
    with pytest.raises(EngineError, match="was not made by nbdeploy"):
        house.apply(name, ADD, {"x": 1})
    assert place.cluster.get("-n", place.name, "configmap", object_name(name))["data"] == {"a": "b"}
    place.kubectl("delete", "configmap", object_name(name))


def test_going_back_restores_all_of_a_revision(house: House, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Revisions of one Bundle that differ in a variable: going back brings the first one's value back."""
    source = "import os\ndef predict(x: int) -> str:\n    return os.environ.get('MODE', 'none')\n"
    house.apply(name, source)
    monkeypatch.setenv("MODE", "other")
    house.apply(name, source, variables=("MODE",))
    wait_until(lambda: house.ask(name, x=1) == "other")
    house.change(name, variables=())
    wait_until(lambda: house.ask(name, x=1) == "none")


def test_a_taken_port_is_told_before_anything_is_made(house: House, name: str) -> None:
    """--port of a forwarder that another program has is refused at once."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        revision = house.revision(name, house.bundle(ADD), serving=Serving(port=other.getsockname()[1]))
        with pytest.raises(EngineError, match="is taken"):
            house.engine.check(revision)


def test_a_log_that_nobody_reads_on_leaves_nothing(house: House, name: str) -> None:
    """Whoever stops following a log leaves no thread behind."""
    house.apply(name, PRINTS)
    lines = house.engine.logs(name, follow=True)
    assert next(lines).startswith("nbd-")
    lines.close()
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("nbdeploy-log-")])


def test_a_record_that_somebody_broke(house: House, place: Namespace, name: str) -> None:
    """A record that cannot be read is told by status and listing, hides no other Endpoint, and can be deleted."""
    house.apply(name, ADD, {"x": 1})
    patch = {"metadata": {"annotations": {"nbdeploy.dev/summary": "nonsense"}}, "data": {"record.json": "{"}}
    place.kubectl("patch", "configmap", object_name(name), "--type=merge", "-p", json.dumps(patch))
    status = house.engine.status(name)
    assert status.phase == Phase.FAILED
    assert "somebody changed it" in status.reason
    assert [one.phase for one in house.engine.list() if one.name == name] == [Phase.FAILED]
    with pytest.raises(EndpointNotFoundError):
        house.engine.status("another")
    house.engine.delete(name)
    assert name not in [one.name for one in house.engine.list()]
    assert pods(place, name) == []


def test_deleted_from_elsewhere(house: House, place: Namespace, name: str) -> None:
    """`kubectl delete` of the record takes everything along; the forwarder here ends, and the name is free."""
    house.apply(name, ADD, {"x": 1})
    place.kubectl("delete", "configmap", object_name(name))
    wait_until(lambda: not pods(place, name))
    assert name not in [status.name for status in house.engine.list()]
    wait_until(lambda: not house.engine._forwarders.alive(name))
    assert house.apply(name, ADD, {"x": 1}).revision == 1


def test_what_keeps_it_from_being_ready(house: House, place: Namespace, name: str) -> None:
    """A Deployment that was removed and a pod that is gone are told by status; start heals the first."""
    house.apply(name, ADD, {"x": 1})
    place.kubectl("delete", "deployment", object_name(name))
    wait_until(lambda: not pods(place, name))
    status = house.engine.status(name)
    assert (status.phase, status.ready) == (Phase.FAILED, 0)
    assert "nbdeploy start" in status.reason
    assert house.change(name, stopped=False).phase == Phase.READY
    assert house.ask(name, x=1) == 2


def test_what_is_left_of_a_failure(house: House, place: Namespace, name: str) -> None:
    """A Revision that fails names the notebook's error, and leaves neither pods, Secrets nor a record of itself."""
    house.apply(name, REPLICA, {"x": 1})
    with pytest.raises(EngineError, match="no weights here"):
        house.apply(name, NEVER_LOADS, secrets=("OWN",), secret_values={"OWN": "x"})
    wait_until(lambda: len(pods(place, name)) == 1)
    secrets = place.cluster.get("-n", place.name, "secrets", "-l", f"nbdeploy.dev/endpoint={name}")["items"]
    assert [one["metadata"]["name"] for one in secrets] == [f"{object_name(name)}-key"]
    assert [revision.number for revision in house.engine.revisions(name)] == [1]


def test_listing_costs_two_requests(house: House, name: str) -> None:
    """However many Endpoints there are, a listing asks twice."""
    engine = house.engine
    engine.list()
    before = engine._client.requests
    none = engine.list()
    assert engine._client.requests - before == 2
    house.apply(name, ADD, {"x": 1})
    wait_until(lambda: len(engine.list()) == len(none) + 1)  # a listing may come from the server's cache
    before = engine._client.requests
    engine.list()
    assert engine._client.requests - before == 2


def test_delete_says_what_stays(house: House, place: Namespace, name: str) -> None:
    """The Images of all Revisions are named before a delete; they are still in the registry after it."""
    house.apply(name, ADD, {"x": 1})
    house.apply(name, ADD.replace("+ 1", "+ 2"), {"x": 1})
    images = house.engine.remains(name)
    assert len(images) == 2
    assert all(image.startswith(f"{place.cluster.registry}/{place.name}/{name}@sha256:") for image in images)
    house.engine.delete(name)
    listed = "configmaps,services,deployments,replicasets,pods,serviceaccounts,secrets,poddisruptionbudgets"
    found = place.cluster.get("-n", place.name, f"{listed},networkpolicies", "-l", f"nbdeploy.dev/endpoint={name}")
    assert found["items"] == []


def test_an_interrupted_roll_out(house: House, place: Namespace, name: str) -> None:
    """An apply that is cancelled in mid-roll-out leaves what served before."""
    house.apply(name, ADD, {"x": 1})
    waits = "import time\ndef setup():\n    time.sleep(600)\ndef predict(model, x: int) -> int:\n    return x\n"
    bundle = house.bundle(waits)

    class CancelledByTest(BaseException):
        pass

    def stop(words: str, _data: Any) -> None:
        if "loading" in words:
            raise CancelledByTest

    with pytest.raises(CancelledByTest):
        house.engine.apply(house.revision(name, bundle), bundle, stop)
    assert house.engine.status(name).revision == 1
    assert house.ask(name, x=1) == 2
    wait_until(lambda: len(pods(place, name)) == 1)
