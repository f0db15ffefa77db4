"""What the objects of one Endpoint are made from: names, labels, sizes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.spec import Resources, Serving

MANAGER = "nbdeploy"
"""Field manager of everything applied, and the value of the managed-by label."""

CONTAINER = "server"  # of our pods
USERS_PORT, PROBES_PORT = 8080, 9090
DRAIN = 10  # seconds until every proxy of a cluster has heard that a Replica ends

_MIB = 2**20
_LABEL = 63  # characters of a label's value or of a Service's name
_OURS = 512 * _MIB  # the server, Python and what a model library takes before any weight is there
_CUDA = 2048 * _MIB  # libraries and context of CUDA, in the memory of the host
_STEP = 128 * _MIB


def object_name(name: str) -> str:
    """Return the name of an Endpoint's objects: a DNS label, shortened with a hash where the name is too long."""
    whole = f"nbd-{name}"
    if len(whole) <= _LABEL:
        return whole
    return f"{whole[: _LABEL - 9].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def label_value(text: str) -> str:
    """Return the legal label value nearest to a text (up to 63 letters, digits, ".", "_", "-"); "" if none is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:_LABEL].strip("-._")


def selector(name: str) -> dict[str, str]:
    """Return the labels that select an Endpoint's objects and pods; they never change."""
    return {"app.kubernetes.io/instance": object_name(name), "app.kubernetes.io/managed-by": MANAGER}


def label_selector(name: str) -> str:
    """Return the same as the API takes it in a query."""
    return ",".join(f"{key}={value}" for key, value in selector(name).items())


def labels(name: str, owner: str, number: int = 0) -> dict[str, str]:
    """Return the labels of an object; a number above 0 is the Revision that made the Replicas."""
    values = {
        "app.kubernetes.io/name": label_value(name),
        **selector(name),
        "app.kubernetes.io/component": "model-server",
        "app.kubernetes.io/part-of": "nbdeploy",
        "nbdeploy.dev/endpoint": label_value(name),
        "nbdeploy.dev/owner": label_value(owner),
    }
    if number:
        values |= {"app.kubernetes.io/version": str(number), "nbdeploy.dev/revision": str(number)}
    return values


def reference(name: str, uid: str) -> list[dict[str, Any]]:
    """Return the owner reference to the root ConfigMap: with it goes all; no right on finalizers is needed."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "name": object_name(name),
            "uid": uid,
            "controller": False,
            "blockOwnerDeletion": False,
        }
    ]


def memory_request(weights_bytes: int, gpus: int) -> int:
    """Return the memory in bytes that a Replica gets where none is asked for.

    Args:
        weights_bytes: of all weights; twice, because a load may hold them once as file and once as tensors.
        gpus: CUDA keeps a context in the host's memory for each process.
    """
    need = 2 * weights_bytes + _OURS + (_CUDA if gpus else 0)
    return -(-need // _STEP) * _STEP


@dataclass(frozen=True)
class Workload:
    """Everything the objects of one Endpoint are made from.

    Attributes:
        name: of the Endpoint.
        namespace: where its objects are.
        number: Revision that made the Replicas; one that changes only their number keeps it.
        image: reference by digest.
        uid: of the root ConfigMap, which owns all.
        replicas: how many; None leaves the number to an autoscaler.
        resources, serving: as asked for.
        memory: bytes where the Resources name none.
        disk: bytes of files that a Replica unpacks.
        owner, notebook: who deployed it, from where.
        key_sha256: hex digest of the key; "" means public.
        secrets: variables whose values are in the Secret `secrets_object`.
        secrets_object: name of that Secret; it is another one for other values, so that these restart Replicas.
        foreign_secrets: variable → (Secret, key) for values that others keep in the namespace.
        variables: passed by value.
        from_namespaces: namespaces besides its own whose pods may call.
        drain: seconds that a Replica still accepts after it was told to end, until every proxy knows.
        in_place: end an old Replica before its successor starts; for clusters without a spare GPU.
        settings: of the cluster.
    """

    name: str
    namespace: str
    number: int
    image: str
    uid: str
    replicas: int | None = 1
    resources: Resources = field(default_factory=Resources)
    serving: Serving = field(default_factory=Serving)
    memory: int = 2 * _OURS
    disk: int = 0
    owner: str = ""
    notebook: str = ""
    key_sha256: str = ""
    secrets: tuple[str, ...] = ()
    secrets_object: str = ""
    foreign_secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    from_namespaces: tuple[str, ...] = ()
    drain: int = DRAIN
    in_place: bool = False
    settings: ClusterSettings = field(default_factory=ClusterSettings)
