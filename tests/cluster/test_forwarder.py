"""The forwarder on the real cluster: requests through it, and what it does when pods, kernels and Endpoints go."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.kubernetes.reach import Forwarders
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import object_name, selector
from tests.conftest import leftovers, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cluster.running import Namespace

BIG = 50_000_000  # bytes
# A server with kept connections: GET answers pod and version, /big that many bytes; POST answers the body's digest.
SERVER = r"""
import hashlib, os, socket, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        _, what, number, *_ = (self.path + "//").split("/")
        if what == "big":
            return self.answer((b"%09d," * 10 % tuple(range(10))) * (int(number) // 100))
        if what == "sleep":
            time.sleep(float(number))
        self.answer(f"{socket.gethostname()} {os.environ['VERSION']}".encode())

    def do_POST(self):
        digest, left = hashlib.sha256(), int(self.headers["content-length"])
        while left:
            part = self.rfile.read(min(left, 65536))
            digest.update(part)
            left -= len(part)
        self.answer(digest.hexdigest().encode())

    def log_message(self, *_):
        pass

class Server(ThreadingHTTPServer):
    request_queue_size = 256

Server(("0.0.0.0", 8080), Handler).serve_forever()
"""


class Toys:
    """Endpoints of a toy server in one namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def make(self, name: str, replicas: int = 2, version: str = "1") -> None:
        """Apply the Service and Deployment of a toy, and wait for the roll-out."""
        labels = selector(name)
        metadata = {"name": object_name(name), "labels": labels}
        ports = [{"name": "http", "port": 80, "targetPort": 8080}]
        service = {"apiVersion": "v1", "kind": "Service", "spec": {"selector": labels, "ports": ports}}
        template = {"metadata": {"labels": labels}, "spec": self._pod(version)}
        spec: dict[str, Any] = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
        spec["strategy"] = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "spec": spec}
        items = [one | {"metadata": metadata} for one in (service, deployment)]
        self.namespace.kubectl(
            "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        )
        self.namespace.kubectl("rollout", "status", f"deployment/{object_name(name)}", "--timeout=180s")

    @staticmethod
    def _pod(version: str) -> dict[str, Any]:
        container = {
            "name": "server",
            "image": "127.0.0.1:5000/base:1",
            "command": ["python3", "-c", SERVER],
            "env": [{"name": "VERSION", "value": version}],
            "readinessProbe": {
                "httpGet": {"path": "/", "port": 8080},
                "periodSeconds": 1,
                "timeoutSeconds": 5,
                "failureThreshold": 6,
            },
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        security = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
        return {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 5}

    def scale(self, name: str, replicas: int) -> None:
        """Change the number of pods."""
        self.namespace.kubectl("scale", f"deployment/{object_name(name)}", f"--replicas={replicas}")

    def delete(self, name: str) -> None:
        """Delete everything of a toy, as `kubectl delete` from elsewhere does."""
        self.namespace.kubectl("delete", f"deployment/{object_name(name)}", f"service/{object_name(name)}")


@pytest.fixture(scope="module")
def toys(make_namespace: Callable[[], Namespace]) -> Toys:
    """Toys in a namespace of this module, with two pods of the Endpoint "toy"."""
    made = Toys(make_namespace())
    made.make("toy")
    return made


@pytest.fixture
def forwarders(home: Path, toys: Toys) -> Iterator[Forwarders]:
    """The forwarders of an engine whose user has nothing but the printed Role; all end with the test."""
    made = Forwarders(home, settings(toys), {**os.environ, **toys.namespace.environ()})
    yield made
    for folder in (home / "clusters" / "cluster").glob("*/"):
        made.stop(folder.name)


def settings(toys: Toys) -> ClusterSettings:
    """Return the settings of an engine."""
    return ClusterSettings(name="cluster", namespace=toys.namespace.name)


class Caller:
    """A client with one kept connection."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=60)

    def __call__(self, path: str = "/", body: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body; after a failure the next call connects anew."""
        try:
            self._connection.request("GET" if body is None else "POST", path, body)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def ask(url: str, path: str = "/", body: bytes | None = None) -> tuple[int, bytes]:
    """Call over a connection of its own."""
    caller = Caller(url)
    try:
        return caller(path, body)
    finally:
        caller.close()


def pods(url: str, calls: int = 8) -> set[str]:
    """Return which pods answer new connections."""
    return {ask(url)[1].decode().split()[0] for _ in range(calls)}


def test_requests_reach_every_pod_at_one_url(forwarders: Forwarders, toys: Toys) -> None:
    """The URL answers at once, connections are spread over the pods, and a second ensure changes nothing."""
    url = forwarders.ensure("toy", toys.namespace.name)
    assert ask(url) in {(200, f"{pod} 1".encode()) for pod in pods(url)}
    assert len(pods(url)) == 2
    assert forwarders.ensure("toy", toys.namespace.name) == url == forwarders.url("toy")


def test_fifty_connections_at_once(forwarders: Forwarders, toys: Toys) -> None:
    """All are answered, at the same time, half of them by either pod."""
    url = forwarders.ensure("toy", toys.namespace.name)
    ask(url)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: ask(url, "/sleep/10"), range(50)))
    assert {status for status, _body in answers} == {200}
    shares = sorted(Counter(body for _status, body in answers).values())
    assert len(shares) == 2
    assert shares[0] >= 20  # exactly half only where no way to a pod took a second try


def test_large_bodies_arrive_whole(forwarders: Forwarders, toys: Toys) -> None:
    """50 MB go and come byte for byte, over one connection."""
    caller = Caller(forwarders.ensure("toy", toys.namespace.name))
    body = os.urandom(BIG)
    assert caller("/", body) == (200, hashlib.sha256(body).hexdigest().encode())
    expected = (b"%09d," * 10 % tuple(range(10))) * (BIG // 100)
    assert caller(f"/big/{BIG}") == (200, expected)
    caller.close()


def test_a_deleted_pod_fails_only_the_calls_in_flight_on_it(forwarders: Forwarders, toys: Toys) -> None:
    """Each client fails once at most, then goes to another pod; its new connections all succeed."""
    toys.make("hurt")
    url = forwarders.ensure("hurt", toys.namespace.name)
    victim = min(pods(url))
    failures: Counter[int] = Counter()
    after: list[str] = []
    over = threading.Event()

    def client(number: int) -> None:
        caller = Caller(url)
        while not over.is_set():
            try:
                status, body = caller("/sleep/0.05")
            except (OSError, http.client.HTTPException):
                failures[number] += 1
                continue
            assert status == 200
            if deleted.is_set():
                after.append(body.decode().split()[0])
        caller.close()

    deleted = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(client, number) for number in range(8)]
        toys.namespace.kubectl("delete", "pod", victim, "--wait=true")
        deleted.set()
        wait_until(lambda: len(after) > 200)
        over.set()
        for one in running:
            one.result()
    assert max(failures.values(), default=0) <= 1
    assert victim not in after[-100:]


def test_a_roll_out_is_followed(forwarders: Forwarders, toys: Toys) -> None:
    """The same URL answers with the next version, never with an error for a new connection."""
    toys.make("rolled", replicas=1)
    url = forwarders.ensure("rolled", toys.namespace.name)
    answers: list[tuple[int, bytes]] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            answers.append(ask(url))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client)
        toys.make("rolled", replicas=1, version="2")
        wait_until(lambda: ask(url)[1].endswith(b" 2"))
        over.set()
        running.result()
    assert [body for status, body in answers if status != 200] == []


def test_a_stopped_endpoint_answers_in_words(forwarders: Forwarders, toys: Toys) -> None:
    """Without pods there is a 503 that says what to do; with pods again the same URL answers."""
    toys.make("scaled", replicas=1)
    url = forwarders.ensure("scaled", toys.namespace.name)
    assert ask(url)[0] == 200
    toys.scale("scaled", 0)
    wait_until(lambda: ask(url)[0] == 503)
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/predict", b"x" * 1_000_000)  # an answer comes though nobody reads this
    answer = connection.getresponse()
    assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.headers["retry-after"] == "1"
    assert "it is stopped (`nbdeploy start scaled`)" in json.loads(answer.read())["detail"]
    connection.close()
    toys.scale("scaled", 1)
    wait_until(lambda: ask(url)[0] == 200)


def test_a_deleted_endpoint_leaves_no_process(forwarders: Forwarders, toys: Toys, home: Path) -> None:
    """Deleted from elsewhere, its forwarder ends by itself and takes its folder along."""
    toys.make("removed", replicas=1)
    url = forwarders.ensure("removed", toys.namespace.name)
    assert ask(url)[0] == 200
    toys.delete("removed")
    wait_until(lambda: not leftovers(home))
    assert forwarders.url("removed") == ""
    assert not (home / "clusters" / "cluster" / "removed").exists()


def test_it_outlives_the_kernel(forwarders: Forwarders, toys: Toys, home: Path) -> None:
    """A process that started it is killed with its whole session; the URL goes on answering."""
    program = (
        "import sys, signal; from pathlib import Path; from nbdeploy.engines.kubernetes.reach import Forwarders\n"
        "from nbdeploy.engines.kubernetes.settings import ClusterSettings\n"
        "made = Forwarders(Path(sys.argv[1]), ClusterSettings(name='cluster'))\n"
        "print(made.ensure('toy', sys.argv[2]), flush=True); signal.pause()"
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", program, home, toys.namespace.name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **toys.namespace.environ(), "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert kernel.stdout is not None
    url = kernel.stdout.readline().strip()
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    kernel.stdout.close()
    assert ask(url)[0] == 200
    assert forwarders.ensure("toy", toys.namespace.name) == url


def test_credentials_are_read_anew(home: Path, toys: Toys, tmp_path: Path) -> None:
    """Three rules of a Role are enough; when the token is no longer good, the next one is read from its file."""
    namespace = toys.namespace
    rules = (
        ("get,create", "pods/portforward"),
        ("get,list,watch", "endpointslices.discovery.k8s.io"),
    )
    namespace.kubectl("create", "serviceaccount", "caller")
    for number, (verbs, resource) in enumerate(rules):
        namespace.kubectl("create", "role", f"caller-{number}", f"--verb={verbs}", f"--resource={resource}")
        account = f"--serviceaccount={namespace.name}:caller"
        namespace.kubectl("create", "rolebinding", f"caller-{number}", f"--role=caller-{number}", account)
    token, kubeconfig = tmp_path / "token", tmp_path / "kubeconfig"

    def issue(secret: str) -> None:
        namespace.kubectl("create", "secret", "generic", secret)
        bound = ("--bound-object-kind=Secret", f"--bound-object-name={secret}")
        token.write_text(namespace.kubectl("create", "token", "caller", *bound).strip(), encoding="ascii")

    issue("first")
    config = json.loads(namespace.kubeconfig.read_text(encoding="utf-8"))
    config["users"][0]["user"] = {"tokenFile": str(token)}
    kubeconfig.write_text(json.dumps(config), encoding="utf-8")
    forwarders = Forwarders(home, settings(toys), {**os.environ, "KUBECONFIG": str(kubeconfig)})
    try:
        url = forwarders.ensure("toy", namespace.name)
        assert ask(url)[0] == 200
        first = token.read_text(encoding="ascii")
        namespace.kubectl("delete", "secret", "first")
        issue("second")
        arguments = ("--token", first, "--kubeconfig", "/dev/null", "auth", "whoami")
        server = ("--server", config["clusters"][0]["cluster"]["server"], "--insecure-skip-tls-verify")
        wait_until(lambda: refused(*arguments, *server))  # the API server remembers good tokens for some seconds
        assert ask(url)[0] == 200
    finally:
        forwarders.stop("toy")


def refused(*arguments: str) -> bool:
    """Whether the API server knows a token no more."""
    from tests.cluster.running import PROGRAM

    done = subprocess.run([PROGRAM, "kubectl", *arguments], capture_output=True, text=True, check=False)
    return "Unauthorized" in done.stderr or "must be logged in" in done.stderr
