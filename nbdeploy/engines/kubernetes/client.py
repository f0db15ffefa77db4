"""The only file that talks to the API server: known paths, raw JSON, no models, no discovery but the list of groups."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from nbdeploy.engines.kubernetes import connecting, watching
from nbdeploy.engines.kubernetes.connecting import Connection
from nbdeploy.engines.kubernetes.diagnosis import Snapshot
from nbdeploy.engines.kubernetes.kinds import KINDS, Kind, kind_of, path_of
from nbdeploy.engines.kubernetes.refusals import (
    BUSY,
    Asked,
    ChangedError,
    ConflictError,
    ForbiddenError,
    UnavailableError,
    hopeful,
    refused,
    status_of,
    unreachable,
    unreadable,
)
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.streaming import Stream
from nbdeploy.engines.kubernetes.workload import MANAGER
from nbdeploy.errors import EngineError
from nbdeploy.oci.transport import without_login

__all__ = [
    "KINDS",
    "Asked",
    "ChangedError",
    "Client",
    "ConflictError",
    "ForbiddenError",
    "Kind",
    "UnavailableError",
]

CONTAINER = "server"  # of our pods
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
RETRY_SECONDS = 30.0  # that a request is tried again, once the server is known to be there
FIRST_SECONDS = 4.0  # that a first connection is tried again: a wrong address stays wrong
_GROUPS_SECONDS = 600.0  # that a list of API groups is good for
_JSON = "application/json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_FAILED = 400  # from it on, a status is of a failure
_BAD, _UNAUTHORIZED, _NOT_FOUND, _CONFLICT = 400, 401, 404, 409


class _Caller:
    """Sends requests: rights, certificates, time limits, repetition, refusals in words."""

    def __init__(self, connection: Connection) -> None:
        self.server = connection.server
        self.requests = 0
        self.closed = False
        self.warnings: list[str] = []
        self._connection = connection
        self._lock = threading.Lock()
        self._pool: Any = None
        self._reached = False
        self._streams: set[Stream] = set()

    def ask(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        accept: str = _JSON,
        content: str = _JSON,
        repeatable: bool = True,
        absent: bool = False,
    ) -> dict[str, Any] | None:
        """Send one request and return the answer's JSON; None for a 404 where `absent` is allowed.

        Raises EngineError in words for every refusal. Where nothing answers, or 429 or 5xx, the request is sent again
        for up to RETRY_SECONDS; one that is not `repeatable` only where it cannot have been carried out.
        """
        data = json.dumps(body, separators=(",", ":")).encode() if body is not None else b""
        headers = {"accept": accept, **({"content-type": content} if data else {})}
        response = self.open(
            method, path, asked, query=query, data=data, headers=headers, repeatable=repeatable, tolerated=(_NOT_FOUND,)
        )
        if response.status == _NOT_FOUND:
            about = (status_of(response.data).get("details") or {}).get("kind")
            if absent and about != "namespaces":
                return None
            raise self._refused(response, asked)
        try:
            found = json.loads(response.data)
        except ValueError as error:
            raise unreadable(self.server, response.data) from error
        return found if isinstance(found, dict) else {}

    def open(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        data: bytes = b"",
        headers: Mapping[str, str] | None = None,
        read: float = READ_SECONDS,
        patience: float = RETRY_SECONDS,
        repeatable: bool = True,
        streamed: bool = False,
        tolerated: tuple[int, ...] = (),
    ) -> Any:
        """Send one request as `ask` does and return the answer as urllib3 has it, its body unread where `streamed`.

        Args:
            method: of HTTP.
            path: of the API.
            query: its empty values are left out.
            data: body, in JSON.
            headers: of the request; who we are is added.
            asked: for words.
            read: seconds that the server may be silent.
            patience: seconds that the request may be repeated for.
            repeatable: it may be sent twice.
            streamed: leave the body to be read.
            tolerated: statuses that are no failure.
        """
        import urllib3

        given = urlencode({key: value for key, value in (query or {}).items() if value})
        url = f"{self.server}{path}{'?' + given if given else ''}"
        began, pause, renewed = time.monotonic(), 0.1, False
        while True:
            wait = pause
            try:
                response = self._send(method, url, data, dict(headers or {}), read, streamed=streamed)
            except urllib3.exceptions.HTTPError as error:
                failure: EngineError = UnavailableError(self._unreachable(error))
                failure.__cause__ = error
                again = hopeful(error, repeatable=repeatable)
            else:
                if response.status < _FAILED or response.status in tolerated:
                    return response
                if response.status == _UNAUTHORIZED and not renewed:
                    renewed = True
                    self._renew()
                    continue
                failure = self._refused(response, asked)
                again = _again(method, response.status, failure, repeatable=repeatable)
                wait = max(wait, _retry_after(response))
            limit = patience if self._reached else min(patience, FIRST_SECONDS)
            if not again or time.monotonic() - began + wait > limit:
                raise failure
            time.sleep(wait)
            pause = min(pause * 2, 5.0) * random.uniform(0.8, 1.0)  # noqa: S311 - so that clients do not march in step

    def stream(self, path: str, asked: Asked, *, query: Mapping[str, str], read: float) -> Stream | None:
        """GET an answer that goes on; None where the object is not there, or not ready to be read from."""
        response = self.open("GET", path, asked, query=query, read=read, streamed=True, tolerated=(_BAD, _NOT_FOUND))
        if response.status in {_BAD, _NOT_FOUND}:
            response.drain_conn()
            return None
        made = Stream(response, self._streams.discard)
        self._streams.add(made)
        return made

    def close(self) -> None:
        """End all connections, those that other threads read from as well."""
        self.closed = True
        with self._lock:
            pool, self._pool = self._pool, None
        for stream in list(self._streams):
            stream.stop()
        if pool is not None:
            pool.clear()

    def _send(self, method: str, url: str, data: bytes, headers: dict[str, str], read: float, *, streamed: bool) -> Any:
        from urllib3 import Timeout

        with self._lock:
            self.requests += 1
            pool = self._pool = self._pool or self._connected()
        headers |= self._connection.headers()
        response = pool.request(
            method,
            url,
            body=data or None,
            headers=headers,
            timeout=Timeout(connect=CONNECT_SECONDS, read=read),
            retries=False,
            redirect=False,
            preload_content=not streamed,
        )
        self._reached = True
        for warning in response.headers.getlist("warning"):
            text = warning.partition('"')[2].rpartition('"')[0].replace('\\"', '"') or warning
            if text not in self.warnings:
                self.warnings.append(text)
        return response

    def _connected(self) -> Any:
        from kubernetes.client.rest import RESTClientObject

        configuration = self._connection.configuration
        configuration.connection_pool_maxsize = 32
        return RESTClientObject(configuration).pool_manager

    def _renew(self) -> None:
        self._connection.renew()
        with self._lock:
            self._pool = None  # what is being read from the old one is read to its end

    def _refused(self, response: Any, asked: Asked) -> EngineError:
        return refused(response.status, response.data, asked, server=self.server, context=self._connection.context)

    def _unreachable(self, error: Exception) -> str:
        configuration = self._connection.configuration
        proxy = without_login(str(configuration.proxy or ""))
        return unreachable(error, self.server, proxy=proxy, in_cluster=self._connection.in_cluster)


def _again(method: str, status: int, failure: EngineError, *, repeatable: bool) -> bool:
    """Tell whether a refusal may pass by itself."""
    if status == _CONFLICT:  # the server lost a race of its own; where a version was given, it is the answer
        return repeatable and method == "PATCH" and isinstance(failure, ChangedError)
    return status in BUSY


def _retry_after(response: Any) -> float:
    """Return the seconds that a refusal asks to wait."""
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date: nobody who stands before an API server sends one
        return 0.0


class Client(_Caller):
    """One namespace of one cluster; may be used by many threads at once.

    Attributes:
        namespace: of the Endpoints.
        in_cluster: this process runs in a pod of the cluster.
        server: URL of the API server.
        context: of the kubeconfig, "" in a pod.
        requests: how many requests were sent.
        closed: nobody goes on reading through it.
        warnings: what the API server warned of (Pod Security, deprecated fields), each once.
    """

    def __init__(self, connection: Connection, cache: Path) -> None:
        super().__init__(connection)
        self.namespace = connection.namespace
        self.in_cluster = connection.in_cluster
        self.context = connection.context
        self._cache = cache

    @classmethod
    def connect(cls, settings: ClusterSettings, cache: Path) -> Client:
        """Return a client for the cluster of the settings; nothing is sent yet.

        Args:
            settings: context and namespace are read.
            cache: private folder for what is learnt of the cluster.
        """
        return cls(connecting.connect(settings), cache)

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object, None where there is none of that name (or where the cluster has no such kind)."""
        found = KINDS[kind]
        asked = Asked("get", found.group, found.plural, name, self.namespace)
        return self.ask("GET", path_of(found, self.namespace, name), asked, absent=True)

    def list(
        self, kind: str, selector: str = "", *, metadata_only: bool = False, fresh: bool = False
    ) -> list[dict[str, Any]]:
        """Return all objects of a kind that a label selector matches, in one request.

        Args:
            kind: one of KINDS; of a kind that the cluster does not have there are none.
            selector: like "app.kubernetes.io/managed-by=nbdeploy".
            metadata_only: leave out spec and status, which are the most of it.
            fresh: ask what is stored now; else the server may answer from its cache, milliseconds old and much faster.
        """
        found = KINDS[kind]
        query = {"labelSelector": selector, "resourceVersion": "" if fresh else "0"}
        asked = Asked("list", found.group, found.plural, "", self.namespace)
        accept = _METADATA if metadata_only else _JSON
        answer = self.ask("GET", path_of(found, self.namespace), asked, query=query, accept=accept, absent=True)
        return [] if answer is None else list(answer.get("items") or ())

    def apply(self, obj: Mapping[str, Any], *, force: bool = True, dry_run: bool = False) -> dict[str, Any]:
        """Make the object so, by server-side apply: fields that we name are ours, the others stay as they are.

        Args:
            obj: with a metadata.resourceVersion it is applied only onto that version; with a metadata.uid too, an
                object that was deleted meanwhile is not made anew.
            force: take fields over from other programs.
            dry_run: have it checked only.

        Raises:
            ConflictError: without force, where another program owns a field; it names both.
            ChangedError: where the object is not at the resourceVersion given.
        """
        kind, name, metadata = KINDS[str(obj["kind"])], str(obj["metadata"]["name"]), obj["metadata"]
        query = {"fieldManager": MANAGER, "force": "true" if force else "false", "dryRun": "All" if dry_run else ""}
        asked = Asked("patch", kind.group, kind.plural, name, self.namespace)
        answer = self.ask(
            "PATCH",
            path_of(kind, self.namespace, name),
            asked,
            query=query,
            body=obj,
            content="application/apply-patch+yaml",
            repeatable=not metadata.get("resourceVersion"),
        )
        return answer or {}

    def create(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object that must not be there yet; raises ChangedError where it is."""
        kind, name = KINDS[str(obj["kind"])], str(obj["metadata"]["name"])
        asked = Asked("create", kind.group, kind.plural, name, self.namespace)
        path, query = path_of(kind, self.namespace), {"fieldManager": MANAGER}
        return self.ask("POST", path, asked, query=query, body=obj, repeatable=False) or {}

    def delete(self, kind: str, name: str, *, uid: str = "") -> bool:
        """Delete an object and, before it, all that it owns; False where it is not there.

        It is gone once `get` finds it no more. With a `uid` only that very object is deleted.
        """
        found = KINDS[kind]
        body: dict[str, Any] = {"propagationPolicy": "Foreground"}
        if uid:
            body["preconditions"] = {"uid": uid}
        asked = Asked("delete", found.group, found.plural, name, self.namespace)
        try:
            return self.ask("DELETE", path_of(found, self.namespace, name), asked, body=body, absent=True) is not None
        except ChangedError:  # another one of that name: the one that was meant is gone
            return False

    def can(self, verb: str, kind_or_plural: str, subresource: str = "") -> bool:
        """Tell whether we may do something in the namespace."""
        kind = kind_of(kind_or_plural)
        attributes = {
            "namespace": self.namespace,
            "verb": verb,
            "group": kind.group,
            "resource": kind.plural,
            "subresource": subresource,
        }
        answer = self.review("authorization.k8s.io/v1", "SelfSubjectAccessReview", {"resourceAttributes": attributes})
        return bool(answer.get("allowed"))

    def review(self, version: str, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the server about ourselves: return the status of a SelfSubject…Review."""
        group, plural = version.partition("/")[0], f"{kind.lower()}s"
        body = {"apiVersion": version, "kind": kind, "spec": dict(spec)}
        answer = self.ask("POST", f"/apis/{version}/{plural}", Asked("create", group, plural), body=body)
        return dict((answer or {}).get("status") or {})

    def logs(
        self, pod: str, *, follow: bool, tail: int | None = None, previous: bool = False
    ) -> Generator[tuple[str, str], None, None]:
        """Yield what a pod's server printed, as (time in RFC 3339, line), oldest first.

        With `follow` until the pod ends; one that has not started is waited for. Nothing where the pod is gone.
        `previous` tells of the container before the last restart.
        """
        return watching.log_lines(self, pod, follow=follow, tail=tail, previous=previous)

    def proxy(self, pod: str, port: int, path: str, *, timeout: float) -> str:
        """GET from a pod through the API server; EngineError where the pod does not answer with 200 in time."""
        url = f"{KINDS['Pod'].root}/namespaces/{self.namespace}/pods/{pod}:{port}/proxy/{path.lstrip('/')}"
        asked = Asked("get", "", "pods/proxy", pod, self.namespace)
        response = self.open("GET", url, asked, headers={"accept": "*/*"}, read=timeout, patience=0.0)
        return bytes(response.data).decode(errors="replace")

    def watch(self, selector: str, *, seconds: float) -> Generator[Snapshot, None, None]:
        """Yield what is there of Deployments, ReplicaSets and Pods that a selector matches, with their Events.

        A Snapshot comes after each change and at least once a second, until `seconds` are over. Close the iterator
        and its threads and connections end.
        """
        return watching.snapshots(self, selector, seconds=seconds)

    def groups(self, *, fresh: bool = False) -> frozenset[str]:
        """Return the API groups of the cluster, like "keda.sh"; kept for some minutes in a private file."""
        who = hashlib.sha256(f"{self.server} {self.context}".encode()).hexdigest()[:16]
        file = self._cache / f"groups-{who}.json"
        if not fresh:
            with contextlib.suppress(OSError, ValueError):
                if 0 <= time.time() - file.stat().st_mtime < _GROUPS_SECONDS:
                    return frozenset(map(str, json.loads(file.read_bytes())))
        answer = self.ask("GET", "/apis", Asked("get", "", "apis")) or {}
        names = sorted(str(group["name"]) for group in answer.get("groups") or ())
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = file.with_suffix(f".{threading.get_ident()}-{random.getrandbits(32):08x}")
        made.touch(mode=0o600)
        made.write_text(json.dumps(names), encoding="ascii")
        made.replace(file)
        return frozenset(names)
