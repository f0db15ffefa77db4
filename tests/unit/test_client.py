"""The client against real small servers: what is tried again, what never is, and the words for each failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from nbdeploy_server import wire

import nbdeploy
from nbdeploy.client import Client
from nbdeploy.errors import BusyError, InvalidRequestError, RemoteError, UnauthorizedError, UnreachableError
from tests.conftest import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STREAM = wire.CONTENT_TYPE + "-seq"


def answer(status: int, body: bytes, kind: str = wire.CONTENT_TYPE, extra: str = "") -> bytes:
    """Return an HTTP answer."""
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def problem(status: int, detail: str, **more: Any) -> bytes:
    """Return an answer as the server gives errors."""
    return answer(status, json.dumps({"status": status, "detail": detail, **more}).encode(), "application/problem+json")


def good(value: Any) -> bytes:
    """Return an answer of predict."""
    return answer(200, wire.pack(value))


def frame(tag: int, payload: bytes) -> bytes:
    """Return one frame of a stream."""
    return bytes([tag]) + struct.pack(">I", len(payload)) + payload


class Server:
    """Gives one scripted answer per request; None resets the connection after the request was read.

    Attributes:
        seen: the requests that came, whole.
    """

    def __init__(self, *script: bytes | None, delay: float = 0.0) -> None:
        self._script = list(script)
        self._delay = delay
        self._over = threading.Event()
        self.seen: list[bytes] = []
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Listen and answer."""
        self._sock.listen()
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        if self._thread.ident is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            with connection:
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        while True:
            data = b""
            while b"\r\n\r\n" not in data:
                try:
                    got = connection.recv(65536)
                except OSError:
                    return
                if not got:
                    return
                data += got
            head, _, body = data.partition(b"\r\n\r\n")
            size = next(
                int(row.split(b":")[1]) for row in head.lower().split(b"\r\n") if row.startswith(b"content-length")
            )
            while len(body) < size:
                body += connection.recv(65536)
            self.seen.append(head + b"\r\n\r\n" + body)
            reply = self._script.pop(0) if self._script else problem(500, "the script is at its end")
            self._over.wait(self._delay)
            if reply is None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            with contextlib.suppress(OSError):
                connection.sendall(reply)
            if b"transfer" in reply.lower() or b"connection: close" in reply:
                return


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers; all stop with the test."""
    running: list[Server] = []

    def start(*script: bytes | None, listen: bool = True, delay: float = 0.0) -> Server:
        server = Server(*script, delay=delay)
        running.append(server)
        if listen:
            server.start()
        return server

    yield start
    for server in running:
        server.close()


def call_sync(client: Client) -> Any:
    """Call."""
    return client.call({"x": 1})


def call_async(client: Client) -> Any:
    """Call from async code."""
    return asyncio.run(client.call_async({"x": 1}))


def first_item(client: Client) -> Any:
    """Stream."""
    return next(client.stream({"x": 1}))


WAYS = pytest.mark.parametrize("call", [call_sync, call_async, first_item])


@WAYS
def test_the_answer_and_the_headers(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """What predict returned comes back as itself; key and types are in the headers."""
    server = serve(good((1, b"x")))
    with Client(server.url + "/", "k3y") as client:
        assert call(client) in {(1, b"x"), 1}
    head, _, body = server.seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /predict HTTP/1.1")
    assert b"authorization: bearer k3y" in head.lower()
    assert wire.CONTENT_TYPE.encode() in head
    assert wire.unpack(body) == {"arguments": {"x": 1}} or wire.unpack(body) == {"x": 1}


@WAYS
def test_503_is_tried_again(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """A Replica that is not ready has not run predict: the call waits for it."""
    server = serve(problem(503, "starting"), problem(503, "starting"), good([7]))
    with Client(server.url, timeout=10) as client:
        assert call(client) in ([7], 7)
    assert len(server.seen) == 3


@WAYS
def test_503_has_an_end(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """Within the timeout the caller hears the server's own words."""
    server = serve(*[problem(503, "no Replica is ready")] * 50)
    began = time.monotonic()
    with Client(server.url, timeout=2.0) as client, pytest.raises(RemoteError, match="no Replica is ready") as caught:
        call(client)
    assert caught.value.status == 503
    assert time.monotonic() - began < 30
    assert len(server.seen) > 1


@WAYS
def test_a_refused_connection_is_tried_again(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """A server that begins to listen within the patience is reached."""
    server = serve(good([7]), listen=False)
    timer = threading.Timer(0.4, server.start)
    timer.start()
    with Client(server.url, timeout=20) as client:
        assert call(client) in ([7], 7)
    timer.join()


@WAYS
def test_nobody_listens(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """A port of this machine that stays without a listener is told soon, with what to do."""
    server = serve(listen=False)
    began = time.monotonic()
    with Client(server.url, timeout=0.3) as client, pytest.raises(UnreachableError, match="nbdeploy start"):
        call(client)
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("unknown_names")
def test_a_name_that_does_not_resolve() -> None:
    """It will not resolve in a minute either: no retry."""
    began = time.monotonic()
    with (
        Client("http://nobody.invalid", timeout=DEADLINE) as client,
        pytest.raises(UnreachableError, match="cannot be reached"),
    ):
        client.call({})
    assert time.monotonic() - began < 30


@WAYS
def test_never_again_once_the_body_was_sent(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """Predict may have run: a broken connection is told, not tried again."""
    server = serve(None, good([7]))
    with Client(server.url, timeout=5) as client, pytest.raises(UnreachableError, match="predict may have run"):
        call(client)
    assert len(server.seen) == 1


@WAYS
def test_idempotent_calls_are_sent_again(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """Unless the caller says that twice is fine."""
    server = serve(None, None, good([7]))
    with Client(server.url, timeout=10, idempotent=True) as client:
        assert call(client) in ([7], 7)
    assert len(server.seen) == 3


@WAYS
def test_a_slow_answer(serve: Callable[..., Server], call: Callable[[Client], Any]) -> None:
    """The timeout is told, with its length, and nothing is sent again."""
    server = serve(good([7]), good([7]), delay=5.0)
    with (
        Client(server.url, timeout=1.0) as client,
        pytest.raises(RemoteError, match="did not answer within 1 s") as e,
    ):
        call(client)
    assert e.value.status == 504
    assert len(server.seen) <= 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, UnauthorizedError),
        (422, InvalidRequestError),
        (429, BusyError),
        (404, RemoteError),
    ],
)
def test_errors_have_their_kind(serve: Callable[..., Server], status: int, kind: type[RemoteError]) -> None:
    """Each status has its exception, with the server's words."""
    server = serve(problem(status, "these words"))
    with Client(server.url) as client, pytest.raises(kind, match="these words") as caught:
        client.call({})
    assert type(caught.value) is kind
    assert caught.value.status == status


def test_what_predict_raised(serve: Callable[..., Server]) -> None:
    """Type, message and the notebook's own lines come back."""
    lines = ["cell 3, line 2, in predict: return 1 / x"]
    server = serve(
        problem(
            500, "predict raised ZeroDivisionError: division by zero", exception="ZeroDivisionError", traceback=lines
        )
    )
    with Client(server.url) as client, pytest.raises(RemoteError) as caught:
        client.call({"x": 0})
    assert caught.value.remote_type == "ZeroDivisionError"
    assert caught.value.remote_traceback == tuple(lines)
    assert lines[0] in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b"[]", b"", b'{"detail": 5}', b"\xff\xfe"])
def test_errors_of_others(serve: Callable[..., Server], body: bytes) -> None:
    """A proxy's error page is an error of ours with some words, never a crash of the client."""
    server = serve(answer(502, body, "text/html"))
    with Client(server.url) as client, pytest.raises(RemoteError) as caught:
        client.call({})
    assert caught.value.status == 502


def test_an_answer_that_cannot_be_read(serve: Callable[..., Server]) -> None:
    """Another program on the port is told."""
    server = serve(
        answer(200, b"hello", "text/plain"), answer(200, b"\xc1"), answer(200, b"[1, 2]", "application/json")
    )
    with Client(server.url) as client:
        for _ in range(2):
            with pytest.raises(RemoteError, match="cannot be read"):
                client.call({})
        assert client.call({}) == [1, 2]


def test_a_request_that_cannot_be_sent(serve: Callable[..., Server]) -> None:
    """Arguments of a type that does not travel are told before anything is sent."""
    server = serve()
    with Client(server.url) as client, pytest.raises(InvalidRequestError, match="cannot be sent"):
        client.call({"x": object()})
    assert server.seen == []


def chunked(*frames: bytes, end: bool = True) -> bytes:
    """Return a stream's answer; without `end` it breaks off."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {STREAM}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    body = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in frames)
    return head + body + (b"0\r\n\r\n" if end else b"")


ITEMS = [frame(0, wire.pack(value)) for value in ("a", "", {"n": 1})]
END = frame(2, b"")


def test_a_stream(serve: Callable[..., Server]) -> None:
    """Items come as themselves, whatever the pieces they travel in; empty strings too."""
    data = b"".join([*ITEMS, END])
    server = serve(chunked(*[data[i : i + 1] for i in range(len(data))]))
    with Client(server.url) as client:
        assert list(client.stream({"x": 1})) == ["a", "", {"n": 1}]


@pytest.mark.parametrize("end", [True, False])
def test_a_stream_that_breaks(serve: Callable[..., Server], end: bool) -> None:  # noqa: FBT001 - a parameter
    """What came is given, then the break is told: it is not taken for the end, and nothing is sent again."""
    server = serve(chunked(*ITEMS[:2], end=end), chunked(*ITEMS, END))
    with Client(server.url, idempotent=True) as client:
        items = client.stream({"x": 1})
        assert [next(items), next(items)] == ["a", ""]
        with pytest.raises(UnreachableError, match="broke"):
            next(items)
    assert len(server.seen) == 1


def test_an_error_in_a_stream(serve: Callable[..., Server]) -> None:
    """What predict raises after some items is raised after those items."""
    error = json.dumps({"status": 500, "detail": "predict raised ValueError: no", "exception": "ValueError"}).encode()
    server = serve(chunked(ITEMS[0], frame(1, error)))
    with Client(server.url) as client:
        items = client.stream({})
        assert next(items) == "a"
        with pytest.raises(RemoteError, match="ValueError") as caught:
            next(items)
    assert caught.value.remote_type == "ValueError"


def test_streaming_what_does_not_stream(serve: Callable[..., Server]) -> None:
    """A function that returns once gives one item; a list its items."""
    server = serve(good([1, 2]), good("one"))
    with Client(server.url) as client:
        assert list(client.stream({})) == [1, 2]
        assert list(client.stream({})) == ["one"]


def test_map_waits_for_a_full_queue(serve: Callable[..., Server]) -> None:
    """A full queue is no error for map: it asks again, and keeps the order."""
    server = serve(good(0), problem(429, "full"), problem(429, "full"), good(1), good(2))
    with Client(server.url, timeout=20) as client:
        assert client.map([{"x": n} for n in range(3)], 1) == [0, 1, 2]


def test_map_ends_at_an_error(serve: Callable[..., Server]) -> None:
    """The first error is raised, and what has not begun is not asked."""
    server = serve(good(0), problem(500, "no"), *[good(1)] * 50)
    with Client(server.url) as client, pytest.raises(RemoteError, match="no"):
        client.map([{"x": n} for n in range(50)], 1)
    assert len(server.seen) < 50


@WAYS
def test_proxies_do_not_see_calls_to_this_machine(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, call: Callable[[Client], Any]
) -> None:
    """HTTP_PROXY is for the outside; for another host it is used."""
    proxy, server = serve(good(["proxy"])), serve(good(["server"]))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(server.url) as client:
        assert call(client) in (["server"], "server")
    with Client("http://127.0.0.1.example.invalid") as client:
        assert call(client) in (["proxy"], "proxy")


def test_one_client_for_many_threads(serve: Callable[..., Server]) -> None:
    """Threads may share a Client."""
    servers = [serve(*[good(n)] * 20) for n in range(1)]
    with Client(servers[0].url) as client:
        assert client.map([{} for _ in range(20)], 1) == [0] * 20


def test_connect_by_url(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL alone is enough for calls; the key comes from NBDEPLOY_KEY unless it is given."""
    monkeypatch.setenv("NBDEPLOY_KEY", "from-the-variable")
    server = serve(good(1), good(2))
    assert nbdeploy.connect(url=f"{server.url}/predict")(x=1) == 1
    assert nbdeploy.connect(url=server.url, key="given")(x=1) == 2
    assert b"Bearer from-the-variable" in server.seen[0]
    assert b"Bearer given" in server.seen[1]
