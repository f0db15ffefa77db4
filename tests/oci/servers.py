"""Real counterparts for these tests: Debian's registry, a server of tokens, a front that misbehaves, a proxy."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import wait_until
from tests.server.containers import taken_port

if TYPE_CHECKING:
    from typing import Self

USER, PASSWORD = "ada", "s3cret"
_HTPASSWD = "ada:$2y$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n"  # bcrypt of the two
_CONFIG = """version: 0.1
log: {{accesslog: {{disabled: true}}, level: info}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
  maintenance: {{uploadpurging: {{enabled: false}}}}
http:
  addr: 127.0.0.1:{port}
{tls}
{auth}
"""


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1 and registry.test, and its key."""

    pem: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        """Make one with openssl."""
        made = cls(folder / "certificate.pem", folder / "key.pem")
        names = "subjectAltName=IP:127.0.0.1,DNS:registry.test"
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=nbdeploy-test",
                ),
                *("-addext", names, "-keyout", str(made.key), "-out", str(made.pem)),
            ],
            check=True,
            capture_output=True,
        )
        return made


class DockerRegistry:
    """Debian's docker-registry on a free loopback port with a folder of its own."""

    def __init__(
        self, folder: Path, *, htpasswd: bool = False, tokens: TokenServer | None = None, tls: Certificate | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder / "data"
        self.root.mkdir()
        self._folder = folder
        auth = ""
        if htpasswd:
            (folder / "htpasswd").write_text(_HTPASSWD, encoding="ascii")
            auth = f"auth:\n  htpasswd: {{realm: test, path: {folder}/htpasswd}}"
        if tokens is not None:
            auth = f"auth:\n  token: {{realm: '{tokens.realm}', service: {tokens.service}, issuer: {tokens.issuer}, "
            auth += f"rootcertbundle: {tokens.certificate.pem}}}"
        secured = f"  tls: {{certificate: {tls.pem}, key: {tls.key}}}" if tls is not None else ""
        for _ in range(3):  # another process may take the port first
            self._start(auth, secured)
            if wait_until(lambda: self._listens() or self._process.poll() is not None) and self._process.poll() is None:
                return
        raise AssertionError("docker-registry ended: " + (folder / "log").read_text(encoding="utf-8"))

    def _start(self, auth: str, secured: str) -> None:
        self.port = taken_port()
        self.host = f"127.0.0.1:{self.port}"
        config = self._folder / "config.yml"
        config.write_text(_CONFIG.format(root=self.root, port=self.port, auth=auth, tls=secured), encoding="utf-8")
        environ = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [shutil.which("docker-registry") or "docker-registry", "serve", str(config)],
                env={**environ, "OTEL_TRACES_EXPORTER": "none"},
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)

    def has(self, digest: str) -> bool:
        """Tell whether the blob lies in its folder."""
        return (self.root / "docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data").exists()

    def _listens(self) -> bool:
        """Tell whether it has said so itself: who is found on the port may be another."""
        return f"listening on 127.0.0.1:{self.port}" in (self._folder / "log").read_text(encoding="utf-8")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what the tests are about."""


@dataclass
class TokenServer:
    """Gives real signed tokens: to the user all rights, to others none; takes identity tokens by POST."""

    certificate: Certificate
    service: str = "test-registry"
    issuer: str = "test-issuer"
    identity: str = "identity-of-ada"
    seconds: int = 300
    asked: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)  # method, user, scopes

    def __enter__(self) -> Self:
        """Listen."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None: ...

            def do_GET(self) -> None:
                fields = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                given = self.headers.get("Authorization", "")
                user = base64.b64decode(given.partition(" ")[2]).decode() if given else ""
                self._answer(fields.get("scope", []), user)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                fields = {key: values[0] for key, values in urllib.parse.parse_qs(body).items()}
                good = fields["grant_type"] == "refresh_token" and fields["refresh_token"] == outer.identity
                self._answer(fields["scope"].split(), f"{USER}:{PASSWORD}" if good else "nobody:x")

            def _answer(self, scopes: list[str], user: str) -> None:
                outer.asked.append((self.command, user.partition(":")[0], tuple(scopes)))
                if user not in {"", f"{USER}:{PASSWORD}"}:
                    self.send_response(401)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = json.dumps({"token": outer.token(scopes if user else []), "expires_in": outer.seconds}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def realm(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def token(self, scopes: list[str]) -> str:
        """Return a signed token for these scopes."""
        pem = self.certificate.pem.read_text(encoding="ascii")
        der = "".join(line for line in pem.splitlines() if "-----" not in line)
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        claims = {"iss": self.issuer, "sub": USER, "aud": self.service, "exp": now + 300, "nbf": now - 5, "iat": now}
        claims |= {"jti": os.urandom(8).hex(), "access": access}
        head = _b64(json.dumps({"typ": "JWT", "alg": "RS256", "x5c": [der]}).encode())
        signed = f"{head}.{_b64(json.dumps(claims).encode())}"
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.certificate.key)]
        signature = subprocess.run(command, input=signed.encode(), capture_output=True, check=True).stdout
        return f"{signed}.{_b64(signature)}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


@dataclass
class Request:
    """A request that the front saw: `body` is how many bytes of it have arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: int = 0


Act = Callable[["FrontHandler"], bool]  # True: the answer is given; False: go on to the registry


@dataclass
class Fault:
    """What the front does to requests of this method and path, so many times."""

    method: str
    path: str
    act: Act
    times: int = 1


class Front:
    """A server before a registry, which does as told to requests and passes the others on."""

    def __init__(self, registry: DockerRegistry) -> None:
        self.registry = registry
        self.faults: list[Fault] = []
        self.seen: list[Request] = []
        self.headers: dict[str, str] = {}  # put into each answer
        self.active = self.most_active = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (FrontHandler,), {"front": self}))
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, method: str, path: str, act: Act, times: int = 1) -> None:
        """Plan a fault."""
        self.faults.append(Fault(method, path, act, times))

    def asked(self, method: str = "", path: str = "") -> list[Request]:
        """Return the requests seen."""
        return [one for one in self.seen if method in {"", one.method} and re.search(path, one.path)]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class FrontHandler(BaseHTTPRequestHandler):
    """One connection to the front."""

    protocol_version = "HTTP/1.1"
    front: Front
    request_seen: Request

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def __getattr__(self, name: str) -> Any:
        """Serve every method alike."""
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    @property
    def left(self) -> int:
        """Bytes of the request's body that are not read yet."""
        return int(self.headers.get("Content-Length") or 0) - self.request_seen.body

    def take(self, size: int) -> bytes:
        """Read up to so many bytes of the body."""
        data = self.rfile.read(min(size, self.left))
        self.request_seen.body += len(data)
        return data

    def answer(self, status: int, body: bytes = b"", **headers: str) -> bool:
        """Answer, having read the whole request unless the answer closes the connection."""
        while "close" not in headers.values() and self.left and self.take(1 << 20):
            pass
        self.send_response(status)
        for key, value in {**self.front.headers, **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if "close" in headers.values():
            self.close_connection = True
        return True

    def cut(self, after: int) -> bool:
        """Read so much of the body, then break the connection."""
        while self.request_seen.body < after and self.take(min(1 << 16, after - self.request_seen.body)):
            pass
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        return True

    def _serve(self) -> None:
        front = self.front
        self.request_seen = Request(self.command, self.path, dict(self.headers.items()))
        with front.lock:
            front.seen.append(self.request_seen)
            front.active += 1
            front.most_active = max(front.most_active, front.active)
        try:
            for fault in front.faults:
                with front.lock:
                    meant = fault.times > 0 and fault.method == self.command and re.search(fault.path, self.path)
                    fault.times -= bool(meant)
                if meant and fault.act(self):
                    return
            self._pass_on()
        finally:
            with front.lock:
                front.active -= 1

    def _pass_on(self) -> None:
        connection = HTTPConnection(self.front.registry.host, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():  # some come several times
                connection.putheader(key, value)
            connection.endheaders()
            while self.left and (data := self.take(1 << 18)):
                connection.send(data)
            answer = connection.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for key, value in [*answer.getheaders(), *self.front.headers.items()]:
                if key.lower() not in {"transfer-encoding", "content-length"}:
                    self.send_header(key, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        finally:
            connection.close()


class ConnectProxy:
    """An HTTP proxy that opens every tunnel to one port of this machine, whatever host it is asked for."""

    def __init__(self, port: int) -> None:
        outer = self
        self.asked: list[tuple[str, str]] = []  # host, Proxy-Authorization

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None: ...

            def do_CONNECT(self) -> None:
                outer.asked.append((self.path, self.headers.get("Proxy-Authorization", "")))
                with socket.create_connection(("127.0.0.1", port)) as there:
                    self.send_response(200)
                    self.end_headers()
                    pair = {self.connection: there, there: self.connection}
                    while True:
                        for one in select.select(list(pair), [], [])[0]:
                            data = one.recv(1 << 16)
                            if not data:
                                return
                            pair[one].sendall(data)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
