"""The Role that nbdeploy needs in the namespace of the Endpoints, and nothing more; printed ready to paste."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

_READ = ("get", "list", "watch")
_OWN = ("get", "list", "watch", "create", "patch", "delete")  # create beside patch: an apply may make the object
_UNWATCHED = ("get", "list", "create", "patch", "delete")
_NAME = "nbdeploy"  # of the whole Role and its binding


@dataclass(frozen=True)
class Rule:
    """One rule of a Role; a resource may carry its subresource, as in "pods/log"."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the rule as Kubernetes writes it."""
        return {"apiGroups": [self.group], "resources": list(self.resources), "verbs": list(self.verbs)}


RULES = (
    Rule("", ("configmaps", "services", "serviceaccounts"), _OWN),
    Rule("", ("secrets",), ("get", "create", "patch", "delete")),  # by name; those of others are never listed
    Rule("", ("pods", "events"), _READ),
    Rule("", ("pods/log", "pods/proxy"), ("get",)),
    Rule("", ("resourcequotas", "limitranges"), ("get", "list")),
    Rule("apps", ("deployments",), _OWN),
    Rule("apps", ("replicasets",), _READ),
    Rule("discovery.k8s.io", ("endpointslices",), _READ),
    Rule("policy", ("poddisruptionbudgets",), _UNWATCHED),
    Rule("networking.k8s.io", ("networkpolicies",), _UNWATCHED),
)
"""What every use of nbdeploy needs; `needed` adds what depends on the settings."""

_FORWARD = Rule("", ("pods/portforward",), ("get", "create"))  # get: over websockets; create: over SPDY
_GATEWAY = Rule("gateway.networking.k8s.io", ("httproutes",), _UNWATCHED)
_INGRESS = Rule("networking.k8s.io", ("ingresses",), _UNWATCHED)


def needed(*, outside: bool, gateway: bool = False, ingress: bool = False) -> tuple[Rule, ...]:
    """Return the rules for one set of settings.

    Args:
        outside: the notebook runs outside the cluster, and reaches Endpoints through the API server.
        gateway: Endpoints are reached through a Gateway.
        ingress: Endpoints are reached through an Ingress.
    """
    wanted = ((outside, _FORWARD), (gateway, _GATEWAY), (ingress, _INGRESS))
    return RULES + tuple(rule for on, rule in wanted if on)


def rule_for(verb: str, group: str, resource: str) -> Rule:
    """Return the rule of nbdeploy that one request falls under, for this resource alone; of a foreign request, itself.

    Args:
        verb: of the request, like "patch".
        group: "" for the core group.
        resource: with its subresource, like "pods/log".
    """
    for rule in (*RULES, _FORWARD, _GATEWAY, _INGRESS):
        if rule.group == group and resource in rule.resources and verb in rule.verbs:
            return dataclasses.replace(rule, resources=(resource,))
    return Rule(group, (resource,), (verb,))


def missing(rules: Iterable[Rule], refused: Collection[tuple[str, str, str]]) -> tuple[Rule, ...]:
    """Return of the rules only what was refused, as (verb, group, resource with its subresource)."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for rule in rules:
        for resource in rule.resources:
            verbs = tuple(verb for verb in rule.verbs if (verb, rule.group, resource) in refused)
            if verbs:
                found.setdefault((rule.group, verbs), []).append(resource)
    return tuple(Rule(group, tuple(resources), verbs) for (group, verbs), resources in found.items())


def role_yaml(namespace: str, rules: Iterable[Rule] = RULES, *, subject: str = "") -> str:
    """Return a Role, and its RoleBinding where a subject is given, as YAML to paste into `kubectl apply -f -`.

    Some rules alone get a Role name of their own: pasted, they add to the Role that is there and replace nothing.

    Args:
        namespace: of the Endpoints.
        rules: what it allows.
        subject: user as the API server names it, "system:serviceaccount:NAMESPACE:NAME" for a service account.
    """
    rules = tuple(rules)
    name = _NAME if set(RULES) <= set(rules) else f"{_NAME}-{hashlib.sha256(repr(rules).encode()).hexdigest()[:6]}"
    lines = [*_head("Role", namespace, name), "rules:"]
    for rule in rules:
        resources, verbs = json.dumps(rule.resources), json.dumps(rule.verbs)
        lines.append(f"- {{apiGroups: [{json.dumps(rule.group)}], resources: {resources}, verbs: {verbs}}}")
    if subject:
        lines += ["---", *_head("RoleBinding", namespace, name)]
        lines.append(f"roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: {name}}}")
        lines += ["subjects:", f"- {_subject(subject)}"]
    return "\n".join(lines) + "\n"


def _head(kind: str, namespace: str, name: str) -> list[str]:
    return [
        "apiVersion: rbac.authorization.k8s.io/v1",
        f"kind: {kind}",
        f"metadata: {{name: {name}, namespace: {json.dumps(namespace)}}}",
    ]


def _subject(subject: str) -> str:
    parts = subject.split(":")
    if parts[:2] == ["system", "serviceaccount"] and len(parts) == 4:  # noqa: PLR2004 - system:serviceaccount:NS:NAME
        return f"{{kind: ServiceAccount, namespace: {json.dumps(parts[2])}, name: {json.dumps(parts[3])}}}"
    return f"{{apiGroup: rbac.authorization.k8s.io, kind: User, name: {json.dumps(subject)}}}"
