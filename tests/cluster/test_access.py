"""Rights are asked for before a build, in two requests, and what is missing can be pasted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest

from nbdeploy.engines.kubernetes import access, role
from nbdeploy.engines.kubernetes.client import Client, ForbiddenError
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError
from tests.cluster.running import Namespace
from tests.conftest import wait_until


def may(client: Client, verb: str, resource: str, group: str = "") -> bool:
    """Whether we have a right; one that was given or taken away is known a little later."""
    return not access.missing(client, [role.Rule(group, (resource,), (verb,))])


@pytest.fixture
def client(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client who may only what the Role allows."""
    monkeypatch.setenv("KUBECONFIG", str(namespace.kubeconfig))
    made = Client.connect(ClusterSettings())
    yield made
    made.close()


def test_the_printed_role_is_enough(client: Client) -> None:
    """With the Role that nbdeploy prints, the check passes in two requests and makes nothing."""
    access.check(client, ClusterSettings())
    assert client.requests == 2
    assert {one["metadata"]["name"] for one in client.list("ConfigMap", fresh=True)} <= {"kube-root-ca.crt"}


def test_what_is_missing_is_listed_and_can_be_pasted(client: Client, namespace: Namespace) -> None:
    """Of a smaller Role each missing verb is named; the Role printed, applied as it is, makes the check pass."""
    kept = [rule for rule in role.needed(outside=True) if rule.group != "apps" and "pods/log" not in rule.resources]
    kept.append(role.Rule("apps", ("deployments",), ("get", "list", "watch")))
    namespace.kubectl("delete", "role,rolebinding", "--all")
    namespace.cluster.kubectl("apply", "-f", "-", input=role.role_yaml(namespace.name, kept, subject=namespace.user))
    wait_until(lambda: not may(client, "create", "deployments", "apps") and may(client, "get", "deployments", "apps"))
    before = client.requests
    with pytest.raises(ForbiddenError) as caught:
        access.check(client, ClusterSettings())
    words = str(caught.value)
    assert client.requests - before <= 2
    assert f"{namespace.user} may not do everything in the namespace '{namespace.name}'" in words
    assert "create patch delete deployments" in words
    assert "get pods/log" in words
    assert "configmaps" not in words
    namespace.cluster.kubectl("apply", "-f", "-", input=words[words.index("apiVersion:") :])
    wait_until(lambda: may(client, "create", "deployments", "apps"))
    access.check(client, ClusterSettings())


def test_settings_decide_what_is_needed(client: Client) -> None:
    """A Gateway or an Ingress needs its own rule, port-forwarding only a notebook outside the cluster."""
    plain = access.needed(ClusterSettings(), outside=False)
    outside = access.needed(ClusterSettings(), outside=True)
    assert [rule.resources for rule in outside if rule not in plain] == [("pods/portforward",)]
    routed = ClusterSettings(gateway="infra/web", host="models.example.com")
    with pytest.raises(ForbiddenError, match="httproutes"):
        access.check(client, routed)


def test_missing_namespace(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace that is not there is found out although every right is there."""
    monkeypatch.setenv("KUBECONFIG", str(namespace.cluster.kubeconfig))
    client = Client.connect(ClusterSettings(namespace="absent"))
    with pytest.raises(EngineError, match="namespace 'absent' does not exist"):
        access.check(client, ClusterSettings())
    client.close()


def test_rights_by_name_do_not_count(client: Client, namespace: Namespace) -> None:
    """A rule for one named object is no right to all of that kind."""
    rules = [dataclasses.replace(rule) for rule in role.needed(outside=True) if "pods" not in rule.resources]
    namespace.kubectl("delete", "role,rolebinding", "--all")
    text = role.role_yaml(namespace.name, rules, subject=namespace.user)
    named = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"], "resourceNames": ["one"]}
    text = text.replace("rules:\n", f"rules:\n- {json.dumps(named)}\n", 1)
    namespace.cluster.kubectl("apply", "-f", "-", input=text)
    wait_until(lambda: may(client, "get", "deployments", "apps") and not may(client, "list", "pods"))
    with pytest.raises(ForbiddenError, match="get list watch pods, events"):
        access.check(client, ClusterSettings())
