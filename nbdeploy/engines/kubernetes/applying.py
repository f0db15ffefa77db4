"""One apply of a Revision: Image, record, objects, roll-out, and the way back where it fails."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress
from nbdeploy.engines.kubernetes import manifests, record, rollout
from nbdeploy.engines.kubernetes.client import ChangedError, Client
from nbdeploy.engines.kubernetes.connecting import MOUNTED
from nbdeploy.engines.kubernetes.publish import publish
from nbdeploy.engines.kubernetes.record import Kept, Record
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import Workload, memory_request, object_name, selector
from nbdeploy.errors import EngineError, NbdeployError
from nbdeploy.spec import Revision

ROLLOUT_SECONDS = 1800.0  # as the Deployment's own progress deadline
GONE_SECONDS = 60.0  # seconds for a deleted record to be gone
LAST_LINES = 80  # read of a Replica that did not come up
_KEY_BYTES = 24  # of randomness in a key, as the local engine has


@dataclass(frozen=True)
class Root:
    """The record of an Endpoint as it was read.

    Attributes:
        record: empty where there is none.
        uid, version: of its ConfigMap; "" where there is none.
    """

    record: Record
    uid: str = ""
    version: str = ""


def find_root(client: Client, name: str) -> dict[str, Any] | None:
    """Return the root ConfigMap of an Endpoint; None also for one that is being deleted."""
    found = client.get("ConfigMap", object_name(name))
    return None if found is None or found["metadata"].get("deletionTimestamp") else found


def await_gone(client: Client, name: str) -> None:
    """Wait until a root ConfigMap that is being deleted is gone. Raises EngineError where something holds it."""
    limit = time.monotonic() + GONE_SECONDS
    while client.get("ConfigMap", object_name(name)) is not None:
        if time.monotonic() > limit:
            raise EngineError(
                f"The ConfigMap {object_name(name)} of {name} does not go. `kubectl describe configmap "
                f"{object_name(name)}` tells what holds it."
            )
        time.sleep(0.1)


def read_root(client: Client, name: str) -> Root:
    """Read the record of an Endpoint; one that is being deleted is waited for."""
    found = find_root(client, name)
    if found is None:
        await_gone(client, name)
        return Root(Record(name))
    metadata = found["metadata"]
    return Root(record.read(found), metadata["uid"], metadata["resourceVersion"])


def read_key(client: Client, name: str) -> str:
    """Return the key in the Endpoint's Secret, "" where there is none."""
    found = client.get("Secret", f"{object_name(name)}-key")
    return base64.b64decode((found or {}).get("data", {}).get("key", "")).decode("ascii")


def label_selector(name: str) -> str:
    """Return the selector of an Endpoint's objects as the API takes it."""
    return ",".join(f"{key}={value}" for key, value in selector(name).items())


class Applying:
    """Makes an Endpoint serve one Revision."""

    def __init__(
        self, client: Client, settings: ClusterSettings, on_progress: OnProgress, *, drain: float, patience: float
    ) -> None:
        self._client = client
        self._settings = settings
        self._on_progress = on_progress
        self._drain = drain
        self._patience = patience

    def run(self, revision: Revision, bundle: Bundle | None) -> str:
        """Return the Endpoint's key once the Revision serves; what served before goes on where it does not.

        Raises EngineError in words.
        """
        before = read_root(self._client, revision.name)
        _refuse_late(before.record, revision)
        had = read_key(self._client, revision.name)
        key = had or secrets.token_urlsafe(_KEY_BYTES)
        kept = self._kept(before.record, revision, bundle, key)
        wanted = before.record.with_revision(kept)
        root = self._write(wanted, before)
        try:
            if not had:
                self._client.apply(
                    manifests.key_secret(revision.name, self._client.namespace, root.uid, key, owner=revision.owner)
                )
            self._apply(root, bundle, key)
            self._follow(root.record)
            self._commit(root, revision.number)
        except BaseException:
            with contextlib.suppress(NbdeployError):  # the reason of the failure is what the user must hear
                self._settle(before, root)
            raise
        self._forget_secrets(wanted, wanted.committed(revision.number))
        return key

    # -- parts --------------------------------------------------------------------------------------------------

    def _kept(self, known: Record, revision: Revision, bundle: Bundle | None, key: str) -> Kept:
        """Return the Revision with all that its Replicas are made of."""
        if bundle is None:
            earlier = [row for row in known.kept if row.revision.bundle == revision.bundle]
            if not earlier:
                raise EngineError(f"There is no earlier Revision of {revision.name} with this Bundle to go on from.")
            return dataclasses.replace(earlier[-1], revision=revision)
        current = known.current
        manifest = bundle.manifest
        weights = sum(blob.ref.size for blob in manifest.blobs)
        weights += sum(file.ref.size for file in manifest.files if file.kind == "model")
        image = publish(bundle, revision, self._settings, current.image if current else "", self._on_progress)
        own = _own_secrets(revision, bundle)
        return Kept(
            revision=revision,
            image=image,
            memory=memory_request(weights, revision.resources.gpus),
            disk=3 * sum(file.ref.size for file in manifest.files if file.kind != "model"),  # wheels are unpacked again
            weights=weights,
            secrets_object=manifests.secrets_object(revision.name, own, key),
            foreign_secrets=revision.foreign_secrets,
            variables={name: os.environ[name] for name in revision.variables if name in os.environ},
        )

    def _write(self, wanted: Record, known: Root) -> Root:
        """Write the record, onto the version that was read; it is the lock between two deploys."""
        content = record.root(wanted, self._client.namespace, uid=known.uid, resource_version=known.version)
        try:
            made = self._client.apply(content) if known.uid else self._client.create(content)
        except ChangedError:
            raise EngineError(
                f"Another deploy or change of {wanted.name} came first. Look at it, then deploy again."
            ) from None
        return Root(wanted, made["metadata"]["uid"], made["metadata"]["resourceVersion"])

    def _apply(self, root: Root, bundle: Bundle | None, key: str) -> None:
        """Apply every object of the Revision under way."""
        found = root.record.find(root.record.under_way)
        if found is None:
            raise EngineError(f"The record of {root.record.name} lost its Revision.")
        own = _own_secrets(found.revision, bundle) if bundle is not None else {}
        if own:
            whose = (root.record.name, self._client.namespace, root.uid)
            self._client.apply(manifests.environment_secret(*whose, own, key, owner=found.revision.owner))
        for one in manifests.objects(self._workload(root, found, key)):
            self._client.apply(one)

    def _workload(self, root: Root, found: Kept, key: str) -> Workload:
        revision = found.revision
        public = revision.serving.public
        return Workload(
            name=revision.name,
            namespace=self._client.namespace,
            number=found.template or revision.number,
            image=found.image,
            uid=root.uid,
            replicas=0 if revision.stopped else max(1, revision.autoscaling.min_replicas),
            resources=revision.resources,
            serving=revision.serving,
            memory=found.memory,
            disk=found.disk,
            owner=revision.owner,
            notebook=revision.notebook,
            key_sha256="" if public else hashlib.sha256(key.encode()).hexdigest(),
            secrets=tuple(name for name in revision.secrets if "=" not in name),
            secrets_object=found.secrets_object,
            foreign_secrets=found.foreign_secrets,
            variables=found.variables,
            from_namespaces=self._callers(),
            drain=round(self._drain),
            settings=self._settings,
        )

    def _callers(self) -> tuple[str, ...]:
        """Return the namespace of this very notebook, where it runs in a pod: it must be let in."""
        if not self._client.in_cluster:
            return ()
        with contextlib.suppress(OSError):
            return (Path(MOUNTED, "namespace").read_text(encoding="ascii").strip(),)
        return ()

    def _follow(self, wanted: Record) -> None:
        """Wait until the Replicas are as they are to be."""
        revision = wanted.kept[-1].revision
        found = label_selector(wanted.name)

        def say(words: str) -> None:
            self._on_progress(words, {})

        with contextlib.closing(self._client.watch(found, seconds=ROLLOUT_SECONDS)) as snapshots:
            if revision.stopped:
                say("ending the Replicas")
                rollout.emptied(snapshots)
            else:
                rollout.follow(
                    snapshots,
                    say,
                    patience=self._patience,
                    weights=wanted.kept[-1].weights,
                    last_lines=self._last_lines,
                )

    def _last_lines(self, pod: str) -> list[str]:
        """Return what a pod that ended printed last, before its restart if there was one."""
        for previous in (True, False):
            with contextlib.suppress(EngineError):  # it is gone, or its log cannot be read
                lines = [line for _, line in self._client.logs(pod, follow=False, tail=LAST_LINES, previous=previous)]
                if lines:
                    return lines
        return []

    def _commit(self, root: Root, number: int) -> None:
        self._write(root.record.committed(number), root)

    def _settle(self, before: Root, root: Root) -> None:
        """Leave what served before as it was, or nothing where nothing did."""
        number = root.record.under_way
        serving = before.record.find(before.record.serving)
        now = read_root(self._client, root.record.name)
        if now.uid != root.uid or now.record.under_way != number or now.record.serving == number:
            return  # somebody else's by now, or it came to serve in spite of all
        if serving is None:
            self._client.delete("ConfigMap", object_name(root.record.name), uid=root.uid)
            await_gone(self._client, root.record.name)
            return
        key = read_key(self._client, root.record.name)
        for one in manifests.objects(self._workload(root, serving, key)):
            self._client.apply(one)
        settled = now.record.without(number)
        self._write(settled, now)
        self._forget_secrets(now.record, settled)

    def _forget_secrets(self, before: Record, now: Record) -> None:
        """Delete the Secrets that no Revision needs any more."""
        for name in before.secrets_objects() - now.secrets_objects():
            self._client.delete("Secret", name)


def _own_secrets(revision: Revision, bundle: Bundle) -> dict[str, str]:
    """Return the values that go into a Secret of ours; those that others keep stay where they are."""
    foreign: Mapping[str, Any] = revision.foreign_secrets
    return {name: value for name, value in bundle.secrets.items() if name not in foreign}


def _refuse_late(known: Record, revision: Revision) -> None:
    """Refuse a Revision whose number another deploy took meanwhile; the very same one may be applied again."""
    found = known.find(revision.number)
    if revision.number > known.serving or (found is not None and found.revision == revision):
        return
    raise EngineError(
        f"Another deploy or change of {revision.name} came first (it made revision {known.serving}). "
        "Look at it, then deploy again."
    )
