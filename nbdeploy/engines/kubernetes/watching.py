"""What happens to one Endpoint's objects, followed through the client's open answers."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbdeploy.engines.kubernetes.diagnosis import Snapshot
from nbdeploy.engines.kubernetes.kinds import KINDS, Kind, path_of
from nbdeploy.engines.kubernetes.refusals import Asked, UnavailableError
from nbdeploy.errors import EngineError

if TYPE_CHECKING:
    from nbdeploy.engines.kubernetes.client import Client

_FOLLOWED = ("Deployment", "ReplicaSet", "Pod", "Event")
_WATCH_SECONDS = 60  # that one watch lasts: one that something on the way has stalled is told by nothing else
_SLACK_SECONDS = 15.0  # that the server may be late in ending it
_TICK_SECONDS = 1.0  # a Snapshot comes at least this often


def snapshots(client: Client, selector: str, *, seconds: float) -> Generator[Snapshot, None, None]:
    """Yield what the selector matches after each change and each second, until `seconds` are over; see Client.watch."""
    told: queue.Queue[_Change] = queue.Queue()
    followers = [_Follower(client, KINDS[kind], "" if kind == "Event" else selector, told) for kind in _FOLLOWED]
    state = _State()
    end = time.monotonic() + seconds
    for follower in followers:
        follower.start()
    try:
        while (left := end - time.monotonic()) > 0:
            changed = _take(told, state, min(left, _TICK_SECONDS))
            if state.complete() and (changed or time.monotonic() - state.shown >= _TICK_SECONDS):
                yield state.snapshot()
    finally:
        for follower in followers:
            follower.stop()
        limit = time.monotonic() + _SLACK_SECONDS
        for follower in followers:
            follower.join(max(0.0, limit - time.monotonic()))


@dataclass(frozen=True)
class _Change:
    """What one follower tells: objects of a kind, all of them or those that changed; or why it ends."""

    kind: str
    objects: tuple[dict[str, Any], ...] = ()
    all: bool = False
    gone: bool = False
    error: EngineError | None = None


def _take(told: queue.Queue[_Change], state: _State, seconds: float) -> bool:
    """Wait for changes and take all that are there; tell whether one concerns us."""
    changed = False
    try:
        change = told.get(timeout=seconds)
        while True:
            if change.error is not None:
                raise change.error
            changed |= state.take(change)
            change = told.get_nowait()
    except queue.Empty:
        return changed


@dataclass
class _State:
    """What is known by now."""

    objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # by kind and uid
    concerned: set[str] = field(default_factory=set)  # uids and "Kind/name" that the selector has ever matched
    shown: float = 0.0

    def complete(self) -> bool:
        return all(kind in self.objects for kind in _FOLLOWED)

    def take(self, change: _Change) -> bool:
        known = self.objects.get(change.kind, {})
        found = {str(obj["metadata"]["uid"]): obj for obj in change.objects}
        if change.all:
            self.objects[change.kind] = found
        elif change.gone:
            self.objects[change.kind] = {uid: obj for uid, obj in known.items() if uid not in found}
        else:
            self.objects[change.kind] = {**known, **found}
        if change.kind == "Event":
            return change.all or any(self._concerns(event) for event in change.objects)
        for uid, obj in found.items():
            self.concerned |= {uid, f"{change.kind}/{obj['metadata']['name']}"}
        return True

    def _concerns(self, event: Mapping[str, Any]) -> bool:
        about = event.get("involvedObject") or {}
        return about.get("uid") in self.concerned or f"{about.get('kind')}/{about.get('name')}" in self.concerned

    def snapshot(self) -> Snapshot:
        self.shown = time.monotonic()
        newest, *_ = [*sorted(self.objects["Deployment"].values(), key=_age, reverse=True), None]
        concerning = [event for event in self.objects["Event"].values() if self._concerns(event)]
        return Snapshot(
            deployment=newest,
            replicasets=tuple(sorted(self.objects["ReplicaSet"].values(), key=_age)),
            pods=tuple(sorted(self.objects["Pod"].values(), key=_age)),
            events=tuple(sorted(concerning, key=_when)),
        )


def _age(obj: Mapping[str, Any]) -> tuple[str, str]:
    metadata = obj["metadata"]
    return str(metadata.get("creationTimestamp", "")), str(metadata.get("name", ""))


def _when(event: Mapping[str, Any]) -> str:
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    # one has whole seconds, the other fractions: without the Z they compare
    return max((str(time).rstrip("Z") for time in times if time), default=_age(event)[0])


class _Follower(threading.Thread):
    """Lists one kind, then watches it, for as long as it is not stopped."""

    def __init__(self, client: Client, kind: Kind, selector: str, told: queue.Queue[_Change]) -> None:
        super().__init__(name=f"nbdeploy-watch-{kind.plural}", daemon=True)
        self._client, self._kind, self._selector, self._told = client, kind, selector, told
        self._path = path_of(kind, client.namespace)
        self._stopped = threading.Event()
        self._stream: Any = None

    def stop(self) -> None:
        """End it soon; what it waits for is cut off."""
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.stop()

    def run(self) -> None:
        version, pause, first = "", 0.2, True
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                if not version:
                    version = self._list()
                    first = False
                version = self._watch(version)
            except EngineError as error:
                if self._stopped.is_set():
                    return
                if first or not isinstance(error, UnavailableError):
                    self._told.put(_Change(self._kind.kind, error=error))
                    return
            pause = 0.2 if time.monotonic() - began > pause else min(pause * 2, 5.0)
            self._stopped.wait(pause)

    def _asked(self, verb: str) -> Asked:
        return Asked(verb, self._kind.group, self._kind.plural, "", self._client.namespace)

    def _list(self) -> str:
        """Tell of all objects, as stored now, for the caller has just applied; return the version to watch from."""
        found = self._client.ask("GET", self._path, self._asked("list"), query={"labelSelector": self._selector}) or {}
        self._told.put(_Change(self._kind.kind, tuple(found.get("items") or ()), all=True))
        return str(found["metadata"]["resourceVersion"])

    def _watch(self, version: str) -> str:
        """Tell of changes until the server ends the watch; return the version to go on from, "" to list again."""
        query = {
            "watch": "1",
            "labelSelector": self._selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        read = _WATCH_SECONDS + _SLACK_SECONDS
        self._stream = stream = self._client.stream(self._path, self._asked("watch"), query=query, read=read)
        if stream is None:  # 410: the version is too old; whatever else it is, a list tells
            return ""
        if self._stopped.is_set():  # before it could stop this stream
            stream.stop()
        try:
            for line in stream.lines():
                event = json.loads(line)
                kind, obj = event["type"], event["object"]
                if kind == "ERROR":  # 410 again, told later
                    return ""
                version = str(obj["metadata"]["resourceVersion"])
                if kind != "BOOKMARK":
                    self._told.put(_Change(self._kind.kind, (obj,), gone=kind == "DELETED"))
        except ValueError:  # not of an API server: something on the way
            return version
        finally:
            stream.stop()
        return version
