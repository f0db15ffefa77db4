"""The test cluster is a real one: what the other tests rely on."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.running import GPUS, NODES, PATIENCE, PROGRAM, state

if TYPE_CHECKING:
    from tests.cluster.running import Cluster, Namespace

# The proxies of the nodes learn of a Service a moment after its pod is ready.
ASKS = """
import sys, time, urllib.request
for attempt in range(100):
    try:
        print(urllib.request.urlopen(sys.argv[1], timeout=20).status)
        break
    except OSError as error:
        print(error, file=sys.stderr)
        time.sleep(0.2)
else:
    sys.exit(1)
"""
READ, OWN = "get list watch", "get list watch create patch delete"
MAY = {
    "configmaps": OWN,
    "services": OWN,
    "serviceaccounts": OWN,
    "deployments.apps": OWN,
    "secrets": "get create patch delete",
    "poddisruptionbudgets.policy": "get list create patch delete",
    "networkpolicies.networking.k8s.io": "get list create patch delete",
    "replicasets.apps": READ,
    "pods": READ,
    "events": READ,
    "endpointslices.discovery.k8s.io": READ,
    "resourcequotas": "get list",
    "limitranges": "get list",
    "pods/log": "get",
    "pods/proxy": "get",
    "pods/portforward": "get create",
}
MAY_NOT = {
    "secrets": "list watch update",
    "pods": "create patch delete",
    "pods/exec": "get create",
    "pods/attach": "get create",
    "pods/ephemeralcontainers": "patch",
    "serviceaccounts/token": "create",
    "replicasets.apps": "create patch delete",
    "jobs.batch": "create",
    "roles.rbac.authorization.k8s.io": "get create bind escalate",
    "rolebindings.rbac.authorization.k8s.io": "get create",
    "resourcequotas": "create patch delete",
}
MAY_NOT_ANYWHERE = {
    "nodes": "get list patch",
    "namespaces": "list create delete",
    "customresourcedefinitions.apiextensions.k8s.io": "list create",
    "clusterroles.rbac.authorization.k8s.io": "list create",
}


def pod(image: str, *command: str) -> dict[str, Any]:
    """Return a pod's spec that Pod Security `restricted` takes."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "server",
                "image": image,
                "command": list(command),
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }


def named(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a core object with a label of its name."""
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def test_pod_is_reached_by_service_and_name(namespace: Namespace) -> None:
    """A pod on one node serves; one on the other reaches it by its name, and this machine by the Service's address."""
    web = pod(namespace.cluster.base_image, "python3", "-m", "http.server", "8080", "-d", "/usr/lib/python3.11/json")
    web["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    url = f"http://web.{namespace.name}.svc.cluster.local/decoder.py"
    asks = pod(namespace.cluster.base_image, "python3", "-c", ASKS, url)
    service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    web["nodeSelector"], asks["nodeSelector"] = {"kubernetes.io/hostname": "node1"}, {"kubernetes.io/hostname": "node2"}
    served = [named("Pod", "web", web), named("Service", "web", service)]
    namespace.kubectl("apply", "-f", "-", input="\n---\n".join(map(json.dumps, served)))
    namespace.kubectl("wait", "--for=condition=Ready", "pod/web", "--timeout=180s")
    namespace.kubectl("apply", "-f", "-", input=json.dumps(named("Pod", "asks", asks)))
    namespace.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/asks", "--timeout=180s")
    assert namespace.kubectl("logs", "asks").split()[-1] == "200"
    address = namespace.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
    with urllib.request.urlopen(f"http://{address}/decoder.py", timeout=20.0) as answer:
        assert answer.status == 200


def test_pod_security_refuses_root(namespace: Namespace) -> None:
    """A namespace of a test takes no pod that Pod Security `restricted` does not."""
    spec = {"containers": [{"name": "server", "image": namespace.cluster.base_image}]}
    with pytest.raises(pytest.fail.Exception, match='violates PodSecurity "restricted:latest"'):
        namespace.kubectl("apply", "-f", "-", input=json.dumps(named("Pod", "root", spec)))


def refused(namespace: Namespace, table: dict[str, str], where: str) -> set[str]:
    """Return the rows of a table that the user of a namespace may not do."""
    rows = [(verb, resource) for resource, verbs in table.items() for verb in verbs.split()]
    reviews = []
    for verb, resource in rows:
        front, _, group = resource.partition(".")
        plural, _, part = front.partition("/")
        asked = {"verb": verb, "group": group, "resource": plural, "subresource": part, "namespace": where}
        spec = {"user": namespace.user, "groups": ["system:authenticated"], "resourceAttributes": asked}
        reviews.append({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
    said = namespace.cluster.kubectl(
        "create", "-f", "-", "-o", 'jsonpath={.status.allowed}{"\\n"}', input="\n---\n".join(map(json.dumps, reviews))
    ).split()
    assert len(said) == len(rows)
    return {f"{verb} {resource}" for (verb, resource), allowed in zip(rows, said, strict=True) if allowed != "true"}


def every(table: dict[str, str]) -> set[str]:
    """Return all rows of a table."""
    return {f"{verb} {resource}" for resource, verbs in table.items() for verb in verbs.split()}


def test_the_role_allows_what_is_needed_and_no_more(namespace: Namespace) -> None:
    """The Role that nbdeploy prints: all that it does, nothing that reads others' secrets, runs in pods or leaves."""
    assert refused(namespace, MAY, namespace.name) == set()
    assert refused(namespace, MAY_NOT, namespace.name) == every(MAY_NOT)
    assert refused(namespace, MAY, "default") == every(MAY)
    assert refused(namespace, MAY_NOT_ANYWHERE, "") == every(MAY_NOT_ANYWHERE)


def test_kubeconfig_holds_only_the_service_account(namespace: Namespace) -> None:
    """Who deploys in tests is the service account: its own kubeconfig lists its Deployments and no Secrets."""
    mine = ("--kubeconfig", str(namespace.kubeconfig))
    assert namespace.cluster.kubectl(*mine, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}") == (
        namespace.user
    )
    assert json.loads(namespace.cluster.kubectl(*mine, "get", "deployments", "-o", "json"))["items"] == []
    with pytest.raises(pytest.fail.Exception, match="Forbidden"):
        namespace.cluster.kubectl(*mine, "get", "secrets")


def test_nodes_and_gpus(cluster: Cluster) -> None:
    """The nodes that tests count on, and the GPUs that the first claims to have."""
    nodes = {node["metadata"]["name"]: node["status"]["allocatable"] for node in cluster.get("nodes")["items"]}
    assert {f"node{number + 1}" for number in range(NODES)} <= set(nodes)
    assert nodes["node1"]["nvidia.com/gpu"] == str(GPUS)


def test_up_again_changes_nothing(cluster: Cluster) -> None:
    """`cluster up` for a cluster that is up starts no server again."""
    pids = {file.name: file.read_text(encoding="utf-8") for file in (state() / "pid").iterdir()}
    subprocess.run([PROGRAM, "up", str(NODES)], check=True, timeout=PATIENCE)
    assert {file.name: file.read_text(encoding="utf-8") for file in (state() / "pid").iterdir()} == pids
