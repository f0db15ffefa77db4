"""KubernetesEngine: Endpoints in a namespace of a cluster."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress, check_fixed_number
from nbdeploy.engines.kubernetes import access, following, record, standing
from nbdeploy.engines.kubernetes.applying import Applying
from nbdeploy.engines.kubernetes.client import Client
from nbdeploy.engines.kubernetes.inventory import Inventory
from nbdeploy.engines.kubernetes.keyfile import KeyFiles
from nbdeploy.engines.kubernetes.preflight import preflight
from nbdeploy.engines.kubernetes.reach import Forwarders, address
from nbdeploy.engines.kubernetes.record import Summary
from nbdeploy.engines.kubernetes.rollout import PATIENCE
from nbdeploy.engines.kubernetes.roots import read_key, read_root
from nbdeploy.engines.kubernetes.settings import PLATFORMS, ClusterSettings
from nbdeploy.engines.kubernetes.workload import DRAIN, label_selector, object_name
from nbdeploy.engines.loopback import bound
from nbdeploy.errors import EndpointNotFoundError, EngineError
from nbdeploy.spec import Phase, Revision, Status, Target, check_name, label

GONE_SECONDS = 180.0  # for everything of an Endpoint to be gone, beyond the last request that a Replica may finish


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
        self._keys = KeyFiles(home / "clusters" / name)

    @functools.cached_property
    def _client(self) -> Client:
        return Client.connect(self._settings)

    @functools.cached_property
    def _inventory(self) -> Inventory:
        return Inventory(self._client, self.name)

    # -- the protocol -------------------------------------------------------------------------------------------

    def apply(self, revision: Revision, bundle: Bundle | None, on_progress: OnProgress) -> Status:
        """Make the Endpoint serve this Revision (see Engine.apply)."""
        name = check_name(revision.name)
        check_fixed_number("Kubernetes", revision)
        work = Applying(self._client, self._settings, on_progress, drain=self._drain, patience=self._patience)
        early = bool(not revision.stopped and not self._direct(name))
        try:
            with self._forwarders.ahead(name, self._client.namespace, port=revision.serving.port) as start:
                key = work.run(revision, bundle, on_applied=start if early else None)
        except BaseException:
            if not self._inventory.has(name):
                self._forwarders.forget(name)
            raise
        self._keys.keep(name, key)
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
        found = self._inventory.status(summary, self._url(name))
        return dataclasses.replace(found, key_file=self._keys.made(self._client, summary))

    def scrape(self, name: str) -> dict[str, str]:
        """Return the Prometheus text of each pod that runs."""
        self._existing(name)
        return self._inventory.scrape(name)

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """Yield what the pods printed, each line after its pod's name."""
        self._existing(name)
        # One that goes on has connections of its own, so that they can be ended when nobody reads on.
        client = Client.connect(self._settings) if follow else self._client
        return following.lines(client, label_selector(name), object_name(name), follow=follow)

    def list(self) -> list[Status]:
        """Return every Endpoint of the namespace, by two requests however many there are."""
        found = [self._listed(root, deployment) for root, deployment in self._inventory.listed()]
        return sorted(found, key=lambda status: status.name)

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
        ways_in = ["HTTPRoute"] if self._settings.gateway else ["Ingress"] if self._settings.ingress_class else []
        for kind in ways_in:  # no use waiting until the cluster's garbage collector comes to them
            self._client.delete(kind, object_name(name))
        patience, pause = GONE_SECONDS + longest, 0.2
        limit = time.monotonic() + patience
        while left := self._inventory.left(name, kept_secrets, ways_in):
            if time.monotonic() > limit:
                raise EngineError(
                    f"{name} is deleted, but after {patience:.0f} s there is still {', '.join(left[:5])}. "
                    "`kubectl describe` of it tells what holds it."
                )
            time.sleep(pause)
            pause = min(2.0, pause * 1.3)

    # -- optional protocols -------------------------------------------------------------------------------------

    def check(self, revision: Revision) -> None:
        """Refuse what cannot work before anything is captured: numbers, rights, registry, base image."""
        check_fixed_number("Kubernetes", revision)
        port, url = revision.serving.port, self._url(revision.name)
        if port and not self._direct(revision.name) and not url.endswith(f":{port}"):
            bound(port).close()  # taken is told now, not after a roll-out
        access.check(self._client, self._settings)
        preflight(self._settings, revision, self._home)

    def key(self, name: str) -> str:
        """Return the Endpoint's key, "" where it is public."""
        if self._existing(name).public:
            return ""
        key = read_key(self._client, name)
        self._keys.keep(name, key)
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

    def _existing(self, name: str) -> Summary:
        try:
            return self._inventory.summary(name)
        except EndpointNotFoundError:
            if name and label(name) == name and self._forwarders.url(name):
                self._forwarders.forget(name)  # somebody deleted the Endpoint from elsewhere
            raise

    def _listed(self, root: dict[str, Any], deployment: dict[str, Any] | None) -> Status:
        try:
            summary = record.read_summary(root)
        except record.UnreadableError as error:
            name = root["metadata"]["labels"].get("nbdeploy.dev/endpoint", "")
            return Status(name=name, engine=self.name, phase=Phase.FAILED, reason=str(error))
        status = standing.status(self.name, summary, deployment, url=self._url(summary.name))
        return dataclasses.replace(status, key_file=self._keys.path(summary))

    def _direct(self, name: str) -> str:
        in_cluster, namespace = self._client.in_cluster, self._client.namespace
        return address(name, self._settings, in_cluster=in_cluster, namespace=namespace)

    def _url(self, name: str) -> str:
        return self._direct(name) or self._forwarders.url(name)
