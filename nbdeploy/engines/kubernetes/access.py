"""May we? Asked before anything is built, so that a missing right costs no time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nbdeploy.engines.kubernetes import role
from nbdeploy.engines.kubernetes.client import Client, ForbiddenError
from nbdeploy.engines.kubernetes.settings import ClusterSettings

_AT_ONCE = 8  # reviews under way
_PROBE = "nbdeploy-access"  # an object that is only tried, never made


@dataclass(frozen=True)
class Right:
    """One thing to do with one resource; `resource` carries its subresource, like "pods/log"."""

    verb: str
    group: str
    resource: str


def needed(settings: ClusterSettings, *, outside: bool) -> tuple[role.Rule, ...]:
    """Return the rules that these settings need; `outside`: for a notebook that does not run in the cluster."""
    return role.needed(outside=outside, gateway=bool(settings.gateway), ingress=bool(settings.ingress_class))


def check(client: Client, settings: ClusterSettings) -> None:
    """Raise EngineError where we lack a right, or the namespace is missing; two requests where all is well.

    The error lists what is missing and the Role to paste.
    """
    lacking = missing(client, needed(settings, outside=not client.in_cluster))
    if lacking:
        raise ForbiddenError(told(client, lacking))
    # a review says yes in a namespace that does not exist; an apply that is only tried does not
    probe = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": _PROBE, "namespace": client.namespace}}
    client.apply(probe, dry_run=True)


def missing(client: Client, rules: Iterable[role.Rule]) -> tuple[role.Rule, ...]:
    """Return of the rules what the cluster does not allow us: one request, and one for each doubt."""
    rules = tuple(rules)
    rights = [Right(verb, rule.group, name) for rule in rules for name in rule.resources for verb in rule.verbs]
    answer = client.review("authorization.k8s.io/v1", "SelfSubjectRulesReview", {"namespace": client.namespace})
    allowed = answer.get("resourceRules") or ()
    refused = [right for right in rights if not any(_covers(rule, right) for rule in allowed)]
    if answer.get("incomplete") and refused:  # some authorisers cannot list what they allow, but answer each question
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nbdeploy-access") as pool:
            answers = pool.map(lambda right: _allowed(client, right), refused)
            refused = [right for right, yes in zip(refused, answers, strict=True) if not yes]
    return role.missing(rules, {(right.verb, right.group, right.resource) for right in refused})


def told(client: Client, lacking: Iterable[role.Rule]) -> str:
    """Return in words what is missing, and the Role that would allow it."""
    lacking = tuple(lacking)
    user = whoami(client)
    named = "; ".join(f"{' '.join(rule.verbs)} {', '.join(rule.resources)}" for rule in lacking)
    return (
        f"{user or 'You'} may not do everything in the namespace {client.namespace!r} that a deploy needs; missing: "
        f"{named}. Whoever runs the cluster allows it with kubectl apply -f - and:\n"
        f"{role.role_yaml(client.namespace, lacking, subject=user)}"
    )


def whoami(client: Client) -> str:
    """Return who the cluster takes us for, "" where it does not tell."""
    answer = client.review("authentication.k8s.io/v1", "SelfSubjectReview", {})
    return str((answer.get("userInfo") or {}).get("username", ""))


def _covers(rule: Mapping[str, Any], right: Right) -> bool:
    resources = rule.get("resources") or ()
    sub = right.resource.partition("/")[2]
    return (
        not rule.get("resourceNames")
        and not {"*", right.verb}.isdisjoint(rule.get("verbs") or ())
        and not {"*", right.group}.isdisjoint(rule.get("apiGroups") or ())
        and not {"*", right.resource, f"*/{sub}" if sub else "*"}.isdisjoint(resources)
    )


def _allowed(client: Client, right: Right) -> bool:
    resource, _, subresource = right.resource.partition("/")
    attributes = {
        "namespace": client.namespace,
        "verb": right.verb,
        "group": right.group,
        "resource": resource,
        "subresource": subresource,
    }
    answer = client.review("authorization.k8s.io/v1", "SelfSubjectAccessReview", {"resourceAttributes": attributes})
    return bool(answer.get("allowed"))
