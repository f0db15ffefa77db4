"""What is asked of the API server: known paths, raw JSON, no models, no discovery but the list of groups."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from nbdeploy.engines.kubernetes import connecting, podlog, watching
from nbdeploy.engines.kubernetes.connecting import Connection
from nbdeploy.engines.kubernetes.diagnosis import Snapshot
from nbdeploy.engines.kubernetes.kinds import KINDS, Kind, path_of
from nbdeploy.engines.kubernetes.refusals import Asked, ChangedError, ConflictError, ForbiddenError, UnavailableError
from nbdeploy.engines.kubernetes.session import JSON, Session
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import MANAGER

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

_OWNERS = {"ConfigMap", "Deployment", "ReplicaSet"}
_METADATA = f"application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,{JSON}"


class Client(Session):
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

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.namespace = connection.namespace
        self.in_cluster = connection.in_cluster
        self.context = connection.context

    @classmethod
    def connect(cls, settings: ClusterSettings) -> Client:
        """Return a client for the context and the namespace of the settings; nothing is sent yet."""
        return cls(connecting.connect(settings))

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
        accept = _METADATA if metadata_only else JSON
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
        """Delete an object and all that it owns; False where it is not there. With a `uid` only that very object.

        One that may own others goes after them, so it is gone once `get` finds it no more. All others go at once: for
        their kind the cluster's garbage collector may take half a minute to learn that there is such a kind at all.
        """
        found = KINDS[kind]
        body: dict[str, Any] = {"propagationPolicy": "Foreground" if kind in _OWNERS else "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        asked = Asked("delete", found.group, found.plural, name, self.namespace)
        try:
            return self.ask("DELETE", path_of(found, self.namespace, name), asked, body=body, absent=True) is not None
        except ChangedError:  # another one of that name: the one that was meant is gone
            return False

    def review(self, version: str, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the server about ourselves: return the status of a SelfSubject…Review."""
        group, plural = version.partition("/")[0], f"{kind.lower()}s"
        body = {"apiVersion": version, "kind": kind, "spec": dict(spec)}
        answer = self.ask("POST", f"/apis/{version}/{plural}", Asked("create", group, plural), body=body)
        return dict((answer or {}).get("status") or {})

    def logs(
        self, pod: str, *, follow: bool, tail: int | None = None, previous: bool = False
    ) -> Generator[tuple[str, str], None, None]:
        """Yield what a pod's server printed, as (time in RFC 3339 and UTC, line), oldest first.

        Args:
            pod: nothing comes where it is gone.
            follow: go on until the pod ends, whatever breaks meanwhile; one that has not started is waited for.
            tail: only so many lines; not with `follow`.
            previous: of the container before the last restart; not with `follow`.

        Raises:
            EngineError: refused; with `follow`, UnavailableError is none: it goes on when the server answers again.
        """
        return podlog.followed(self, pod) if follow else podlog.whole(self, pod, tail=tail, previous=previous)

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

    def groups(self) -> frozenset[str]:
        """Return the API groups of the cluster, like "keda.sh"."""
        answer = self.ask("GET", "/apis", Asked("get", "", "apis")) or {}
        return frozenset(str(group["name"]) for group in answer.get("groups") or ())
