"""A notebook in a pod: its service account is the login, Services are the way in, and nothing else is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.kubernetes.role import needed, role_yaml
from tests.conftest import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.running import Cluster, Namespace

HOST = "10.97.0.1"  # of this machine, for pods; see tests/cluster/cluster
RELAY = Path(__file__).with_name("relay.py")
PROJECT = Path(__file__).parents[2]
CERTIFICATES = Path("/etc/ssl/certs")
ME = "/home/me"  # of the pod: the only place beside /tmp that can be written to
PASSED_ON = (  # how packages are had here, as far as it names no folder of this machine
    "UV_INDEX",
    "UV_DEFAULT_INDEX",
    "UV_EXTRA_INDEX",
    "UV_NATIVE_TLS",
    "UV_SYSTEM_CERTS",
    "SSL_CERT_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
STEPS_SECONDS = 480.0  # for cells
# A virtual environment as a notebook has, that holds what the tests' own environment holds.
START = f"""
python3 -m venv --without-pip {ME}/venv
printf '%s\\n' {PROJECT} {PROJECT}/server 'import site; site.addsitedir("{sysconfig.get_path("purelib")}")' \\
  > {ME}/venv/lib/python3.11/site-packages/all.pth
touch {ME}/ready
exec python3 -c 'import signal; signal.pause()'
"""
DEPLOYS = """
%load_ext nbdeploy
def predict(x: int) -> int:
    print("asked for", x, flush=True)
    return x + 1
endpoint = %deploy predict --name adder --engine cluster --cpu 0.05 --memory 256Mi
print("answer", endpoint(x=41), endpoint.url)
"""
MANAGES = """
import nbdeploy
from nbdeploy.cli import main
adder = nbdeploy.connect("adder")
print("answer", adder(x=1), adder.map([{"x": 2}, {"x": 3}]), adder.url)
for line in ("ls", "status", "logs", "metrics", 'call {"x":5}', "scale --min 2", "delete"):
    print("$", line)
    command, *options = line.split()
    main([command, *(["adder"] if command != "ls" else []), *options], standalone_mode=False)
print("$", nbdeploy.endpoints())
"""


@dataclass(frozen=True)
class Notebook:
    """A running pod to work in.

    Attributes:
        namespace: its own, where no Endpoint is.
        cluster: its administrator.
    """

    namespace: str
    cluster: Cluster

    @property
    def user(self) -> str:
        """Return the name of its service account."""
        return f"system:serviceaccount:{self.namespace}:notebook"

    def run(self, *command: str, seconds: float = DEADLINE) -> str:
        """Run a program of the virtual environment and return what it printed; a failure fails the test."""
        return self.cluster.kubectl(
            "exec", "-n", self.namespace, "notebook", "-c", "server", "--", *command, seconds=seconds
        )

    def cells(self, code: str) -> str:
        """Run cells in a fresh IPython and return what they printed."""
        return self.run("python", "-m", "IPython", "--colors=NoColor", "-c", code, seconds=STEPS_SECONDS)


@contextmanager
def registry_for_pods() -> Iterator[int]:
    """Give a port of this machine at which pods reach the registry."""
    command = [sys.executable, str(RELAY), HOST, "0", "127.0.0.1", "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as relay:
        try:
            assert relay.stdout is not None
            yield int(relay.stdout.readline())
        finally:
            relay.kill()


def pod(cluster: Cluster, registry: int) -> dict[str, Any]:
    """Return a pod like a notebook's: a user without rights on the node, a home, the tests' own packages."""
    passed = {key: value for key, value in os.environ.items() if key.upper().startswith(PASSED_ON)}
    variables = {
        **passed,
        "HOME": ME,
        "PATH": f"{ME}/venv/bin:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    folders = {str(folder) for folder in (PROJECT, Path(sysconfig.get_path("purelib")).parents[2], CERTIFICATES)}
    mounted = [
        {"name": f"host-{number}", "mountPath": folder, "readOnly": True} for number, folder in enumerate(folders)
    ]
    volumes = [{"name": f"host-{number}", "hostPath": {"path": folder}} for number, folder in enumerate(folders)]
    server = {
        "name": "server",
        "image": cluster.base_image,
        "command": ["sh", "-ec", START],
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "workingDir": ME,
        "volumeMounts": [
            *mounted,
            {"name": "home", "mountPath": ME},
            {"name": "settings", "mountPath": f"{ME}/.config"},
        ],
        "readinessProbe": {"exec": {"command": ["cat", f"{ME}/ready"]}, "periodSeconds": 1},
    }
    registry_here = {
        "name": "registry",
        "image": cluster.base_image,
        "command": ["python3", "-c", RELAY.read_text(encoding="utf-8"), "127.0.0.1", "5000", HOST, str(registry)],
    }
    return {
        "serviceAccountName": "notebook",
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "containers": [server, registry_here],
        "volumes": [
            *volumes,
            {"name": "home", "emptyDir": {}},
            {
                "name": "settings",
                "configMap": {"name": "settings", "items": [{"key": "c", "path": "nbdeploy/config.toml"}]},
            },
        ],
    }


@pytest.fixture
def notebook(namespace: Namespace, tmp_path: Path) -> Iterator[Notebook]:
    """A notebook's pod in a namespace of its own; its service account may nothing, and nobody may in the Endpoints'."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the base image has Python 3.11, and the pod borrows the packages of this one")
    cluster = namespace.cluster
    namespace.kubectl("delete", "role,rolebinding", "--all")
    made = Notebook(f"{namespace.name}-notebooks", cluster)
    namespace.configure(tmp_path)
    settings = (tmp_path / "nbdeploy" / "config.toml").read_text(encoding="utf-8")
    privileged = {"pod-security.kubernetes.io/enforce": "privileged"}  # for the folders of the node
    with registry_for_pods() as port:
        rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("Namespace", {"name": made.namespace, "labels": privileged}, {}),
            ("ServiceAccount", {"name": "notebook"}, {}),
            ("ConfigMap", {"name": "settings"}, {"data": {"c": settings}}),
            ("Pod", {"name": "notebook"}, {"spec": pod(cluster, port)}),
        ]
        for kind, metadata, content in rows:
            where = {} if kind == "Namespace" else {"namespace": made.namespace}
            one = {"apiVersion": "v1", "kind": kind, "metadata": {**metadata, **where}, **content}
            cluster.kubectl("apply", "-f", "-", input=json.dumps(one))
        cluster.kubectl(
            "wait", "-n", made.namespace, "--for=condition=Ready", "pod/notebook", "--timeout=180s", seconds=200.0
        )
        yield made
        cluster.kubectl("delete", "namespace", made.namespace, "--wait=false")


@pytest.mark.timeout(1500)  # packages are downloaded anew
def test_from_a_pod_to_a_url(notebook: Notebook, namespace: Namespace) -> None:
    """With the Role that it asks for and nothing else, a notebook's pod deploys, calls by DNS name, and manages."""
    told = notebook.run("sh", "-c", "python -m nbdeploy cluster check 2>&1 || true")
    assert f"in the cluster, namespace {namespace.name}, as {notebook.user}" in told
    role = role_yaml(namespace.name, needed(outside=False), subject=notebook.user)
    assert [line for line in role.splitlines() if line not in told] == []
    namespace.kubectl("apply", "-f", "-", input=role)

    url = f"http://nbd-adder.{namespace.name}.svc"
    assert f"answer 42 {url}\n" in notebook.cells(DEPLOYS)
    assert allowed_callers(namespace) == [{"podSelector": {}}, named(notebook.namespace)]

    first, listed, status, logs, metrics, call, scale, deleted, last = notebook.cells(MANAGES).split("$ ")
    assert f"answer 2 [3, 4] {url}\n" in first
    assert url in listed
    assert "1 of 1 ready" in status
    assert "asked for 41" in logs
    assert 'nbdeploy_requests_total{code="200"} 4' in metrics
    assert call.split()[-1] == "6"
    assert "2 of 2 Replicas ready" in scale
    assert f"{namespace.cluster.registry}/team/adder@sha256:" in deleted
    assert last == "[]\n"
    assert namespace.cluster.get("-n", namespace.name, "pods,services,networkpolicies")["items"] == []


def allowed_callers(namespace: Namespace) -> list[dict[str, Any]]:
    """Return from where the only NetworkPolicy lets users in (the test cluster's network does not enforce it)."""
    [policy] = namespace.cluster.get("-n", namespace.name, "networkpolicies")["items"]
    users: list[dict[str, Any]] = policy["spec"]["ingress"][0]["from"]
    return users


def named(namespace: str) -> dict[str, Any]:
    """Return the peer of a NetworkPolicy that is all pods of one namespace."""
    name = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": [namespace]}
    return {"namespaceSelector": {"matchExpressions": [name]}}
