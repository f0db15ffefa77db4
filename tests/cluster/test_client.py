"""The client against a real API server, with the rights of the printed Role and no others."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbdeploy.engines.kubernetes import access, role
from nbdeploy.engines.kubernetes.client import ChangedError, Client, ConflictError, ForbiddenError
from nbdeploy.engines.kubernetes.kinds import KINDS, path_of
from nbdeploy.engines.kubernetes.refusals import Asked
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError
from tests.cluster.running import Cluster, Namespace
from tests.conftest import DEADLINE, wait_until

LABELS = {"app.kubernetes.io/instance": "web", "app.kubernetes.io/managed-by": "nbdeploy"}
SELECTOR = ",".join(f"{key}={value}" for key, value in LABELS.items())
SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        size = int(self.path.strip("/"))
        head = f"HTTP/1.1 200 OK\\r\\nContent-Length: {size}\\r\\n\\r\\n".encode()
        self.wfile.write(head + b"x" * size)
        print("served", size, flush=True)
        if size == 13:
            import os; os._exit(0)
    def log_message(self, *_): pass
print("listening", flush=True)
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""


def config_map(name: str, **data: str) -> dict[str, Any]:
    """Return a ConfigMap with our labels."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": LABELS}, "data": data}


def workload(cluster: Cluster, code: str = SERVER) -> dict[str, Any]:
    """Return a Deployment of one pod that Pod Security `restricted` lets pass."""
    container = {
        "name": "server",
        "image": cluster.base_image,
        "command": ["python3", "-u", "-c", code],
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 1}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "labels": LABELS},
        "spec": {"selector": {"matchLabels": LABELS}, "template": {"metadata": {"labels": LABELS}, "spec": pod}},
    }


def connect(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Return a client with the rights of the namespace's account."""
    monkeypatch.setenv("KUBECONFIG", str(namespace.kubeconfig))
    return Client.connect(ClusterSettings())


def may(client: Client, verb: str, resource: str, group: str = "") -> bool:
    """Whether we have a right; one that was given or taken away is known a little later."""
    return not access.missing(client, [role.Rule(group, (resource,), (verb,))])


@pytest.fixture
def client(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client who may only what the Role allows; it leaves no thread behind."""
    before = set(threading.enumerate())
    made = connect(namespace, monkeypatch)
    yield made
    made.close()
    wait_until(lambda: not [one for one in set(threading.enumerate()) - before if "nbdeploy" in one.name])
    assert made._streams == set()


def serving(client: Client, cluster: Cluster) -> str:
    """Bring the server up and return its pod."""
    client.apply(workload(cluster))

    def ready() -> str:
        for pod in client.list("Pod", SELECTOR):
            conditions = {row["type"]: row["status"] for row in pod["status"].get("conditions", ())}
            if conditions.get("Ready") == "True":
                return str(pod["metadata"]["name"])
        return ""

    return str(wait_until(ready))


def test_objects_come_and_go(client: Client) -> None:
    """What is applied can be got, listed by label and deleted; what is not there is None, empty, False."""
    assert client.get("ConfigMap", "a") is None
    assert not client.delete("ConfigMap", "a")
    made = client.apply(config_map("a", x="1"))
    assert (client.get("ConfigMap", "a") or {})["data"] == {"x": "1"}
    assert [one["data"] for one in client.list("ConfigMap", SELECTOR, fresh=True)] == [{"x": "1"}]
    (light,) = client.list("ConfigMap", SELECTOR, metadata_only=True, fresh=True)
    assert light["metadata"]["name"] == "a"
    assert "data" not in light
    assert not client.delete("ConfigMap", "a", uid="another")
    assert client.delete("ConfigMap", "a", uid=made["metadata"]["uid"])
    wait_until(lambda: client.get("ConfigMap", "a") is None)


def test_what_owns_nothing_goes_at_once(client: Client) -> None:
    """No garbage collector is waited for: the object is gone when `delete` returns, and may be made again."""
    for _ in range(10):
        client.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a", "labels": LABELS}})
        assert client.delete("Secret", "a")
        assert client.get("Secret", "a") is None


def test_kinds_that_the_cluster_lacks(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kind that is not installed there are no objects; applying one says what is missing."""
    unknown = dataclasses.replace(KINDS["HTTPRoute"], version="v9")  # v1 may be there: tests/cluster/test_routes.py
    monkeypatch.setitem(KINDS, "HTTPRoute", unknown)
    monkeypatch.setenv("KUBECONFIG", str(namespace.cluster.kubeconfig))  # a right that is missing would be told first
    client = Client.connect(ClusterSettings(namespace=namespace.name))
    assert client.list("HTTPRoute") == []
    assert client.get("HTTPRoute", "a") is None
    route = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "a"}}
    with pytest.raises(EngineError, match="does not know httproutes"):
        client.apply(route)
    client.close()


def test_apply_onto_a_version(client: Client) -> None:
    """An apply onto a version succeeds once; a second one onto the same version is told that somebody was faster."""
    version = client.apply(config_map("a", x="1"))["metadata"]["resourceVersion"]
    locked = config_map("a", x="2")
    locked["metadata"] = {**locked["metadata"], "resourceVersion": version}
    client.apply(locked)
    locked["data"] = {"x": "3"}
    with pytest.raises(ChangedError, match="configmaps a was changed by somebody else"):
        client.apply(locked)


def test_apply_onto_what_was_deleted(client: Client) -> None:
    """An apply onto one object, by uid, does not make another in its place."""
    made = client.apply(config_map("a"))["metadata"]
    client.delete("ConfigMap", "a")
    wait_until(lambda: client.get("ConfigMap", "a") is None)
    obj = config_map("a")
    obj["metadata"] |= {"uid": made["uid"], "resourceVersion": made["resourceVersion"]}
    with pytest.raises(ChangedError, match="no existing object"):
        client.apply(obj)
    assert client.get("ConfigMap", "a") is None


def test_conflict_names_manager_and_field(client: Client, namespace: Namespace) -> None:
    """Without force, a field that kubectl set is refused: both are named. With force it is ours."""
    client.apply(config_map("a", x="1"))
    other = json.dumps(config_map("a", x="2"))
    namespace.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=helm", "-f", "-", input=other)
    with pytest.raises(ConflictError, match=r"\.data\.x \(set by helm\)"):
        client.apply(config_map("a", x="3"), force=False)
    assert client.apply(config_map("a", x="3"))["data"] == {"x": "3"}


def test_dry_run_makes_nothing(client: Client) -> None:
    """An apply that is only tried leaves nothing."""
    client.apply(config_map("a"), dry_run=True)
    assert client.get("ConfigMap", "a") is None


def test_forbidden_prints_the_rule(client: Client, namespace: Namespace) -> None:
    """A missing right names verb, resource and namespace, and the Role to paste, which then is enough."""
    quoted = {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "a"}}
    quoted["spec"] = {"defaultBackend": {"service": {"name": "a", "port": {"number": 80}}}}
    with pytest.raises(ForbiddenError) as caught:
        client.apply(quoted)
    words = str(caught.value)
    assert f"{namespace.user} may not patch ingresses in the namespace '{namespace.name}'" in words
    namespace.cluster.kubectl("apply", "-f", "-", input=words[words.index("apiVersion:") :])
    wait_until(lambda: may(client, "create", "ingresses", "networking.k8s.io"))
    assert client.apply(quoted)["metadata"]["name"] == "a"


def test_missing_namespace(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace that does not exist is told as that, with what to do."""
    monkeypatch.setenv("KUBECONFIG", str(namespace.cluster.kubeconfig))
    client = Client.connect(ClusterSettings(namespace="absent"))
    with pytest.raises(EngineError, match=r"namespace 'absent' does not exist .*kubectl create namespace absent"):
        client.apply(config_map("a"))
    client.close()


def test_login_that_ended(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 401 says that the login has ended; one renewal was tried before."""
    text = json.loads(namespace.kubeconfig.read_text(encoding="utf-8"))
    text["users"][0]["user"]["token"] = "ended"
    namespace.kubeconfig.write_text(json.dumps(text), encoding="utf-8")
    client = connect(namespace, monkeypatch)
    with pytest.raises(EngineError, match=r"does not accept the login of the context 'test' \(401\)"):
        client.list("Pod")
    assert client.requests == 2
    client.close()


def test_login_that_is_renewed(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was exchanged in the kubeconfig meanwhile is taken up without an error."""
    right = namespace.kubeconfig.read_text(encoding="utf-8")
    wrong = json.loads(right)
    wrong["users"][0]["user"]["token"] = "ended"
    namespace.kubeconfig.write_text(json.dumps(wrong), encoding="utf-8")
    client = connect(namespace, monkeypatch)
    namespace.kubeconfig.write_text(right, encoding="utf-8")
    assert client.list("Pod") == []
    client.close()


def test_untrusted_certificate(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubeconfig with another authority is refused in words."""
    text = json.loads(namespace.kubeconfig.read_text(encoding="utf-8"))
    text["clusters"][0]["cluster"].pop("certificate-authority-data", None)
    text["clusters"][0]["cluster"].pop("certificate-authority", None)
    namespace.kubeconfig.write_text(json.dumps(text), encoding="utf-8")
    client = connect(namespace, monkeypatch)
    with pytest.raises(EngineError, match=r"certificate of the API server .* is not trusted"):
        client.list("Pod")
    client.close()


def test_thousand_objects_are_one_request(client: Client, namespace: Namespace) -> None:
    """A list of 1,000 objects costs one request."""
    many = [config_map(f"many-{n}", text="x" * 200) for n in range(1000)]
    namespace.kubectl("create", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": many}))
    before = client.requests
    assert len(client.list("ConfigMap", SELECTOR, fresh=True)) == 1000
    assert client.requests == before + 1


def test_watch_follows_a_roll_out(client: Client, cluster: Cluster, namespace: Namespace) -> None:
    """From nothing to available: Snapshots show objects and their own Events, and come each second."""
    namespace.kubectl("create", "configmap", "unrelated")
    client.apply(workload(cluster))
    watching = client.watch(SELECTOR, seconds=DEADLINE)
    last = next(one for one in watching if one.deployment and one.deployment["status"].get("availableReplicas"))
    told = {"ScalingReplicaSet", "SuccessfulCreate", "Scheduled", "Started"}
    last = next(one for one in watching if told <= {event["reason"] for event in one.events})  # written a little later
    watching.close()
    assert len(last.replicasets) == len(last.pods) == 1
    names = {"web", last.replicasets[0]["metadata"]["name"], last.pods[0]["metadata"]["name"]}
    assert {event["involvedObject"]["name"] for event in last.events} <= names
    assert not [one for one in threading.enumerate() if one.name.startswith("nbdeploy-watch")]


def test_watch_sees_deletes_and_ends(client: Client, cluster: Cluster) -> None:
    """What is deleted goes from the Snapshots; the watch ends after its seconds, with all its threads."""
    serving(client, cluster)
    client.delete("Deployment", "web")
    watching = client.watch(SELECTOR, seconds=DEADLINE)
    assert any((one.deployment, one.replicasets, one.pods) == (None, (), ()) for one in watching)
    watching.close()
    began = time.monotonic()
    assert list(client.watch(SELECTOR, seconds=2.0))
    assert time.monotonic() - began >= 2.0


def test_watch_without_right(client: Client, namespace: Namespace) -> None:
    """A right that is taken away shows as ForbiddenError in the one who watches."""
    namespace.kubectl("delete", "rolebinding", "--all")
    wait_until(lambda: not may(client, "list", "pods"))
    with pytest.raises(ForbiddenError, match="may not list"):
        list(client.watch(SELECTOR, seconds=20.0))


def test_logs(client: Client, cluster: Cluster) -> None:
    """Lines come with their time; followed, they come as they are printed, until the pod is gone."""
    pod = serving(client, cluster)
    ((when, line),) = list(client.logs(pod, follow=False, tail=1))
    assert line == "listening"
    assert time.strptime(when[:19], "%Y-%m-%dT%H:%M:%S")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(line for _, line in client.logs(pod, follow=True)))
    reader.start()
    client.proxy(pod, 8080, "/5", timeout=30.0)
    client.delete("Deployment", "web")
    reader.join(DEADLINE)
    assert not reader.is_alive()
    assert lines == ["listening", "served 5"]


def test_logs_before_and_after(client: Client, cluster: Cluster) -> None:
    """The container before the last restart is told of with `previous`; a pod that is not there prints nothing."""
    pod = serving(client, cluster)
    client.proxy(pod, 8080, "/13", timeout=30.0)
    previous = wait_until(lambda: list(client.logs(pod, follow=False, previous=True)))
    assert [line for _, line in previous] == ["listening", "served 13"]
    assert list(client.logs("absent", follow=False)) == []
    assert list(client.logs("absent", follow=True)) == []


def test_close_ends_what_others_read(client: Client, cluster: Cluster) -> None:
    """Closing the client ends a log that another thread follows."""
    pod = serving(client, cluster)
    begun, ended = threading.Event(), threading.Event()

    def once() -> None:
        path = f"{path_of(KINDS['Pod'], client.namespace, pod)}/log"
        stream = client.stream(path, Asked("get", "", "pods/log"), query={"follow": "true"}, read=DEADLINE)
        assert stream is not None
        for _ in stream.lines():
            begun.set()
        ended.set()

    reader = threading.Thread(target=once)
    reader.start()
    assert begun.wait(DEADLINE)
    client.close()
    assert ended.wait(DEADLINE / 2)  # by the close, not by the end of the read
    reader.join()


def test_proxy(client: Client, cluster: Cluster) -> None:
    """A pod's page is read through the API server; a port where nothing listens is told at once."""
    pod = serving(client, cluster)
    assert client.proxy(pod, 8080, "/5", timeout=30.0) == "xxxxx"
    with pytest.raises(EngineError, match=f"{pod} .*connection refused"):
        client.proxy(pod, 8081, "/5", timeout=30.0)
