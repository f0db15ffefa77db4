"""How requests to an API server are repeated, and logs and watches go on; the servers are real sockets."""

from __future__ import annotations

import contextlib
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

from nbdeploy.engines.kubernetes import podlog
from nbdeploy.engines.kubernetes.client import ChangedError, Client, UnavailableError
from nbdeploy.engines.kubernetes.refusals import unreachable
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError
from tests.conftest import wait_until

Answer = tuple[int, dict[str, str], Any]  # status, headers, body
CUT = object()  # in a body that goes on: the connection breaks
STALL = object()  # in a body that goes on: nothing more comes


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`, or of the first route that its path has; the last one stays.

    A body is bytes, data for JSON, or a list of bytes, CUT and STALL: an answer that goes on.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = [(200, {}, {"items": []})]
        self.routes: dict[str, list[Answer]] = {}
        self.seen: list[tuple[str, str]] = []
        self.over = threading.Event()

    def next_answer(self, path: str) -> Answer:
        """Return what this request gets."""
        answers = next((row for part, row in self.routes.items() if part in path), self.answers)
        return answers.pop(0) if len(answers) > 1 else answers[0]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path))
        self.rfile.read(int(self.headers.get("content-length", "0")))
        status, headers, body = self.server.next_answer(self.path)
        if status == 0:
            self.cut()
            return
        if isinstance(body, list):
            self.go_on(status, headers, body)
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def go_on(self, status: int, headers: dict[str, str], steps: list[Any]) -> None:
        """Send the steps of an answer, its head too; chunked, unless the connection's end is its end."""
        chunked = headers.get("connection") != "close"
        if steps[:1] != [STALL]:
            self.send_response(status)
            for name, value in {**({"transfer-encoding": "chunked"} if chunked else {}), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
        for step in steps:
            if step is CUT:
                self.cut()
                return
            if step is STALL:
                self.server.over.wait(30.0)
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(step), step) if chunked else step)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Break the connection."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

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
    made.over.set()
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
        made.append(Client.connect(ClusterSettings()))
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


@pytest.mark.usefixtures("unknown_names")
def test_unknown_host(connect: Connect) -> None:
    """A host that DNS does not know is told at once, with the usual cause."""
    with pytest.raises(UnavailableError, match=r"the name cluster\.invalid is not known here\. Is the .* VPN on"):
        connect("https://cluster.invalid:6443").list("Pod")


def test_a_server_that_is_none(server: Server, connect: Connect) -> None:
    """A server that speaks no TLS, or no JSON, is an error in words."""
    with pytest.raises(UnavailableError, match="certificate of the API server"):
        connect(url(server).replace("http", "https")).list("Pod")
    server.answers[:0] = [(200, {}, b"<html>Please log in</html>")]
    with pytest.raises(EngineError, match="answered, but not as an API server does"):
        connect(url(server)).list("Pod")


@pytest.mark.parametrize("body", [b"<h1>not here</h1>", {"detail": "Not Found"}], ids=["page", "json"])
def test_a_404_of_somebody_else(server: Server, connect: Connect, body: Any) -> None:
    """Only an API server's own word counts for "there is none": a proxy's 404 must not hide an Endpoint."""
    server.answers = [(404, {}, body)]
    with pytest.raises(EngineError, match="no API server"):
        connect(url(server)).get("ConfigMap", "one")


def test_a_404_of_a_kind_that_is_not_known(server: Server, connect: Connect) -> None:
    """API servers answer so on paths of kinds that are not installed: there are no objects of it."""
    server.answers = [(404, {}, b"404 page not found\n")]
    assert connect(url(server)).get("HTTPRoute", "one") is None


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


def test_groups(server: Server, connect: Connect) -> None:
    """The API groups of the cluster are asked for each time."""
    server.answers[:] = [(200, {}, {"groups": [{"name": "apps"}, {"name": "keda.sh"}]})]
    client = connect(url(server))
    assert client.groups() == client.groups() == {"apps", "keda.sh"}
    assert len(server.seen) == 2


def test_blocked_in_a_pod() -> None:
    """A pod whose way to the API server is blocked reads both settings of JupyterHub that open it."""
    silence = urllib3.exceptions.ConnectTimeoutError("timed out")
    words = unreachable(silence, "https://10.96.0.1:443", proxy="", in_cluster=True)
    assert "https://10.96.0.1:443 cannot be reached: no answer in time" in words
    assert "singleuser.serviceAccountName" in words
    assert "singleuser.networkPolicy.egressAllowRules.privateIPs" in words


def stamped(text: str, nanoseconds: int, *, zone: str = "Z", hour: int = 21) -> bytes:
    """Return a line as the API server gives it."""
    return f"2026-11-22T{hour}:47:37.{nanoseconds:09d}{zone} {text}\n".encode()


ONE, TWO, THREE = stamped("one", 100), stamped("two", 200), stamped("three", 300)
ALL: Answer = (200, {}, [ONE, TWO, THREE])
WATCHER = b"failed to create fsnotify watcher: too many open files"


def followed(server: Server, client: Client, *answers: Answer) -> list[tuple[str, str]]:
    """Follow the log of a pod that gets these answers, and is seen to have ended after as many looks."""
    phases = [{"status": {"phase": phase}} for phase in ("Running",) * len(answers) + ("Succeeded",)]
    server.routes = {"/log": list(answers), "/pods/p": [(200, {}, phase) for phase in phases]}
    return list(client.logs("p", follow=True))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence of two seconds counts as a stall of a log, and the next answer is asked for soon."""
    monkeypatch.setattr(podlog, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(podlog, "PAUSE_SECONDS", 0.1)


@pytest.mark.parametrize(
    "broken",
    [
        (200, {}, [ONE, STALL]),
        (200, {}, [ONE + TWO, STALL]),
        (200, {}, [STALL]),
        (200, {}, [ONE, TWO[:35], CUT]),
        (200, {}, [ONE, TWO[:35]]),
        (200, {}, [ONE, TWO[:20]]),
        (200, {}, [ONE]),
        (200, {}, []),
        (200, {"connection": "close"}, [ONE, STALL]),
        (0, {}, b""),
        (400, {}, {"kind": "Status", "message": "container is waiting to start"}),
        (500, {}, {"kind": "Status", "message": "the node does not answer"}),
    ],
    ids=[
        *("stalls", "stalls later", "no head", "cut in a line", "ends in a line", "ends in a time", "ends", "empty"),
        *("stalls unchunked", "no answer", "not started", "500"),
    ],
)
def test_a_followed_log_goes_on(server: Server, connect: Connect, broken: Answer) -> None:
    """However an answer stalls or breaks, the log goes on in the next one: no line is lost, none comes twice."""
    found = followed(server, connect(url(server)), broken, ALL)
    assert [text for _, text in found] == ["one", "two", "three"]


def test_a_last_line_without_an_end(server: Server, connect: Connect) -> None:
    """What a container printed last without a newline comes, before what its successor prints."""
    client = connect(url(server))
    found = followed(server, client, (200, {}, [ONE, TWO[:-1]]), (200, {}, [stamped("new", 400)]))
    assert [text for _, text in found] == ["one", "two", "new"]
    assert [text for _, text in followed(server, client, (200, {}, [ONE, TWO[:-1]]))] == ["one", "two"]


def test_lines_of_the_same_moment(server: Server, connect: Connect) -> None:
    """Lines with one and the same time are told apart by how many were read."""
    same = [stamped(text, 100) for text in ("a", "b", "c")]
    found = followed(server, connect(url(server)), (200, {}, same[:2]), (200, {}, same))
    assert [text for _, text in found] == ["a", "b", "c"]


def test_a_node_in_another_zone(server: Server, connect: Connect) -> None:
    """A node that writes its own zone's time is asked from the same moment on."""
    there = [stamped(text, number, zone="+02:00", hour=23) for number, text in enumerate(("a", "b"))]
    found = followed(server, connect(url(server)), (200, {}, there[:1]), (200, {}, there))
    assert found == [(f"2026-11-22T21:47:37.{number:09d}Z", text) for number, text in enumerate(("a", "b"))]
    assert "sinceTime=2026-11-22T21%3A47%3A37Z" in server.seen[2][1]


def test_words_of_the_node_in_a_log(server: Server, connect: Connect) -> None:
    """A node that cannot watch a log says so in it and ends it: told once; what is printed next comes all the same."""
    client = connect(url(server))
    found = followed(
        server, client, (200, {}, [ONE, WATCHER]), (200, {}, [ONE, WATCHER]), (200, {}, [ONE, TWO, WATCHER])
    )
    assert [text for _, text in found] == ["one", WATCHER.decode(), "two"]
    server.routes = {"/log": [(200, {}, ONE + WATCHER)]}
    assert [text for _, text in client.logs("p", follow=False)] == ["one", WATCHER.decode()]


def test_a_container_removed_meanwhile(server: Server, connect: Connect) -> None:
    """What a node says of a container that it has removed is no line of its log."""
    client, gone = connect(url(server)), b"unable to retrieve container logs for containerd://4357ea7b"
    assert [text for _, text in followed(server, client, (200, {}, [ONE]), (200, {}, gone))] == ["one"]
    server.routes = {"/log": [(200, {}, gone)]}
    assert list(client.logs("p", follow=False)) == []


def test_lines_come_without_chunks(server: Server, connect: Connect) -> None:
    """Behind a proxy that takes the chunks away, a line comes when it is printed, not once there are many."""
    server.routes = {"/log": [(200, {"connection": "close"}, [ONE, STALL])]}
    client = connect(url(server))
    lines = client.logs("p", follow=True)
    began = time.monotonic()
    assert next(lines)[1] == "one"
    assert time.monotonic() - began < 10.0
    lines.close()


@pytest.mark.parametrize("steps", [[STALL], [ONE, STALL]], ids=["before the head", "after a line"])
def test_a_closed_client_reads_no_more(
    server: Server, connect: Connect, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who follows a log through a client that is closed meanwhile comes to an end, and asks for nothing more."""
    monkeypatch.setattr(podlog, "SILENCE_SECONDS", 2.0)
    server.routes = {"/log": [(200, {}, steps)], "/pods/p": [(200, {}, {"status": {"phase": "Running"}})]}
    client, ended = connect(url(server)), threading.Event()

    def read() -> None:
        with contextlib.suppress(UnavailableError):
            list(client.logs("p", follow=True))
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: server.seen)
    client.close()
    assert ended.wait(20.0)
    reader.join()
    assert sum("/log?" in path for _, path in server.seen) == 1


def event(kind: str, version: int, **more: Any) -> bytes:
    """Return one event of a watch."""
    metadata = {"name": "a", "uid": "u", "resourceVersion": str(version)}
    return json.dumps({"type": kind, "object": {"metadata": metadata, **more}}).encode() + b"\n"


@pytest.mark.parametrize(
    "too_old",
    [
        (200, {}, [event("BOOKMARK", 5), event("ERROR", 0, code=410, reason="Expired")]),
        (410, {}, {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}),
    ],
    ids=["as an event", "as the answer"],
)
def test_a_version_that_is_too_old(server: Server, connect: Connect, too_old: Answer) -> None:
    """Where the server no longer knows what came after a version (410), all is listed anew and watched from there."""
    quiet = (200, {}, [event("BOOKMARK", 1), STALL])

    def listed(version: int, *names: str) -> Answer:
        items = [{"metadata": {"name": name, "uid": name}} for name in names]
        return 200, {}, {"metadata": {"resourceVersion": str(version)}, "items": items}

    server.routes = {
        "/pods?watch": [too_old, (200, {}, [event("ADDED", 8), STALL])],
        "?watch": [quiet],
        "/pods": [listed(1, "old"), listed(7, "new")],
    }
    server.answers = [listed(1)]
    seen: list[set[str]] = []
    with contextlib.closing(connect(url(server)).watch("x=y", seconds=20.0)) as snapshots:
        for snapshot in snapshots:
            seen.append({pod["metadata"]["name"] for pod in snapshot.pods})
            if seen[-1] == {"new", "a"}:
                break
    assert seen[-1] == {"new", "a"}
    watched = [path for _, path in server.seen if "/pods?watch" in path]
    assert ["resourceVersion=1&" in watched[0], "resourceVersion=7&" in watched[1]] == [True, True]


def test_import_is_cheap() -> None:
    """Importing the client loads neither `kubernetes` nor urllib3."""
    code = (
        "import sys, nbdeploy.engines.kubernetes.client as c; assert not {'kubernetes', 'urllib3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
