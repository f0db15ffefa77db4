"""From a cell to a URL on a cluster, in real kernels, by a user who may only what the printed Role allows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.endpoint import connect
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.cluster.running import Namespace
    from tests.conftest import Kernel

CELL = "def predict(x: int) -> int:\n    return x + 1\nprint(predict(1))"
SMALL = "--cpu 0.05 --memory 256Mi"


@pytest.fixture
def kernel(on_cluster: Namespace, start_kernel: Callable[..., Kernel]) -> Iterator[Kernel]:
    """A notebook that has run its first cells."""
    started = start_kernel()
    assert started.run("%load_ext nbdeploy").status == "ok"
    assert started.run(CELL).stream == "2\n"
    yield started
    for name in {one["metadata"]["labels"]["nbdeploy.dev/endpoint"] for one in roots(on_cluster)}:
        connect(name, engine="cluster").delete()


def roots(place: Namespace) -> list[dict[str, Any]]:
    """Return the root ConfigMaps of the namespace."""
    selector = "app.kubernetes.io/managed-by=nbdeploy"
    found: list[dict[str, Any]] = place.cluster.get("-n", place.name, "configmaps", "-l", selector)["items"]
    return found


def test_from_a_cell_to_a_url(
    on_cluster: Namespace, kernel: Kernel, start_kernel: Callable[..., Kernel], home: Path
) -> None:
    """One line makes an API on the cluster; the card tells it all, other notebooks call it by name, kernels may go."""
    shown = kernel.run(f"endpoint = %deploy predict --name adder --engine cluster {SMALL}")
    assert (shown.status, shown.error) == ("ok", "")
    for step in ("captured", "locked", "verified", "pushed", "starting", "ready"):
        assert step in json.dumps(shown.bundles), step
    card = shown.bundles[-1]["text/plain"]
    assert "live = clean process = locked environment = replica" in card
    assert "adder · cluster · revision 1" in card
    assert kernel.run("print(endpoint(x=41))").stream == "42\n"
    key = connect("adder")._find_key()
    assert key
    assert key not in json.dumps(shown.bundles) + shown.stream
    other = start_kernel()
    calls = "import nbdeploy\nadder = nbdeploy.connect('adder')\nprint(adder(x=1), adder.map([{'x': 2}, {'x': 3}]))"
    assert other.run(calls).stream == "2 [3, 4]\n"
    kernel.manager.shutdown_kernel(now=True)
    assert other.run("print(adder(x=5))").stream == "6\n"
    assert other.run("adder.delete()").status == "ok"
    wait_until(lambda: roots(on_cluster) == [])


def test_a_missing_right_is_told_before_anything_is_built(on_cluster: Namespace, kernel: Kernel) -> None:
    """A Role with one verb less: the cell names it with the rule to paste, and nothing was captured or pushed."""
    role = on_cluster.cluster.get("-n", on_cluster.name, "role", "nbdeploy")
    for rule in role["rules"]:
        if rule["resources"] == ["deployments"]:
            rule["verbs"].remove("create")
    on_cluster.kubectl("replace", "-f", "-", input=json.dumps(role))
    shown = kernel.run(f"%deploy predict --name adder --engine cluster {SMALL}")
    assert shown.status == "error"
    assert "deployments" in shown.error
    assert '["create"]' in shown.error
    assert "kind: Role" in shown.error
    assert "✓ captured" not in shown.text
    assert roots(on_cluster) == []


def test_an_error_of_the_notebook_reaches_the_notebook(on_cluster: Namespace, kernel: Kernel) -> None:
    """What fails only in a pod is told in the cell in its own words; nothing of it stays in the cluster."""
    kernel.run(
        "import os\n"
        "def setup():\n"
        "    if os.path.exists('/opt/nbdeploy'):\n"
        "        raise RuntimeError('no licence on this machine')\n"
        "def answer(model, x: int) -> int:\n"
        "    return x"
    )
    shown = kernel.run(f"%deploy answer --setup setup --sample 1 --name lic --engine cluster {SMALL}")
    assert shown.status == "error"
    assert "no licence on this machine" in shown.error
    wait_until(lambda: roots(on_cluster) == [])


def test_what_answers_otherwise_with_the_lock_alone_is_not_pushed(on_cluster: Namespace, kernel: Kernel) -> None:
    """The sample is asked where only the lock is installed; another answer there ends the deploy before the push."""
    kernel.run("import sys\ndef where(x: int) -> str:\n    return sys.prefix")
    shown = kernel.run(f"%deploy where --sample 1 --engine cluster {SMALL}")
    assert shown.status == "error"
    assert "locked packages" in shown.error
    assert "ParityError" in shown.error
    assert "pushed" not in json.dumps(shown.bundles)
    assert roots(on_cluster) == []


def test_what_a_deploy_waits_for_is_seen_in_the_shell(on_cluster: Namespace, kernel: Kernel) -> None:
    """While no node fits, status and the cell say so, not that it may have ended; cancel leaves nothing."""
    from click.testing import CliRunner

    from nbdeploy.cli import main

    def run(*arguments: str) -> str:
        return CliRunner().invoke(main, arguments).output

    kernel.run(f"%deploy predict --name wants --engine cluster {SMALL} --gpu 1 --gpu-type nonsense --no-wait")
    wait_until(lambda: "--gpu-type nonsense" in run("status", "wants"))
    assert "half-way" not in run("status", "wants") + run("ls")
    assert run("cancel", "wants") == "The deploy of wants is cancelled.\n"
    assert "public" not in run("status", "wants")
    wait_until(lambda: roots(on_cluster) == [])


def test_the_command_line_shows_clusters(on_cluster: Namespace, kernel: Kernel) -> None:
    """`nbdeploy ls`, status, logs, call, scale, history and delete work as for Endpoints of this machine."""
    from click.testing import CliRunner

    from nbdeploy.cli import main

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    kernel.run(f"%deploy predict --name adder --engine cluster {SMALL}")
    assert "adder" in run("ls")
    row = json.loads(run("status", "adder", "--json"))
    assert (row["engine"], row["phase"], row["replicas"]) == ("cluster", "ready", {"ready": 1, "desired": 1})
    assert run("call", "adder", '{"x": 2}').strip() == "3"
    assert "nbd-adder-" in run("logs", "adder")
    assert "nbdeploy_requests_total" in run("metrics", "adder")
    assert "2 of 2" in run("scale", "adder", "--min", "2")
    assert len(run("history", "adder").splitlines()) == 2
    deleted = run("delete", "adder")
    assert f"stays in the registry: {on_cluster.cluster.registry}/team/adder@sha256:" in deleted
    assert roots(on_cluster) == []
