"""The Kubernetes engine on the test cluster: what a redeploy costs, how fast a roll-out is, what a listing takes.

    python benchmarks/cluster.py [--rounds 3] [--endpoints 1000]

- redeploy, only predict changed: bytes and requests to the registry. Goals: 100 kB, 12 requests.
- redeploy, nothing changed: bytes, and whether a pod was replaced. Goals: 0, no.
- from `deploy(...)` to ready with layers present, against `kubectl set image` and `kubectl rollout status` between the
  same two Images. Goal: 3 s more at most.
- 16 raw keep-alive clients without retries call through the Service during roll-outs, at least 2,000 times. Goal: none
  fails.
- listing many Endpoints. Goals: a constant number of requests, 2 s.

Needs what the tests of the cluster need (Linux, root); the cluster is brought up and ended where none is up. Where the
tests' own kubernetes-validate is installed, the package kubernetes imports it, which takes each deploy a second that
users do not have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402 - the fixtures of the cluster are plain functions
from _measure import middle, record, show, temporary_home  # noqa: E402
from updates import functions, percentile  # noqa: E402

from tests.cluster import running  # noqa: E402

CLIENTS, THINK, LEAST = 16, 0.02, 2000


@contextlib.contextmanager
def namespace() -> Iterator[running.Namespace]:
    """Give a namespace with the Role alone, and the settings that lead there."""
    cluster = running.use()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        made = running.make_namespace(cluster, Path(folder))
        for key, value in made.environ().items():
            patch.setenv(key, value)
        patch.setenv("XDG_CONFIG_HOME", folder)
        made.configure(Path(folder))
        try:
            yield made
        finally:
            cluster.kubectl("delete", "namespace", made.name, "--wait=false")


def deployed(function: Any) -> dict[str, Any]:
    """Deploy once; returns the wall seconds, the words of the push and the step's seconds."""
    import nbdeploy

    steps: dict[str, tuple[str, float]] = {}

    def note(event: Any) -> None:
        if event.state == "done":
            steps[event.step] = (event.detail, event.seconds)

    began = time.perf_counter()
    nbdeploy.deploy(function, name="tiny", engine="cluster", sample={"value": 4.0}, on_event=note)
    return {
        "wall": time.perf_counter() - began,
        "pushed": steps["pushed"][0],
        "steps": {step: seconds for step, (_, seconds) in steps.items()},
    }


def image(place: running.Namespace) -> str:
    """Return the Image that the Deployment has."""
    return str(
        place.cluster.get("-n", place.name, "deployment", "nbd-tiny")["spec"]["template"]["spec"]["containers"][0][
            "image"
        ]
    )


def pods(place: running.Namespace) -> list[str]:
    """Return the names of the pods."""
    return sorted(one["metadata"]["name"] for one in place.cluster.get("-n", place.name, "pods")["items"])


def bytes_and_requests(words: str) -> tuple[float, int]:
    """Read "4.28 kB of 81.5 MB, 7 requests"; nothing was sent where the registry had all."""
    if "requests" not in words:
        return 0.0, 0
    sent, _, rest = words.partition(" of ")
    number, unit = sent.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit], int(rest.split(", ")[1].split()[0])


def redeploys(place: running.Namespace, made: list[Any]) -> dict[str, Any]:
    """Deploy, change predict, change nothing."""
    deployed(made[0])
    changed = bytes_and_requests(deployed(made[1])["pushed"])
    before = pods(place)
    nothing = deployed(made[1])
    replaced = pods(place) != before
    show("only predict changed: kB pushed", changed[0] / 1e3, 100)
    show("only predict changed: requests to the registry", changed[1], 12)
    show("nothing changed: bytes pushed", bytes_and_requests(nothing["pushed"])[0], 0)
    show("nothing changed: pods replaced", float(replaced), 0, f"{nothing['wall']:.2f} s in all")
    return {
        "changed_bytes": changed[0],
        "changed_requests": changed[1],
        "nothing_bytes": bytes_and_requests(nothing["pushed"])[0],
        "nothing_replaced": replaced,
        "nothing_seconds": nothing["wall"],
    }


def settled(place: running.Namespace) -> None:
    """Wait until ended pods are gone, so that they take no share of the machine."""
    limit = time.monotonic() + 60
    while len(pods(place)) != 1 and time.monotonic() < limit:
        time.sleep(0.2)


def rollouts(place: running.Namespace, made: list[Any], rounds: int) -> dict[str, Any]:
    """Go between two Images by deploy and by kubectl, in turns."""
    deployed(made[0])
    first = image(place)
    deployed(made[1])
    second = image(place)
    ours: list[dict[str, Any]] = []
    theirs: list[float] = []
    for _ in range(rounds):
        settled(place)
        ours.append(deployed(made[0]))
        settled(place)
        began = time.perf_counter()
        place.kubectl("set", "image", "deployment/nbd-tiny", f"server={second}")
        place.kubectl("rollout", "status", "deployment/nbd-tiny", "--timeout=120s")
        theirs.append(time.perf_counter() - began)
        if image(place) != second or first == second:
            raise RuntimeError("the roll-outs did not go between two Images")
    more = middle([one["wall"] - other for one, other in zip(ours, theirs, strict=True)])
    walls = [one["wall"] for one in ours]
    show("deploy(...) to ready minus kubectl's roll-out, s", more, 3, f"{middle(walls):.2f} s, {middle(theirs):.2f} s")
    steps = {step: middle([one["steps"][step] for one in ours]) for step in ours[0]["steps"]}
    print("  " + ", ".join(f"{step} {seconds:.2f}" for step, seconds in steps.items()) + " s")
    return {"ours": middle(walls), "kubectl": middle(theirs), "more": more, "steps": steps}


def through_updates(place: running.Namespace, made: list[Any]) -> dict[str, Any]:
    """Call through the Service while Revisions change."""
    import nbdeploy
    from nbdeploy.endpoint import engine_named

    deployed(made[0])
    address = place.cluster.get("-n", place.name, "service", "nbd-tiny")["spec"]["clusterIP"]
    key = engine_named("cluster").key("tiny")  # type: ignore[attr-defined] # the engine keeps keys
    argument = {"host": address, "port": 80, "key": key, "clients": CLIENTS, "think": THINK, "longest": 240.0}
    caller = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("updates.py")), "--child", json.dumps(argument)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    spans = []
    try:
        time.sleep(2.0)  # alone, before the first
        for function in made[1:3]:
            began = time.monotonic()
            deployed(function)
            spans.append((began, time.monotonic()))
            time.sleep(12.0)  # the old Replica's whole drain
        output, _ = caller.communicate()
    finally:
        caller.kill()
        caller.wait()
    found = dict(json.loads(output.splitlines()[-1]))
    rows = found["rows"]
    if len(rows) < LEAST:
        raise RuntimeError(f"only {len(rows)} requests were made")
    show(f"failed of {len(rows)} requests through {len(spans)} roll-outs", len(found["failures"]), 0)
    for reason in sorted(set(found["failures"])):
        print(f"  {found['failures'].count(reason)} x {reason}")
    nbdeploy.connect("tiny", engine="cluster").delete()
    seconds = [one for _, one in rows]
    return {"done": len(rows), "failed": len(found["failures"]), "p99_ms": percentile(seconds, 0.99) * 1e3}


def listing(place: running.Namespace, count: int) -> dict[str, Any]:
    """List many Endpoints, which are objects without pods."""
    from nbdeploy.config import home, settings
    from nbdeploy.engines.kubernetes import manifests, record
    from nbdeploy.engines.kubernetes.engine import KubernetesEngine
    from nbdeploy.engines.kubernetes.record import Kept, Record
    from nbdeploy.engines.kubernetes.workload import Workload
    from nbdeploy.spec import Revision

    def engine() -> KubernetesEngine:
        known = settings().engine("cluster")
        return KubernetesEngine(home(), **known.arguments("cluster"))

    client = engine()._client  # noqa: SLF001 - makes the objects
    image = f"{place.cluster.registry}/team/none@sha256:{'0' * 64}"

    def make(number: int) -> None:
        name = f"e{number}"
        revisions = [
            Revision(name, one, f"sha256:{one:064x}", owner="ada", notebook=f"/n/{name}.ipynb") for one in range(1, 11)
        ]
        known = Record(name, "ada", f"/n/{name}.ipynb", tuple(Kept(one, image, one.number) for one in revisions), 10, 0)
        uid = client.apply(record.root(known, place.name))["metadata"]["uid"]
        workload = Workload(name, place.name, 10, image, uid, replicas=0, owner="ada")
        client.apply(manifests.objects(workload)[-1])

    def asked() -> tuple[float, float, int]:
        """List five times; returns requests each, seconds, and how many there are."""
        fresh = engine()
        fresh.list()  # connects
        before, times = fresh._client.requests, []  # noqa: SLF001 - counts what is sent
        for _ in range(5):
            began = time.perf_counter()
            listed = fresh.list()
            times.append(time.perf_counter() - began)
        return (fresh._client.requests - before) / 5, middle(times), len(listed)  # noqa: SLF001 - as above

    none, _, _ = asked()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(count)))
    requests, seconds, listed = asked()
    if listed < count:
        raise RuntimeError(f"{listed} Endpoints were listed")
    show(f"listing {count} Endpoints, s", seconds, 2)
    show("requests for them / for none", requests / none, 1, f"{requests:.0f} requests")
    return {"requests": requests, "seconds": seconds, "endpoints": count}


PARTS = {"redeploy": redeploys, "rollout": rollouts, "updates": through_updates, "listing": listing}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    arguments = {"rollout": (options.rounds,), "listing": (options.endpoints,)}
    try:
        with temporary_home(), namespace() as place:
            made = functions(3)
            for part in options.parts:
                rest = arguments.get(part, ())
                figures[part] = PARTS[part](place, *(rest if part == "listing" else (made, *rest)))
    finally:
        print(running.give_back(), end="")
    record("cluster", figures, ["kubernetes", "urllib3"])


if __name__ == "__main__":
    main()
