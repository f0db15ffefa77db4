"""The log lines of all pods of an Endpoint as one stream."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

from nbdeploy.engines.kubernetes.client import Client
from nbdeploy.errors import EngineError

LOOK_SECONDS = 2.0  # between two looks for new pods
KEPT_LINES = 2000  # of each pod, where the log is not followed


def lines(client: Client, selector: str, root: str, *, follow: bool) -> Iterator[str]:
    """Yield lines as "POD LINE", oldest first; with `follow`, as they come, until the Endpoint is gone.

    Args:
        client: of the namespace; one that follows is closed at the end.
        selector: of the Endpoint's pods.
        root: name of its root ConfigMap; once that is gone, following ends.
        follow: go on.
    """
    return _follow(client, selector, root) if follow else _merged(client, selector)


def _merged(client: Client, selector: str) -> Iterator[str]:
    found: list[tuple[str, str]] = []
    for pod in client.list("Pod", selector, fresh=True):
        name = pod["metadata"]["name"]
        restarts = sum(row.get("restartCount", 0) for row in pod.get("status", {}).get("containerStatuses") or ())
        for previous in (True, False) if restarts else (False,):
            for when, line in client.logs(name, follow=False, tail=KEPT_LINES, previous=previous):
                found.append((when, f"{name} {line}"))
    yield from (line for _, line in sorted(found, key=lambda row: row[0]))


def _follow(client: Client, selector: str, root: str) -> Iterator[str]:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    readers: dict[str, threading.Thread] = {}
    looked = 0.0
    try:
        while True:
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                found = client.get("ConfigMap", root)
                if found is None or found["metadata"].get("deletionTimestamp"):
                    break
                _start_readers(client, selector, readers, told)
            with contextlib.suppress(queue.Empty):
                yield told.get(timeout=0.2)
        for reader in readers.values():
            reader.join(1.0)
        while not told.empty():
            yield told.get()
    finally:
        client.close()  # ends what the readers still read


def _start_readers(
    client: Client, selector: str, readers: dict[str, threading.Thread], told: queue.SimpleQueue[str]
) -> None:
    """Read from pods that were not there before."""
    for pod in client.list("Pod", selector, fresh=True):
        name = pod["metadata"]["name"]
        if name not in readers and pod.get("status", {}).get("phase") != "Pending":
            readers[name] = threading.Thread(
                target=_read, args=(client, name, told), name=f"nbdeploy-log-{name}", daemon=True
            )
            readers[name].start()


def _read(client: Client, pod: str, told: queue.SimpleQueue[str]) -> None:
    try:
        for _, line in client.logs(pod, follow=True):
            told.put(f"{pod} {line}")
    except EngineError as error:
        told.put(f"{pod} (its log ended: {error})")
