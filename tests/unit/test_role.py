from __future__ import annotations

from typing import Any

import pytest
import yaml

from nbdeploy.engines.kubernetes.role import RULES, Rule, missing, needed, role_yaml, rule_for

SECRETS = Rule("", ("secrets",), ("get", "create", "patch", "delete"))


def _documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def test_role_yaml_is_the_rules() -> None:
    """What is printed is a Role of exactly the rules, in the namespace asked for."""
    (role,) = _documents(role_yaml("models"))
    assert role["kind"] == "Role"
    assert role["metadata"] == {"name": "nbdeploy", "namespace": "models"}
    assert role["rules"] == [rule.to_json() for rule in RULES]


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (
            "system:serviceaccount:hub:jupyter",
            {"kind": "ServiceAccount", "namespace": "hub", "name": "jupyter"},
        ),
        (
            'ada "the first": x@y',
            {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": 'ada "the first": x@y'},
        ),
    ],
)
def test_role_yaml_binds_the_subject(subject: str, expected: dict[str, str]) -> None:
    """A service account or a user, however it is named, is bound to the Role."""
    _, binding = _documents(role_yaml("models", subject=subject))
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "nbdeploy"}
    assert binding["subjects"] == [expected]
    assert binding["metadata"]["namespace"] == "models"


def test_least_privilege() -> None:
    """Nothing is listed among Secrets, nothing is escalated, and nothing is allowed by wildcards."""
    rules = needed(outside=True, gateway=True, ingress=True)
    assert SECRETS in rules
    granted = {(verb, resource) for rule in rules for verb in rule.verbs for resource in rule.resources}
    assert not granted & {("list", "secrets"), ("create", "pods"), ("delete", "pods"), ("create", "pods/exec")}
    assert not any("*" in (rule.group, *rule.resources, *rule.verbs) for rule in rules)
    assert not any("role" in resource or "node" in resource for _, resource in granted)


def test_what_settings_add() -> None:
    """Forwarding, HTTPRoutes and Ingresses are asked for only where the settings need them."""
    assert needed(outside=False) == RULES
    assert {r for rule in needed(outside=True)[len(RULES) :] for r in rule.resources} == {"pods/portforward"}
    more = needed(outside=False, gateway=True, ingress=True)[len(RULES) :]
    assert {r for rule in more for r in rule.resources} == {"httproutes", "ingresses"}


def test_missing_names_only_what_lacks() -> None:
    """Of all rules only the refused verbs and resources are left, and their Role replaces no other."""
    refused = {("create", "", "secrets"), ("patch", "", "secrets"), ("get", "", "pods/log"), ("get", "", "pods/proxy")}
    lacking = missing(RULES, refused)
    assert lacking == (Rule("", ("secrets",), ("create", "patch")), Rule("", ("pods/log", "pods/proxy"), ("get",)))
    (role,) = _documents(role_yaml("models", lacking))
    assert role["metadata"]["name"].startswith("nbdeploy-")
    assert missing(RULES, set()) == ()


def test_rule_for_a_refused_request() -> None:
    """A refused request leads to the whole rule for that resource; an unknown one to just itself."""
    assert rule_for("patch", "", "secrets") == SECRETS
    assert rule_for("get", "", "pods/log") == Rule("", ("pods/log",), ("get",))
    assert rule_for("create", "", "pods/portforward").verbs == ("get", "create")
    assert rule_for("list", "", "nodes") == Rule("", ("nodes",), ("list",))
