"""KubernetesEngine: Endpoints in a namespace of a cluster."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import difflib
import functools
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress
from nbdeploy.engines.kubernetes import access, record, standing
from nbdeploy.engines.kubernetes.applying import Applying, find_root, label_selector, read_key, read_root
from nbdeploy.engines.kubernetes.client import KINDS, Client
from nbdeploy.engines.kubernetes.diagnosis import Snapshot, unready
from nbdeploy.engines.kubernetes.following import lines
from nbdeploy.engines.kubernetes.publish import repository
from nbdeploy.engines.kubernetes.reach import Forwarders, address
from nbdeploy.engines.kubernetes.record import Summary
from nbdeploy.engines.kubernetes.rollout import PATIENCE
from nbdeploy.engines.kubernetes.settings import PLATFORMS, ClusterSettings
from nbdeploy.engines.kubernetes.workload import MANAGER, PROBES_PORT, object_name
from nbdeploy.engines.loopback import bound
from nbdeploy.errors import EndpointNotFoundError, EngineError, UsageError
from nbdeploy.spec import Phase, Revision, Status, Target, check_name, label

DRAIN = 10.0  # seconds until every proxy of a cluster has heard that a Replica ends
GONE_SECONDS = 180.0  # seconds for everything of an Endpoint to be gone; a Replica may finish a last request
SCRAPE_SECONDS = 3.0  # seconds for a Replica to tell its metrics
_ALL = f"app.kubernetes.io/managed-by={MANAGER}"
_LISTED = (  # what a delete waits for; Secrets cannot be listed with the Role of nbdeploy, and are asked for by name
    "Pod",
    "ReplicaSet",
    "Deployment",
    "Service",
    "ServiceAccount",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "EndpointSlice",
    "ConfigMap",
)


class KubernetesEngine:
    """Replicas as pods of one namespace, everything of an Endpoint owned by one ConfigMap.

    Args:
        home: folder of nbdeploy.
        name: of the engine in the settings.
        drain: seconds that a Replica still accepts after it was told to end.
        patience: seconds that a roll-out waits for a node that fits.
        settings: as in ClusterSettings.
    """

    def __init__(
        self, home: Path, *, name: str = "kubernetes", drain: float = DRAIN, patience: float = PATIENCE, **settings: Any
    ) -> None:
        self.name = name
        self._home = home
        self._drain = drain
        self._patience = patience
        settings["tolerations"] = tuple(settings.get("tolerations", ()))
        self._settings = ClusterSettings(name=name, **settings)
        self._forwarders = Forwarders(home, self._settings)

    @functools.cached_property
    def _client(self) -> Client:
        return self._connected()

    def _connected(self) -> Client:
        return Client.connect(self._settings, self._home / "clusters" / self.name)

    # -- the protocol -------------------------------------------------------------------------------------------

    def apply(self, revision: Revision, bundle: Bundle | None, on_progress: OnProgress) -> Status:
        """Make the Endpoint serve this Revision (see Engine.apply)."""
        name = check_name(revision.name)
        self._check_numbers(revision)
        work = Applying(self._client, self._settings, on_progress, drain=self._drain, patience=self._patience)
        try:
            key = work.run(revision, bundle)
        except BaseException:
            if self._root(name) is None:
                self._forwarders.forget(name)
            raise
        self._keep_key(name, key)
        if revision.stopped:
            self._forwarders.stop(name)
        else:
            self.reach(name)
        return self.status(name)

    def status(self, name: str) -> Status:
        """Return what is known of an Endpoint."""
        try:
            summary = self._existing(name)
        except record.UnreadableError as error:
            return Status(name=name, engine=self.name, phase=Phase.FAILED, reason=str(error))
        deployment = self._client.get("Deployment", object_name(name))
        found = standing.status(self.name, summary, deployment, url=self._url(name))
        if found.ready < found.desired or not (found.ready or summary.stopped):
            trouble = unready(self._snapshot(name, deployment), now=time.time())
            if trouble is not None:
                found = standing.status(self.name, summary, deployment, url=self._url(name), trouble=trouble.words)
        samples = _samples(self.scrape(name) if found.ready else {})
        return dataclasses.replace(
            found,
            in_flight=round(samples.get("nbdeploy_inflight", 0)),
            memory_bytes=round(samples.get("nbdeploy_memory_bytes", 0)),
            key_file=self._key_file(name, summary),
        )

    def scrape(self, name: str) -> dict[str, str]:
        """Return the Prometheus text of each pod that runs."""
        self._existing(name)
        pods = [pod["metadata"]["name"] for pod in self._pods(name) if _ready(pod)]

        def ask(pod: str) -> str:
            with contextlib.suppress(EngineError):  # it ended while we looked
                return self._client.proxy(pod, PROBES_PORT, "/metrics", timeout=SCRAPE_SECONDS)
            return ""

        if not pods:
            return {}
        with ThreadPoolExecutor(min(16, len(pods))) as pool:
            return {pod: text for pod, text in zip(pods, pool.map(ask, pods), strict=True) if text}

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """Yield what the pods printed, each line after its pod's name."""
        self._existing(name)
        # One that goes on has connections of its own, so that they can be ended when nobody reads on.
        client = self._connected() if follow else self._client
        return lines(client, label_selector(name), object_name(name), follow=follow)

    def list(self) -> list[Status]:
        """Return every Endpoint of the namespace, by two requests however many there are."""
        with ThreadPoolExecutor(2) as pool:
            roots = pool.submit(self._client.list, "ConfigMap", _ALL, metadata_only=True)
            found = pool.submit(self._client.list, "Deployment", _ALL)
            deployments = {one["metadata"]["name"]: one for one in found.result()}
        listed = []
        for root in roots.result():
            if root["metadata"].get("deletionTimestamp"):
                continue
            try:
                summary = record.read_summary(root)
            except record.UnreadableError as error:
                name = root["metadata"]["labels"].get("nbdeploy.dev/endpoint", "")
                listed.append(Status(name=name, engine=self.name, phase=Phase.FAILED, reason=str(error)))
                continue
            deployment = deployments.get(root["metadata"]["name"])
            status = standing.status(self.name, summary, deployment, url=self._url(summary.name))
            listed.append(dataclasses.replace(status, key_file=self._key_path(summary)))
        return sorted(listed, key=lambda status: status.name)

    def delete(self, name: str) -> None:
        """Remove the Endpoint; returns once a listing of every kind is empty."""
        kept_secrets, longest = {f"{object_name(name)}-key"}, 0.0
        with contextlib.suppress(record.UnreadableError):  # such a record is deleted as well
            self._existing(name)
            known = read_root(self._client, name).record
            kept_secrets |= known.secrets_objects()
            longest = max((row.revision.serving.timeout for row in known.kept), default=0.0)
        self._client.delete("ConfigMap", object_name(name))
        self._forwarders.forget(name)
        patience, pause = GONE_SECONDS + longest, 0.2
        limit = time.monotonic() + patience
        while left := self._left(name, kept_secrets):
            if time.monotonic() > limit:
                raise EngineError(
                    f"{name} is deleted, but after {patience:.0f} s there is still {', '.join(left[:5])}. "
                    "`kubectl describe` of it tells what holds it."
                )
            time.sleep(pause)
            pause = min(2.0, pause * 1.3)

    # -- optional protocols -------------------------------------------------------------------------------------

    def check(self, revision: Revision) -> None:
        """Refuse what cannot work before anything is captured: settings, rights, numbers."""
        repository(self._settings, revision.name)
        self._check_numbers(revision)
        port, url = revision.serving.port, self._url(revision.name)
        if port and not self._direct(revision.name) and not url.endswith(f":{port}"):
            bound(port).close()  # taken is told now, not after a roll-out
        access.check(self._client, self._settings)

    def key(self, name: str) -> str:
        """Return the Endpoint's key, "" where it is public."""
        if self._existing(name).public:
            return ""
        key = read_key(self._client, name)
        self._keep_key(name, key)
        return key

    def revisions(self, name: str) -> builtins.list[Revision]:
        """Return the Revisions, oldest first."""
        self._existing(name)
        return read_root(self._client, name).record.revisions()

    @property
    def target(self) -> Target:
        """For what the lock is installed."""
        return Target(PLATFORMS[self._settings.platform], self._settings.torch_index)

    def reach(self, name: str) -> str:
        """Return the URL; where there is no way in from outside, a forwarder on this machine is one."""
        direct = self._direct(name)
        if direct:
            return direct
        summary = self._existing(name)
        if summary.stopped:
            return self._url(name)
        current = read_root(self._client, name).record.current
        port = current.revision.serving.port if current else 0
        return self._forwarders.ensure(name, self._client.namespace, port=port)

    def remains(self, name: str) -> builtins.list[str]:
        """Return the Images that a delete leaves in the registry."""
        kept = read_root(self._client, name).record.kept
        return list(dict.fromkeys(row.image for row in kept))

    # -- parts --------------------------------------------------------------------------------------------------

    def _check_numbers(self, revision: Revision) -> None:
        scaling = revision.autoscaling
        if scaling.min_replicas < 1 or scaling.max_replicas > max(1, scaling.min_replicas):
            raise UsageError(
                "The Kubernetes engine runs a fixed number of Replicas in this version: give --min and --max the same "
                f"number, 1 or more (asked for: {scaling.min_replicas} to {scaling.max_replicas})."
            )

    def _root(self, name: str) -> dict[str, Any] | None:
        if not name or label(name) != name:  # also keeps "/" out of paths
            return None
        return find_root(self._client, name)

    def _existing(self, name: str) -> Summary:
        found = self._root(name)
        if found is None:
            self._forwarders_of_gone(name)
            raise self._not_found(name)
        return record.read_summary(found)

    def _forwarders_of_gone(self, name: str) -> None:
        """Remove what this machine keeps of an Endpoint that somebody deleted from elsewhere."""
        if name and label(name) == name and self._forwarders.url(name):
            self._forwarders.forget(name)

    def _not_found(self, name: str) -> EndpointNotFoundError:
        names = []
        for root in self._client.list("ConfigMap", _ALL, metadata_only=True):
            with contextlib.suppress(record.UnreadableError):  # another one's; its own status tells of it
                names.append(record.read_summary(root).name)
        near = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else " `nbdeploy ls` lists those there are."
        return EndpointNotFoundError(
            f"There is no Endpoint {name!r} in the namespace {self._client.namespace} of {self.name}.{hint}"
        )

    def _direct(self, name: str) -> str:
        in_cluster, namespace = self._client.in_cluster, self._client.namespace
        return address(name, self._settings, in_cluster=in_cluster, namespace=namespace)

    def _url(self, name: str) -> str:
        return self._direct(name) or self._forwarders.url(name)

    def _pods(self, name: str) -> builtins.list[dict[str, Any]]:
        return self._client.list("Pod", label_selector(name), fresh=True)

    def _snapshot(self, name: str, deployment: dict[str, Any] | None) -> Snapshot:
        pods = tuple(self._pods(name))
        replicasets = tuple(self._client.list("ReplicaSet", label_selector(name)))
        known = {one["metadata"]["uid"] for one in (*pods, *replicasets)}
        events = [one for one in self._client.list("Event") if one.get("involvedObject", {}).get("uid") in known]
        return Snapshot(deployment, replicasets, pods, tuple(events))

    def _left(self, name: str, kept_secrets: set[str]) -> builtins.list[str]:
        """Name what is still there of an Endpoint."""
        kinds = list(_LISTED)
        kinds += ["HTTPRoute"] if self._settings.gateway else ["Ingress"] if self._settings.ingress_class else []
        found = []
        for kind in kinds:
            found += [
                f"{KINDS[kind].kind} {one['metadata']['name']}"
                for one in self._client.list(kind, label_selector(name), metadata_only=True, fresh=True)
            ]
        found += [f"Secret {one}" for one in sorted(kept_secrets) if self._client.get("Secret", one) is not None]
        return found

    def _key_path(self, summary: Summary) -> str:
        return "" if summary.public else str(self._home / "clusters" / self.name / summary.name / "key")

    def _key_file(self, name: str, summary: Summary) -> str:
        path = self._key_path(summary)
        if path and not Path(path).exists():
            with contextlib.suppress(EngineError):  # without the right to read the Secret
                self._keep_key(name, read_key(self._client, name))
        return path

    def _keep_key(self, name: str, key: str) -> None:
        """Keep the key on this machine, readable by its owner alone."""
        folder = self._home / "clusters" / self.name / name
        for one in (folder.parent.parent, folder.parent, folder):
            one.mkdir(mode=0o700, exist_ok=True)
        partial = folder / f".key.{secrets.token_hex(4)}"
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(key)
        partial.replace(folder / "key")


def _ready(pod: dict[str, Any]) -> bool:
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = pod.get("status", {}).get("conditions") or ()
    return any(row["type"] == "Ready" and row["status"] == "True" for row in conditions)


def _samples(texts: dict[str, str]) -> dict[str, float]:
    """Add up the plain gauges of all Replicas."""
    total: dict[str, float] = {}
    for text in texts.values():
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name in {"nbdeploy_inflight", "nbdeploy_memory_bytes"}:
                total[name] = total.get(name, 0.0) + float(value)
    return total
