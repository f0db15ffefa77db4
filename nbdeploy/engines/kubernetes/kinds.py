"""The kinds of objects that nbdeploy makes or reads, and the paths they have."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Kind:
    """One kind of object, all of them namespaced."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """As objects carry it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """Path of its API."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


KINDS = {
    kind.kind: kind
    for kind in (
        Kind("", "v1", "configmaps", "ConfigMap"),
        Kind("", "v1", "secrets", "Secret"),
        Kind("", "v1", "services", "Service"),
        Kind("", "v1", "serviceaccounts", "ServiceAccount"),
        Kind("", "v1", "pods", "Pod"),
        Kind("", "v1", "events", "Event"),
        Kind("", "v1", "resourcequotas", "ResourceQuota"),
        Kind("", "v1", "limitranges", "LimitRange"),
        Kind("apps", "v1", "deployments", "Deployment"),
        Kind("apps", "v1", "replicasets", "ReplicaSet"),
        Kind("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
        Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"),
        Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
        Kind("networking.k8s.io", "v1", "ingresses", "Ingress"),
        Kind("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute"),
    )
}
"""Each by its name."""


def path_of(kind: Kind, namespace: str, name: str = "") -> str:
    """Return the path of an object, or of all in the namespace."""
    path = f"{kind.root}/namespaces/{quote(namespace)}/{kind.plural}"
    return f"{path}/{quote(name)}" if name else path
