"""The objects of one Endpoint, as plain data in the order of their apply."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from nbdeploy.engines.kubernetes.pod import template
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import (
    PROBES_PORT,
    USERS_PORT,
    Workload,
    labels,
    memory_request,
    object_name,
    reference,
    selector,
)
from nbdeploy.errors import ConfigError

__all__ = [
    "Workload",
    "environment_secret",
    "external_url",
    "key_secret",
    "memory_request",
    "object_name",
    "objects",
    "secrets_object",
    "selector",
]

_MAX_BODY = "64m"  # what a Replica takes; nginx stops at 1 MB by default


def objects(workload: Workload) -> list[dict[str, Any]]:
    """Return every object but the root ConfigMap and the Secrets, in the order in which they are to be applied."""
    found = [_service_account(workload), _service(workload), _network_policy(workload), _budget(workload)]
    if workload.settings.gateway:
        found.append(_route(workload))
    elif workload.settings.ingress_class:
        found.append(_ingress(workload))
    return [*found, _deployment(workload)]


def key_secret(name: str, namespace: str, uid: str, key: str, *, owner: str = "") -> dict[str, Any]:
    """Return the Secret that keeps an Endpoint's key; Replicas get its sha256 alone."""
    return _secret(f"{object_name(name)}-key", (name, namespace, uid, owner), {"key": key})


def environment_secret(
    name: str, namespace: str, uid: str, values: Mapping[str, str], key: str, *, owner: str = ""
) -> dict[str, Any]:
    """Return the Secret with the values of a Revision's secrets, named by `secrets_object`."""
    return _secret(secrets_object(name, values, key), (name, namespace, uid, owner), values) | {"immutable": True}


def secrets_object(name: str, values: Mapping[str, str], key: str) -> str:
    """Return the name of the Secret with these values, "" for none.

    Other values have another name: a roll-out replaces the Replicas, those of the old Revision keep what they had,
    and so does a rollback. The name says nothing about the values to who does not know the Endpoint's key.
    """
    if not values:
        return ""
    text = json.dumps(dict(values), sort_keys=True)
    return f"{object_name(name)}-env-{hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()[:10]}"


def external_url(settings: ClusterSettings, name: str) -> str:
    """Return where an Endpoint is reached through the Gateway or Ingress, "" where neither is configured."""
    if not settings.host or not (settings.gateway or settings.ingress_class):
        return ""
    scheme, _, rest = settings.host.rpartition("://")
    rest = rest.rstrip("/")
    host = rest.replace("{name}", name) if "{name}" in rest else f"{name}.{rest}"
    url = f"{scheme or ('https' if settings.tls_secret else 'http')}://{host}"
    if urlsplit(url).path or not urlsplit(url).hostname:
        raise ConfigError(
            f"engines.{settings.name}.host is {settings.host!r}; it is a host name without a path, like "
            '"models.example.com" or "https://{name}.models.example.com".'
        )
    return url


def _host(workload: Workload) -> str:
    return urlsplit(external_url(workload.settings, workload.name)).hostname or ""


def _metadata(workload: Workload) -> dict[str, Any]:
    return {
        "name": object_name(workload.name),
        "namespace": workload.namespace,
        "labels": labels(workload.name, workload.owner, workload.number),
        "annotations": {"nbdeploy.dev/owner": workload.owner, "nbdeploy.dev/notebook": workload.notebook},
        "ownerReferences": reference(workload.name, workload.uid),
    }


def _secret(secret: str, whose: tuple[str, str, str, str], values: Mapping[str, str]) -> dict[str, Any]:
    name, namespace, uid, owner = whose
    metadata = {
        "name": secret,
        "namespace": namespace,
        "labels": labels(name, owner),
        "ownerReferences": reference(name, uid),
    }
    data = {variable: base64.b64encode(value.encode()).decode("ascii") for variable, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}


def _service_account(workload: Workload) -> dict[str, Any]:
    account: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(workload),
        "automountServiceAccountToken": False,  # a Replica has nothing to ask of the API server
    }
    if workload.settings.image_pull_secret:
        account["imagePullSecrets"] = [{"name": workload.settings.image_pull_secret}]
    return account


def _service(workload: Workload) -> dict[str, Any]:
    spec = {
        "type": "ClusterIP",
        "selector": selector(workload.name),
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "appProtocol": "http"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(workload), "spec": spec}


def _deployment(workload: Workload) -> dict[str, Any]:
    steps = {"maxSurge": 0, "maxUnavailable": 1} if workload.in_place else {"maxSurge": 1, "maxUnavailable": 0}
    spec: dict[str, Any] = {
        "progressDeadlineSeconds": 1800,  # a GPU node is added, the Image pulled, the model loaded
        "revisionHistoryLimit": 5,
        "minReadySeconds": 0,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": steps},
        "selector": {"matchLabels": selector(workload.name)},
        "template": template(workload),
    }
    if workload.replicas is not None:
        spec["replicas"] = workload.replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _metadata(workload), "spec": spec}


def _budget(workload: Workload) -> dict[str, Any]:
    spec = {
        "maxUnavailable": 1,  # a minAvailable of 1 would block the drain of a node for ever where there is one Replica
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": selector(workload.name)},
    }
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _metadata(workload), "spec": spec}


def _network_policy(workload: Workload) -> dict[str, Any]:
    users: dict[str, Any] = {"ports": [{"port": USERS_PORT, "protocol": "TCP"}]}
    if not external_url(workload.settings, workload.name):  # where a Gateway's or Ingress' pods are is not knowable
        users["from"] = [{"podSelector": {}}]
        if workload.from_namespaces:
            names = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": list(workload.from_namespaces)}
            users["from"].append({"namespaceSelector": {"matchExpressions": [names]}})
    spec = {
        "podSelector": {"matchLabels": selector(workload.name)},
        "policyTypes": ["Ingress"],
        "ingress": [users, {"ports": [{"port": PROBES_PORT, "protocol": "TCP"}]}],
    }
    metadata = _metadata(workload)
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _route(workload: Workload) -> dict[str, Any]:
    namespace, _, gateway = (workload.settings.gateway or "").rpartition("/")
    parent = {"name": gateway} | ({"namespace": namespace} if namespace else {})
    rule = {
        "backendRefs": [{"name": object_name(workload.name), "port": 80}],
        "timeouts": {"request": "0s"},  # none: the server keeps its own; some Gateways would end a request at 15 s
    }
    spec = {"parentRefs": [parent], "hostnames": [_host(workload)], "rules": [rule]}
    version = "gateway.networking.k8s.io/v1"
    return {"apiVersion": version, "kind": "HTTPRoute", "metadata": _metadata(workload), "spec": spec}


def _ingress(workload: Workload) -> dict[str, Any]:
    host = _host(workload)
    backend = {"service": {"name": object_name(workload.name), "port": {"name": "http"}}}
    spec: dict[str, Any] = {
        "ingressClassName": workload.settings.ingress_class,
        "rules": [{"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}],
    }
    if workload.settings.tls_secret:
        spec["tls"] = [{"hosts": [host], "secretName": workload.settings.tls_secret}]
    metadata = _metadata(workload)
    metadata["annotations"] |= {
        "nginx.ingress.kubernetes.io/proxy-body-size": _MAX_BODY,
        "nginx.ingress.kubernetes.io/proxy-read-timeout": str(math.ceil(workload.serving.timeout) + 10),
    }
    return {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": metadata, "spec": spec}
