"""The Endpoints of one namespace as the cluster has them now: read, never changed."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nbdeploy.engines.kubernetes import record, standing
from nbdeploy.engines.kubernetes.client import KINDS, Client
from nbdeploy.engines.kubernetes.diagnosis import Snapshot, unready
from nbdeploy.engines.kubernetes.record import Summary
from nbdeploy.engines.kubernetes.roots import find_root
from nbdeploy.engines.kubernetes.workload import MANAGER, PROBES_PORT, label_selector, object_name
from nbdeploy.errors import EndpointNotFoundError, EngineError
from nbdeploy.spec import Status, label

SCRAPE_SECONDS = 10.0  # for a Replica to tell its metrics, if these are what is asked for
GLANCE_SECONDS = 3.0  # the same, if they are a part of a status
_ALL = f"app.kubernetes.io/managed-by={MANAGER}"
# Of Endpoints; owners stand first, for what one of them makes after its kind was listed would be missed. Secrets cannot
# be listed with the Role of nbdeploy, and are asked for by name.
_MADE = (
    "ConfigMap",
    "Deployment",
    "ReplicaSet",
    "Pod",
    "Service",
    "EndpointSlice",
    "ServiceAccount",
    "PodDisruptionBudget",
    "NetworkPolicy",
)


class Inventory:
    """What there is in the client's namespace.

    Args:
        client: of the namespace.
        engine: its name, for words.
    """

    def __init__(self, client: Client, engine: str) -> None:
        self._client = client
        self._engine = engine

    def has(self, name: str) -> bool:
        """Whether there is such an Endpoint; one that is being deleted is none."""
        return self._root(name) is not None

    def summary(self, name: str) -> Summary:
        """Return what a listing needs of an Endpoint. Raises EndpointNotFoundError, record.UnreadableError."""
        found = self._root(name)
        if found is None:
            raise self._not_found(name)
        return record.read_summary(found)

    def listed(self) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
        """Return (root, Deployment) of every Endpoint, by two requests however many there are."""
        with ThreadPoolExecutor(2) as pool:
            roots = pool.submit(self._client.list, "ConfigMap", _ALL, metadata_only=True)
            found = pool.submit(self._client.list, "Deployment", _ALL)
            deployments = {one["metadata"]["name"]: one for one in found.result()}
        alive = [root for root in roots.result() if not root["metadata"].get("deletionTimestamp")]
        return [(root, deployments.get(root["metadata"]["name"])) for root in alive]

    def status(self, summary: Summary, url: str) -> Status:
        """Return how an Endpoint stands, with what its Replicas tell, and with what keeps them from being ready."""
        name = summary.name
        deployment = self._client.get("Deployment", object_name(name))
        found = standing.status(self._engine, summary, deployment, url=url)
        if found.ready < found.desired or not (found.ready or summary.stopped):
            trouble = unready(self._snapshot(name, deployment), now=time.time())
            if trouble is not None:
                found = standing.status(self._engine, summary, deployment, url=url, trouble=trouble.words)
        samples = _samples((self.scrape(name, GLANCE_SECONDS) if found.ready else {}).values())
        return dataclasses.replace(
            found,
            in_flight=round(samples.get("nbdeploy_inflight", 0)),
            memory_bytes=round(samples.get("nbdeploy_memory_bytes", 0)),
        )

    def scrape(self, name: str, seconds: float = SCRAPE_SECONDS) -> dict[str, str]:
        """Return the Prometheus text of each pod that is ready and answers within so many seconds."""
        pods = [pod["metadata"]["name"] for pod in self._pods(name) if _ready(pod)]

        def ask(pod: str) -> str:
            with contextlib.suppress(EngineError):  # it ended while we looked
                return self._client.proxy(pod, PROBES_PORT, "/metrics", timeout=seconds)
            return ""

        if not pods:
            return {}
        with ThreadPoolExecutor(min(16, len(pods))) as pool:
            return {pod: text for pod, text in zip(pods, pool.map(ask, pods), strict=True) if text}

    def left(self, name: str, secrets: Iterable[str], ways_in: Iterable[str]) -> list[str]:
        """Name what is there of an Endpoint, whether it has a root or not.

        Args:
            name: of the Endpoint.
            secrets: names of the Secrets that it may have.
            ways_in: kinds beyond the Service by which it is reached.
        """
        found = []
        for kind in (*_MADE, *ways_in):
            found += [
                f"{KINDS[kind].kind} {one['metadata']['name']}"
                for one in self._client.list(kind, label_selector(name), metadata_only=True, fresh=True)
            ]
        return found + [f"Secret {one}" for one in sorted(secrets) if self._client.get("Secret", one) is not None]

    # -- parts --------------------------------------------------------------------------------------------------

    def _root(self, name: str) -> dict[str, Any] | None:
        if not name or label(name) != name:  # also keeps "/" out of paths
            return None
        return find_root(self._client, name)

    def _not_found(self, name: str) -> EndpointNotFoundError:
        names = []
        for root in self._client.list("ConfigMap", _ALL, metadata_only=True):
            with contextlib.suppress(record.UnreadableError):  # another one's; its own status tells of it
                names.append(record.read_summary(root).name)
        near = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else " `nbdeploy ls` lists those there are."
        return EndpointNotFoundError(
            f"There is no Endpoint {name!r} in the namespace {self._client.namespace} of {self._engine}.{hint}"
        )

    def _pods(self, name: str) -> list[dict[str, Any]]:
        return self._client.list("Pod", label_selector(name), fresh=True)

    def _snapshot(self, name: str, deployment: dict[str, Any] | None) -> Snapshot:
        pods = tuple(self._pods(name))
        replicasets = tuple(self._client.list("ReplicaSet", label_selector(name)))
        known = {one["metadata"]["uid"] for one in (*pods, *replicasets)}
        events = [one for one in self._client.list("Event") if one.get("involvedObject", {}).get("uid") in known]
        return Snapshot(deployment, replicasets, pods, tuple(events))


def _ready(pod: dict[str, Any]) -> bool:
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = pod.get("status", {}).get("conditions") or ()
    return any(row["type"] == "Ready" and row["status"] == "True" for row in conditions)


def _samples(texts: Iterable[str]) -> dict[str, float]:
    """Add up the plain gauges of all Replicas."""
    total: dict[str, float] = {}
    for text in texts:
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name in {"nbdeploy_inflight", "nbdeploy_memory_bytes"}:
                total[name] = total.get(name, 0.0) + float(value)
    return total
