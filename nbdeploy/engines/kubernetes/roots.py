"""The root ConfigMap of an Endpoint and its key, as the cluster has them now."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

from nbdeploy.engines.kubernetes import record
from nbdeploy.engines.kubernetes.client import Client
from nbdeploy.engines.kubernetes.record import Record
from nbdeploy.engines.kubernetes.workload import object_name
from nbdeploy.errors import EngineError

ROOT_SECONDS = 60.0  # for a root that is being deleted to be gone


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
    limit = time.monotonic() + ROOT_SECONDS
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
