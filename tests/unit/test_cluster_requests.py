"""How requests to an API server are repeated and its silence is told; the servers are real sockets."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from nbdeploy.engines.kubernetes.client import ChangedError, Client, UnavailableError
from nbdeploy.engines.kubernetes.refusals import unreachable
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`: a status and headers; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, dict[str, str], Any]] = [(200, {}, {"items": []})]
        self.seen: list[tuple[str, str]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path))
        self.rfile.read(int(self.headers.get("content-length", "0")))
        answers = self.server.answers
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_PATCH(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on this machine."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


Connect = Callable[[str], Client]


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Return clients of servers by URL."""
    made: list[Client] = []
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    def connect(url: str) -> Client:
        content = {
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        (tmp_path / "config").write_text(json.dumps(content), encoding="utf-8")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        made.append(Client.connect(ClusterSettings(), tmp_path / "cache"))
        return made[-1]

    yield connect
    for client in made:
        client.close()


def url(server: Server) -> str:
    """Return where it listens."""
    return f"http://127.0.0.1:{server.server_address[1]}"


def conflict(**details: Any) -> dict[str, Any]:
    """Return what an API server says of an object that changed."""
    return {"kind": "Status", "reason": "Conflict", "message": "the object has been modified", "details": details}


def test_busy_server_says_when(server: Server, connect: Connect) -> None:
    """A 429 with Retry-After is obeyed: the request goes out again after that time, and succeeds."""
    server.answers.insert(0, (429, {"retry-after": "1"}, b"slow down"))
    client, began = connect(url(server)), time.monotonic()
    assert client.list("Pod") == []
    assert time.monotonic() - began >= 1.0
    assert client.requests == len(server.seen) == 2


def test_faults_that_pass(server: Server, connect: Connect) -> None:
    """A 503, a 500 and a cut connection are got over."""
    server.answers[:0] = [(503, {}, b""), (500, {}, b""), (0, {}, b"")]
    assert connect(url(server)).list("Pod") == []
    assert len(server.seen) == 4


def test_apply_races(server: Server, connect: Connect) -> None:
    """An apply that lost a race in the server is sent again; one onto a version is not: the answer counts."""
    client = connect(url(server))
    server.answers[:0] = [(409, {}, conflict(name="a", kind="configmaps"))]
    obj: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}
    assert client.apply(obj) == {"items": []}
    server.answers[:0] = [(409, {}, conflict(name="a", kind="configmaps"))]
    with pytest.raises(ChangedError, match="configmaps a was changed by somebody else"):
        client.apply({**obj, "metadata": {"name": "a", "resourceVersion": "7"}})


def test_a_locked_apply_is_not_sent_twice(server: Server, connect: Connect) -> None:
    """Where the answer to an apply onto a version is lost, it may have been carried out: it is not sent again."""
    server.answers[:0] = [(0, {}, b"")]
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "resourceVersion": "7"}}
    with pytest.raises(UnavailableError):
        connect(url(server)).apply(obj)
    assert len(server.seen) == 1


def test_nothing_listens(connect: Connect) -> None:
    """A wrong address is told after seconds, with what to look at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:\d+ cannot be reached: connection refused"):
            connect(f"http://127.0.0.1:{unused.getsockname()[1]}").list("Pod")


def test_unknown_host(connect: Connect) -> None:
    """A host that DNS does not know is told at once, with the usual cause."""
    with pytest.raises(UnavailableError, match=r"the name cluster\.invalid is not known here\. Is the .* VPN on"):
        connect("https://cluster.invalid:6443").list("Pod")


def test_a_server_that_is_none(server: Server, connect: Connect) -> None:
    """A server that speaks no TLS, or no JSON, is an error in words."""
    with pytest.raises(UnavailableError, match="certificate of the API server"):
        connect(url(server).replace("http", "https")).list("Pod")
    server.answers[:0] = [(200, {}, b"<html>Please log in</html>")]
    with pytest.raises(EngineError, match="answered with something else than JSON"):
        connect(url(server)).list("Pod")


def test_proxy_is_named(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a proxy stands in the way, it is named with the variable that goes round it."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"through the proxy http://127\.0\.0\.1:9: .*NO_PROXY"):
        connect("https://192.0.2.1:6443").list("Pod")


def test_warnings_are_kept(server: Server, connect: Connect) -> None:
    """What the server warns of is kept once, without the quotes of its header."""
    warning = '299 - "would violate PodSecurity \\"restricted:latest\\": privileged"'
    server.answers[:] = [(200, {"warning": warning}, {"items": []})]
    client = connect(url(server))
    client.list("Pod")
    client.list("Pod")
    assert client.warnings == ['would violate PodSecurity "restricted:latest": privileged']


def test_groups_are_kept_in_a_private_file(server: Server, connect: Connect, tmp_path: Path) -> None:
    """The list of API groups is asked for once, kept where only its owner can read it, and asked again if wanted."""
    server.answers[:] = [(200, {}, {"groups": [{"name": "apps"}, {"name": "keda.sh"}]})]
    assert connect(url(server)).groups() == connect(url(server)).groups() == {"apps", "keda.sh"}
    assert len(server.seen) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    connect(url(server)).groups(fresh=True)
    assert len(server.seen) == 2


def test_blocked_in_a_pod() -> None:
    """A pod whose way to the API server is blocked reads both settings of JupyterHub that open it."""
    silence = urllib3.exceptions.ConnectTimeoutError("timed out")
    words = unreachable(silence, "https://10.96.0.1:443", proxy="", in_cluster=True)
    assert "https://10.96.0.1:443 cannot be reached: no answer in time" in words
    assert "singleuser.serviceAccountName" in words
    assert "singleuser.networkPolicy.egressAllowRules.privateIPs" in words


def test_import_is_cheap() -> None:
    """Importing the client loads neither `kubernetes` nor urllib3."""
    code = (
        "import sys, nbdeploy.engines.kubernetes.client as c; assert not {'kubernetes', 'urllib3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
