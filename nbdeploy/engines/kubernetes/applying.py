"""One apply of a Revision: Image, record, objects, roll-out, and the way back where it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress
from nbdeploy.engines.kubernetes import manifests, record, rollout
from nbdeploy.engines.kubernetes.client import ChangedError, Client, ForbiddenError
from nbdeploy.engines.kubernetes.connecting import MOUNTED
from nbdeploy.engines.kubernetes.diagnosis import Snapshot
from nbdeploy.engines.kubernetes.publish import publish
from nbdeploy.engines.kubernetes.record import Kept, Record
from nbdeploy.engines.kubernetes.roots import Root, await_gone, find_root, read_key, read_root
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import Workload, label_selector, memory_request, object_name
from nbdeploy.errors import EngineError, NbdeployError
from nbdeploy.spec import Revision

ROLLOUT_SECONDS = 6 * 3600.0  # at most; the Deployment's own deadline is shorter, and starts anew with each progress
LAST_LINES = 80  # read of a Replica that did not come up
_KEY_BYTES = 24  # of randomness in a key, as the local engine has


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

    def run(self, revision: Revision, bundle: Bundle | None, *, on_applied: Callable[[], None] | None = None) -> str:
        """Return the Endpoint's key once the Revision serves; what served before goes on where it does not.

        Args:
            revision: what is to be.
            bundle: its Bundle, unless the Replicas of an earlier Revision stay as they are.
            on_applied: called once every object is there, before the roll-out is waited for.

        Raises:
            EngineError: in words.
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
            made = self._apply(root, bundle, key)
            if on_applied is not None:
                on_applied()
            self._follow(root, key, made)
            self._commit(root, revision.number)
        except BaseException as error:
            if not self._settled(before, root) and isinstance(error, EngineError):
                raise _overtaken(revision.name) from None
            raise
        for earlier in (before.record, wanted):  # the one before may hold a Revision whose deploy was killed
            self._forget_secrets(earlier, wanted.committed(revision.number))
        return key

    # -- parts --------------------------------------------------------------------------------------------------

    def _kept(self, known: Record, revision: Revision, bundle: Bundle | None, key: str) -> Kept:
        """Return the Revision with all that its Replicas are made of."""
        known_callers = known.current.callers if known.current else ()
        callers = tuple(sorted({*known_callers, *self._callers()}))
        if bundle is None:
            earlier = [row for row in known.kept if row.revision.bundle == revision.bundle]
            if not earlier:
                raise EngineError(f"There is no earlier Revision of {revision.name} with this Bundle to go on from.")
            same = [row for row in earlier if row.revision.same_replicas(revision)]  # with its Image and variables
            return dataclasses.replace((same or earlier)[-1], revision=revision, callers=callers)
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
            callers=callers,
            variables={name: os.environ[name] for name in revision.variables if name in os.environ},
        )

    def _write(self, wanted: Record, known: Root) -> Root:
        """Write the record, onto the version that was read; it is the lock between two deploys."""
        content = record.root(wanted, self._client.namespace, uid=known.uid, resource_version=known.version)
        try:
            made = self._client.apply(content) if known.uid else self._client.create(content)
        except ChangedError:
            raise _overtaken(wanted.name) from None
        return Root(wanted, made["metadata"]["uid"], made["metadata"]["resourceVersion"])

    def _apply(self, root: Root, bundle: Bundle | None, key: str) -> tuple[str, int]:
        """Apply every object of the Revision under way; return the Deployment's version."""
        found = root.record.find(root.record.under_way)
        if found is None:
            raise EngineError(f"The record of {root.record.name} lost its Revision.")
        own = _own_secrets(found.revision, bundle) if bundle is not None else {}
        if own:
            whose = (root.record.name, self._client.namespace, root.uid)
            self._client.apply(manifests.environment_secret(*whose, own, key, owner=found.revision.owner))
        if bundle is not None:
            self._drop_ways_in(root.record.name)
        return self._apply_objects(root, found, key)

    def _drop_ways_in(self, name: str) -> None:
        """Delete the route or Ingress that earlier settings asked for."""
        wanted = {"HTTPRoute": bool(self._settings.gateway)}
        wanted["Ingress"] = bool(self._settings.ingress_class) and not self._settings.gateway
        for kind, stays in wanted.items():
            if not stays:
                with contextlib.suppress(ForbiddenError):  # then it could not be made either
                    self._client.delete(kind, object_name(name))

    def _apply_objects(self, root: Root, found: Kept, key: str) -> tuple[str, int]:
        """Apply all but the Secrets; return the version of the Deployment, which is the last one."""
        made: dict[str, Any] = {}
        for one in manifests.objects(self._workload(root, found, key)):
            made = self._client.apply(one)
        return _version(made)

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
            from_namespaces=found.callers,
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

    def _follow(self, root: Root, key: str, made: tuple[str, int]) -> None:
        """Wait until the Replicas are as they are to be."""
        wanted = root.record
        revision = wanted.kept[-1].revision
        found = label_selector(wanted.name)

        def say(words: str) -> None:
            self._on_progress(words, {})

        with contextlib.closing(self._client.watch(found, seconds=ROLLOUT_SECONDS)) as watched:
            snapshots = self._ours(root, key, made, watched)
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

    def _ours(self, root: Root, key: str, made: tuple[str, int], snapshots: Iterable[Snapshot]) -> Iterator[Snapshot]:
        """Yield Snapshots of the Deployment as this apply made it.

        Raises EngineError where another deploy took over. Else what somebody changed is made so again, for a deploy
        that was overtaken may still have been applying.
        """
        for snapshot in snapshots:
            seen = _version(snapshot.deployment) if snapshot.deployment else None
            if seen == made:
                yield snapshot
            elif seen is None or seen[0] != made[0] or seen[1] > made[1]:  # else it was seen before the last apply
                self._check_ours(root)
                found = root.record.find(root.record.under_way)
                made = made if found is None else self._apply_objects(root, found, key)

    def _check_ours(self, root: Root) -> None:
        """Raise EngineError where the Endpoint was deleted, or another deploy took it over."""
        name, number = root.record.name, root.record.under_way
        found = find_root(self._client, name)
        if found is None or found["metadata"]["uid"] != root.uid:
            raise EngineError(f"{name} was deleted while its revision {number} was being rolled out.")
        now = record.read(found)
        if now.under_way != number or now.find(number) != root.record.find(number):
            raise _overtaken(name)

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

    def _settled(self, before: Root, root: Root) -> bool:
        """Undo what a failed apply made, as far as that can be done; False where another deploy took over."""
        with contextlib.suppress(NbdeployError):  # the reason of the failure is what the user must hear
            return self._settle(before, root)
        with contextlib.suppress(NbdeployError):  # a cancel, which comes once, fell into the first try
            self._settle(before, root)
        return True

    def _settle(self, before: Root, root: Root) -> bool:
        """Leave what served before as it was, or nothing where nothing did; False where another deploy took over."""
        number = root.record.under_way
        serving = before.record.find(before.record.serving)
        now = read_root(self._client, root.record.name)
        if not now.uid:
            return True  # deleted meanwhile
        if now.uid != root.uid or now.record.find(number) != root.record.find(number):
            return False
        if now.record.under_way != number:
            return True  # it came to serve in spite of all
        if serving is None:
            self._client.delete("ConfigMap", object_name(root.record.name), uid=root.uid)
            await_gone(self._client, root.record.name)
            return True
        self._apply_objects(root, serving, read_key(self._client, root.record.name))
        settled = now.record.without(number)
        self._write(settled, now)
        self._forget_secrets(now.record, settled)
        return True

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


def _overtaken(name: str) -> EngineError:
    return EngineError(
        f"Another deploy or change of {name} came first. Look at it (nbdeploy status {name}), then deploy again."
    )


def _version(deployment: Mapping[str, Any]) -> tuple[str, int]:
    """Return what changes with each change of what is asked for."""
    return str(deployment["metadata"]["uid"]), int(deployment["metadata"].get("generation", 0))
