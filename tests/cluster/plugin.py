"""Fixtures of the test cluster for every test, and its end with the end of the run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.cluster import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEST_SECONDS = 1200  # for one test, bringing the cluster up included
HINDRANCE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of tests that find the cluster in ways that cannot be seen from their arguments."""
    config.addinivalue_line("markers", "cluster: needs a Kubernetes cluster (set by itself where a fixture is one's)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the cluster: it is slow, as bringing the cluster up is."""
    for item in items:
        if item.get_closest_marker("cluster") or "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")
            item.add_marker("slow")
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(TEST_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install what the cluster needs before any test runs: it may take longer than a test may."""
    if not session.config.option.collectonly and any(item.get_closest_marker("cluster") for item in session.items):
        session.config.stash[HINDRANCE] = running.hindrance()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the cluster that this run brought up, once its workers are gone; what is left of it fails the run."""
    if hasattr(session.config, "workerinput"):
        return
    trouble = running.give_back()
    if trouble:
        session.config.get_terminal_writer().line(f"\n{trouble}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> running.Cluster:
    """The test cluster: two nodes, GPUs on the first, the base image in the registry. Shared with all other tests."""
    reason = request.config.stash.get(HINDRANCE, None)
    if reason is None:
        reason = running.hindrance()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"no test cluster: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)
    return running.use()


@pytest.fixture(scope="session")
def make_namespace(
    cluster: running.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], running.Namespace]]:
    """Make namespaces that last as long as the worker; for fixtures that live longer than a test."""
    made: list[running.Namespace] = []

    def make() -> running.Namespace:
        made.append(running.make_namespace(cluster, tmp_path_factory.mktemp("kubeconfig")))
        return made[-1]

    yield make
    for namespace in made:
        cluster.kubectl("delete", "namespace", namespace.name, "--wait=false")


@pytest.fixture
def namespace(cluster: running.Cluster, tmp_path: Path) -> Iterator[running.Namespace]:
    """A namespace of the test's own with the Role that nbdeploy prints; it goes with the test."""
    made = running.make_namespace(cluster, tmp_path)
    yield made
    cluster.kubectl("delete", "namespace", made.name, "--wait=false")


@pytest.fixture(scope="session")
def gateway_api(cluster: running.Cluster) -> running.Cluster:
    """The test cluster with the kind HTTPRoute of Gateway API, which stays: no test may count on its absence."""
    running.run_program("gateway-api")
    return cluster


@pytest.fixture
def on_cluster(
    home: Path, namespace: running.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> running.Namespace:
    """A user whose engine `cluster` is configured, and who may only what the Role of the namespace allows."""
    for key, value in namespace.environ().items():
        monkeypatch.setenv(key, value)
    namespace.configure(tmp_path / "config")
    return namespace
