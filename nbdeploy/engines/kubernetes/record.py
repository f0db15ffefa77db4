"""The record of an Endpoint in its root ConfigMap: the Revisions kept, which one serves, what its Replicas are made of.

The ConfigMap `nbd-NAME` holds the record as JSON in `data["record.json"]`, and in the annotation `nbdeploy.dev/summary`
the little that a listing of a thousand Endpoints needs, so that it needs their metadata alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbdeploy.engines.kubernetes.workload import MANAGER, labels, object_name
from nbdeploy.errors import EngineError, UsageError
from nbdeploy.spec import Autoscaling, Revision

KEPT = 10  # Revisions
SUMMARY = "nbdeploy.dev/summary"

_FORMAT = 1
_DATA = "record.json"


class UnreadableError(EngineError):
    """The record of an Endpoint cannot be read."""


@dataclass(frozen=True)
class Kept:
    """A Revision and all that making its Replicas again needs.

    Attributes:
        revision: as asked for.
        image: reference by digest.
        template: number of the Revision that made these Replicas; below its own number if only their number changed.
        memory: bytes for each Replica where the Revision's Resources name none.
        disk: bytes of files that a Replica unpacks.
        weights: bytes of weights, for words on memory.
        secrets_object: Secret with the values of its secrets; "" where it has none.
        foreign_secrets: variable → (Secret, key) for values that others keep in the namespace.
        variables: passed by value.
        callers: namespaces besides its own whose pods may call.
    """

    revision: Revision
    image: str
    template: int = 0
    memory: int = 0
    disk: int = 0
    weights: int = 0
    secrets_object: str = ""
    foreign_secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    callers: tuple[str, ...] = ()

    def same_replicas(self, other: Kept) -> bool:
        """Whether going from one to the other needs no new Replica."""
        return self.revision.same_replicas(other.revision) and self._made_of() == other._made_of()

    def _made_of(self) -> tuple[Any, ...]:
        return self.image, self.secrets_object, dict(self.foreign_secrets), dict(self.variables)


@dataclass(frozen=True)
class Record:
    """What is kept of one Endpoint.

    Attributes:
        name: of the Endpoint.
        owner, notebook: who deployed it last, from where.
        kept: oldest first, the one that is being rolled out included.
        serving: number of the Revision that is to be; 0 before the first one serves.
        under_way: number of the Revision that is being rolled out; 0 if none is.
    """

    name: str
    owner: str = ""
    notebook: str = ""
    kept: tuple[Kept, ...] = ()
    serving: int = 0
    under_way: int = 0

    def find(self, number: int) -> Kept | None:
        """Return what is kept of a Revision, or None."""
        return next((row for row in self.kept if row.revision.number == number), None)

    @property
    def current(self) -> Kept | None:
        """What serves or, before anything did, what is under way or failed last."""
        return self.find(self.serving) or (self.kept[-1] if self.kept else None)

    def revisions(self) -> list[Revision]:
        """Return the Revisions that came to serve (or were a stop), oldest first."""
        return [row.revision for row in self.kept if row.revision.number <= self.serving]

    def with_revision(self, kept: Kept) -> Record:
        """Return the record with a Revision under way; it keeps the template of the serving one where it can.

        Another one under way gives way: its deploy was killed, or hears of it.
        """
        serving = self.find(self.serving)
        number = kept.revision.number
        if serving and serving.same_replicas(kept):
            # Sizes come from measurements, which differ a little each time: they are kept with the Replicas.
            kept = dataclasses.replace(serving, revision=kept.revision, callers=kept.callers)
        else:
            kept = dataclasses.replace(kept, template=number)
        rows = (
            *(row for row in self.kept if row.revision.number <= self.serving and row.revision.number != number),
            kept,
        )
        return dataclasses.replace(
            self,
            owner=kept.revision.owner,
            notebook=kept.revision.notebook,
            kept=rows,
            under_way=number,
        )

    def committed(self, number: int) -> Record:
        """Return the record with this Revision as the one that is to be, and the oldest ones forgotten."""
        return dataclasses.replace(self, serving=number, under_way=0, kept=self.kept[-KEPT:])

    def without(self, number: int) -> Record:
        """Return the record without a Revision that never came to serve."""
        rows = tuple(row for row in self.kept if row.revision.number != number)
        whose = next((row.revision for row in rows if row.revision.number == self.serving), None)
        owner, notebook = (whose.owner, whose.notebook) if whose else (self.owner, self.notebook)
        return dataclasses.replace(self, kept=rows, under_way=0, owner=owner, notebook=notebook)

    def secrets_objects(self) -> frozenset[str]:
        """Return the names of the Secrets that kept Revisions need."""
        return frozenset(row.secrets_object for row in self.kept if row.secrets_object)


@dataclass(frozen=True)
class Summary:
    """What a listing needs of an Endpoint; numbers as in the Record, the rest as of the Revision that is to be."""

    name: str
    owner: str
    notebook: str
    serving: int
    under_way: int
    stopped: bool
    public: bool
    autoscaling: Autoscaling


def root(record: Record, namespace: str, *, uid: str = "", resource_version: str = "") -> dict[str, Any]:
    """Return the root ConfigMap of an Endpoint.

    Args:
        record: what it holds.
        namespace: where it is.
        uid: of the ConfigMap that was read; "" makes a new one.
        resource_version: of the ConfigMap that was read; if somebody changed it since, or deleted it, the API server
            refuses.
    """
    metadata: dict[str, Any] = {
        "name": object_name(record.name),
        "namespace": namespace,
        "labels": labels(record.name, record.owner),
        "annotations": {SUMMARY: json.dumps(dataclasses.asdict(summary(record)), sort_keys=True)},
    }
    if resource_version:
        metadata |= {"uid": uid, "resourceVersion": resource_version}
    data = {"format": _FORMAT, **dataclasses.asdict(record)}
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {_DATA: text}}


def summary(record: Record) -> Summary:
    """Return what a listing needs of a record."""
    current = record.current
    revision = current.revision if current else Revision(record.name, 0, "")
    return Summary(
        name=record.name,
        owner=record.owner,
        notebook=record.notebook,
        serving=record.serving,
        under_way=record.under_way,
        stopped=revision.stopped,
        public=revision.serving.public,
        autoscaling=revision.autoscaling,
    )


def read(configmap: Mapping[str, Any]) -> Record:
    """Read a root ConfigMap; raises EngineError where it is not ours or cannot be read."""
    _check_ours(configmap)
    try:
        data = json.loads(configmap["data"][_DATA])
        _check_format(configmap, data.pop("format"))
        return Record(**{**data, "kept": tuple(_kept(row) for row in data["kept"])})
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise _unreadable(configmap, error) from None


def read_summary(configmap: Mapping[str, Any]) -> Summary:
    """Read a root ConfigMap of which only the metadata is there; raises EngineError as `read` does."""
    _check_ours(configmap)
    try:
        data = json.loads(configmap["metadata"]["annotations"][SUMMARY])
        return Summary(**{**data, "autoscaling": Autoscaling(**data["autoscaling"])})
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise _unreadable(configmap, error) from None


def _kept(row: dict[str, Any]) -> Kept:
    foreign = {name: (secret, key) for name, (secret, key) in row["foreign_secrets"].items()}
    more = {"foreign_secrets": foreign, "callers": tuple(row.get("callers", ()))}
    return Kept(**{**row, **more, "revision": Revision.from_json(row["revision"])})


def _where(configmap: Mapping[str, Any]) -> str:
    metadata = configmap.get("metadata") or {}
    return f"The ConfigMap {metadata.get('name', '?')} in the namespace {metadata.get('namespace', '?')}"


def _check_ours(configmap: Mapping[str, Any]) -> None:
    marks = (configmap.get("metadata") or {}).get("labels") or {}
    if marks.get("app.kubernetes.io/managed-by") != MANAGER:
        raise EngineError(
            f"{_where(configmap)} was not made by nbdeploy, and it has the name that this Endpoint needs. "
            "Choose another name with --name, or have it removed."
        )


def _check_format(configmap: Mapping[str, Any], number: int) -> None:
    if number > _FORMAT:
        raise EngineError(
            f"{_where(configmap)} was written by a newer nbdeploy (format {number}; this one reads {_FORMAT}). "
            "Upgrade: pip install -U nbdeploy"
        )


def _unreadable(configmap: Mapping[str, Any], error: Exception) -> UnreadableError:
    name = ((configmap.get("metadata") or {}).get("labels") or {}).get("nbdeploy.dev/endpoint", "NAME")
    return UnreadableError(
        f"{_where(configmap)} holds the record of an Endpoint, but it cannot be read "
        f"({type(error).__name__}: {error}): somebody changed it. Remove the Endpoint with nbdeploy delete {name}, "
        "and deploy it again."
    )
