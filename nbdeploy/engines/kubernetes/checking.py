"""What `nbdeploy cluster check` finds: is all there that a deploy to this cluster needs?"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nbdeploy import environment
from nbdeploy.engines.kubernetes import access, capacity, preflight
from nbdeploy.engines.kubernetes.client import Asked, Client, ForbiddenError
from nbdeploy.engines.kubernetes.publish import repository
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError, NbdeployError, RegistryError
from nbdeploy.oci.registry import Registry
from nbdeploy.oci.transport import without_login

OK, MISSING, NOTE = "ok", "missing", "note"
_VIOLATES = re.compile(r'would violate PodSecurity "(\w+):')


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        check: what was looked at.
        state: "ok", "missing" (a deploy will fail) or "note" (good to know).
        words: what was found, and for what is missing the next step.
    """

    check: str
    state: str
    words: str

    def to_json(self) -> dict[str, str]:
        """Return it as plain data."""
        return {"check": self.check, "state": self.state, "detail": self.words}


def rows(settings: ClusterSettings) -> Iterator[Row]:
    """Yield what is found, in a fixed order, each as soon as it and those before it are known.

    Where the cluster cannot be reached, or does not know us, the rest of its checks are left out.

    Args:
        settings: of the engine.
    """
    elsewhere = (("registry push", _push), ("base image", _base))
    inside: tuple[tuple[str, _Check], ...] = (
        ("access", _access),
        *elsewhere,
        ("registry pull", _pull),
        ("GPUs", _gpus),
        ("autoscaling", _autoscaling),
        ("reach", _reach),
        ("pod security", _pod_security),
        ("quota", _quota),
        ("network", _network),
    )
    with contextlib.ExitStack() as stack:
        try:
            client = Client.connect(settings)
            stack.callback(client.close)
            first = _cluster(client, settings)
        except NbdeployError as error:
            client, first = None, Row("cluster", MISSING, str(error))
        yield first
        todo = inside if client is not None and first.state == OK else elsewhere
        pool = stack.enter_context(ThreadPoolExecutor(len(inside), thread_name_prefix="nbdeploy-check"))
        yield from pool.map(lambda one: _row(one[0], one[1], client, settings), todo)


_Check = Callable[[Any, ClusterSettings], Row]


def _row(title: str, check: _Check, client: Client | None, settings: ClusterSettings) -> Row:
    try:
        found = check(client, settings)
    except ForbiddenError as error:  # who lacks one right mostly lacks more: the Role to paste is told once
        words = str(error) if check is _access else f"unknown, a right is missing: {_first(error)}. See access"
        found = Row(title, MISSING if check is _access else NOTE, words)
    except (NbdeployError, OSError) as error:
        found = Row(title, MISSING, str(error))
    return Row(title, found.state, found.words)


def _first(error: ForbiddenError) -> str:
    """Return what is forbidden, without the Role that would allow it."""
    return str(error).partition(". Whoever")[0].partition("\n")[0].rstrip(".")


def _cluster(client: Client, _settings: ClusterSettings) -> Row:
    version = (client.ask("GET", "/version", Asked("get", "", "version")) or {}).get("gitVersion", "?")
    place = f"context {client.context}" if client.context else "in the cluster"
    who = access.whoami(client)
    return Row(
        "cluster", OK, f"Kubernetes {version} at {client.server}, {place}, namespace {client.namespace}, as {who}"
    )


def _access(client: Client, settings: ClusterSettings) -> Row:
    wanted = access.needed(settings, outside=not client.in_cluster)
    try:
        access.check(client, settings)
    except ForbiddenError as error:
        if settings.namespace and access.missing(client, wanted) == wanted:
            place = f"engines.{settings.name}.namespace is {settings.namespace!r}"
            raise ForbiddenError(f"{place}, where you may do nothing: is it spelt right? If it is: {error}") from error
        raise
    return Row("", OK, f"all {len(wanted)} rules of the Role are granted in {client.namespace}")


def _push(_client: Any, settings: ClusterSettings) -> Row:
    place = preflight.Place(settings)
    to = preflight.target(place, "nbdeploy-check")
    with contextlib.closing(Registry(to.host)) as registry:
        try:
            preflight.push_begins(place, to, registry)
        except RegistryError as error:
            if not (preflight.unmade(to) and preflight.is_absent(error)):
                raise
            words = f"{to.host} is there and knows you, and wants the repository of each Endpoint made before a push"
            return Row("", NOTE, f"{words}: {preflight.unmade(repository(settings, 'endpoint'))}")
    return Row("", OK, f"{to.host} lets you begin a push to {to.repository} (nothing was left there)")


def _base(_client: Any, settings: ClusterSettings) -> Row:
    place = preflight.Place(settings)
    name = preflight.base_reference(place)
    with contextlib.closing(Registry(name.host)) as registry:
        found = preflight.base_there(place, registry)
    size = sum(layer.size for layer in found.layers) / 1e6
    return Row("", OK, f"{name} for {settings.platform}, Python {environment.minor()}, {size:.0f} MB")


def _pull(client: Client, settings: ClusterSettings) -> Row:
    try:
        host = repository(settings, "x").host
    except NbdeployError:
        return Row("", NOTE, "unknown until there is a registry to push to")
    name = settings.image_pull_secret
    if not name:
        return Row("", NOTE, f"nodes pull from {host} without a password; else set image_pull_secret in the settings")
    found = client.get("Secret", name)
    if found is None:
        return Row(
            "",
            MISSING,
            f"There is no Secret {name} in {client.namespace}, with which nodes are to pull from {host}. Make it with "
            f"kubectl -n {client.namespace} create secret docker-registry {name} --docker-server={host} "
            "--docker-username=… --docker-password=…",
        )
    if found.get("type") != "kubernetes.io/dockerconfigjson":
        return Row(
            "", MISSING, f"The Secret {name} is of type {found.get('type')}, not kubernetes.io/dockerconfigjson."
        )
    return Row("", OK, f"nodes pull from {host} with the Secret {name}")


def _gpus(client: Client, _settings: ClusterSettings) -> Row:
    try:
        nodes = client.ask("GET", "/api/v1/nodes", Asked("list", "", "nodes"), query={"resourceVersion": "0"}) or {}
    except ForbiddenError:
        return Row(
            "",
            NOTE,
            "unknown: nodes may not be listed. Not needed; a ClusterRole with get and list on nodes would show them. "
            "A deploy with --gpu tells when there is none",
        )
    try:
        pods = client.ask("GET", "/api/v1/pods", Asked("list", "", "pods"), query={"resourceVersion": "0"})
    except ForbiddenError:
        pods = None
    words = capacity.gpus((nodes.get("items") or ()), None if pods is None else pods.get("items") or ())
    return Row("", OK, words) if words else Row("", NOTE, "no node has nvidia.com/gpu now")


def _autoscaling(client: Client, _settings: ClusterSettings) -> Row:
    groups = client.groups()
    parts = {
        "keda.sh": "KEDA",
        "custom.metrics.k8s.io": "custom metrics",
        "metrics.k8s.io": "metrics-server",
        "monitoring.coreos.com": "Prometheus operator",
    }
    found = [words for group, words in parts.items() if group in groups]
    if found:
        return Row("", OK, f"there: {', '.join(found)}")
    return Row("", NOTE, "no KEDA, no custom metrics, no metrics-server: nothing extra to scale with; none is needed")


def _reach(client: Client, settings: ClusterSettings) -> Row:
    if settings.gateway:
        group = "gateway.networking.k8s.io"
        namespace, _, name = settings.gateway.rpartition("/")
        path = f"/apis/{group}/v1/namespaces/{namespace or client.namespace}/gateways/{name}"
        return _routed(client, Asked("get", group, "gateways", name), path, f"Gateway {settings.gateway}")
    if settings.ingress_class:
        group = "networking.k8s.io"
        asked = Asked("get", group, "ingressclasses", settings.ingress_class)
        path = f"/apis/{group}/v1/ingressclasses/{settings.ingress_class}"
        return _routed(client, asked, path, f"IngressClass {settings.ingress_class}")
    where = "this cluster only" if client.in_cluster else "this machine, through a forwarder"
    return Row(
        "", OK, f"Endpoints are reached from {where}; gateway or ingress_class in the settings opens them to others"
    )


def _routed(client: Client, asked: Asked, path: str, what: str) -> Row:
    try:
        found = client.ask("GET", path, asked, absent=True)
    except ForbiddenError:
        return Row("", NOTE, f"{what} may not be looked at; a deploy shows whether it answers")
    if found is None:
        return Row(
            "", MISSING, f"There is no {what} in the cluster. Take its name from: kubectl get {asked.resource} -A"
        )
    return Row("", OK, f"{what} is there")


def _pod_security(client: Client, _settings: ClusterSettings) -> Row:
    path = f"/api/v1/namespaces/{client.namespace}"
    level = ""
    try:
        found = client.ask("GET", path, Asked("get", "", "namespaces", client.namespace)) or {}
        level = found["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce", "")
    except ForbiddenError:
        client.apply(_bold_pods(client.namespace), dry_run=True)
        level = next((match[1] for text in client.warnings if (match := _VIOLATES.search(text))), "")
    if not level:
        return Row("", OK, "nothing is enforced; nbdeploy's pods keep to the level restricted anyway")
    return Row("", OK, f"{level} is enforced; nbdeploy's pods keep to the level restricted")


def _bold_pods(namespace: str) -> dict[str, Any]:
    """Return a workload that no level but privileged lets pass; it is only tried."""
    labels = {"app.kubernetes.io/instance": "nbdeploy-access"}
    container = {"name": "server", "image": "none.invalid/none", "securityContext": {"privileged": True}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "nbdeploy-access", "namespace": namespace},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


def _quota(client: Client, _settings: ClusterSettings) -> Row:
    quotas, limits = client.list("ResourceQuota", fresh=True), client.list("LimitRange", fresh=True)
    words, full = capacity.quotas(quotas), capacity.used_up(quotas)
    told = "; ".join([*words, *capacity.limits(limits)])
    if full:
        return Row(
            "",
            MISSING,
            f"{told}. Used up: {', '.join(full)}; delete an Endpoint, or ask whoever runs the cluster for more",
        )
    return Row("", OK, told or "no ResourceQuota and no LimitRange")


def _network(client: Client, settings: ClusterSettings) -> Row:
    if not client.in_cluster:
        proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
        return Row("", NOTE, f"outside the cluster{f', HTTPS_PROXY is {without_login(proxy)}' if proxy else ''}")
    names = ["kubernetes.default.svc"]
    with contextlib.suppress(NbdeployError):
        names.append(repository(settings, "x").host.partition(":")[0])
    for name in names:
        try:
            socket.getaddrinfo(name, 443)
        except OSError as error:
            raise EngineError(
                f"The name {name} is not known in this pod ({error.strerror}): its DNS does not answer, or a "
                "NetworkPolicy does not let it ask. Port 53 to kube-system must be open."
            ) from error
    return Row("", OK, f"this pod knows {' and '.join(names)}")
