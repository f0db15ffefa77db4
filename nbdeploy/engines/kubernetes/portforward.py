"""The API server over asyncio, as far as a forwarder needs it: a GET, a watch, and port-forwards to pods.

A port-forward is a WebSocket of the protocol v4.channel.k8s.io: the first byte of each message is its channel, 0 for
data and 1 for an error in words; the first message of either repeats the port.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

from nbdeploy.engines.kubernetes.credentials import Access

OPEN_TIMEOUT = 15.0  # seconds for a connection, its encryption and the head of the answer
WATCH = 240  # seconds a watch lasts before it is asked for again
_BUFFER = 1 << 16
_FRAME = 1 << 15  # bytes of one message to a pod: what the other side copies at once, too
_LARGEST = 1 << 24  # bytes of a message from a pod that are believed
_SWITCHING, _OK = 101, 200
_DATA, _ERROR = 0, 1
_CONTINUED, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x2, 0x8, 0x9, 0xA
_SHORT, _LONG = 126, 127  # sizes that say that the size follows in 2 or 8 bytes (RFC 6455, 5.2)
_NEVER = ("refused", "failed to connect", "not running", "not found", "is closed", "no such")  # before a byte arrived


class ApiError(Exception):
    """The API server answered with an error status, or (0) cannot be reached."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class TunnelError(Exception):
    """A tunnel broke; `unused` where nothing of what was sent can have come to the pod's server."""

    def __init__(self, words: str, *, unused: bool = False) -> None:
        super().__init__(words)
        self.unused = unused


class Tunnel:
    """One connection to a port of a pod."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._begun: set[int] = set()
        self._channel = _DATA
        self.heard = time.monotonic()  # when anything last came, pongs included

    async def send(self, data: bytes) -> None:
        """Send bytes; returns when there is room for more. Raises TunnelError."""
        try:
            for start in range(0, len(data), _FRAME):
                self._write(_BINARY, b"\0" + data[start : start + _FRAME])
                await self._writer.drain()
        except OSError as error:
            raise TunnelError(f"the connection to the pod broke ({error})") from None

    def ping(self) -> None:
        """Ask for a sign of life: it also keeps proxies on the way from closing a connection that is quiet."""
        self._write(_PING, b"")

    def _write(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        follows = size.to_bytes(2, "big") if size >= _SHORT else b""
        head = bytes((0x80 | opcode, 0x80 | (_SHORT if follows else size)))
        # A mask of zeros changes nothing and costs nothing: masks protect proxies from scripts in browsers.
        self._writer.write(b"".join((head, follows, b"\0\0\0\0", payload)))

    async def receive(self) -> bytes:
        """Return the next bytes; b"" once the pod's server has closed. Raises TunnelError."""
        while True:
            try:
                opcode, payload = await self._message()
            except (OSError, asyncio.IncompleteReadError) as error:
                raise TunnelError(f"the connection to the pod broke ({error})") from None
            self.heard = time.monotonic()
            if opcode == _CLOSE:
                return b""
            if opcode == _PING:
                self._write(_PONG, payload)
            elif opcode in {_CONTINUED, _BINARY}:
                data = self._of_channel(payload, continued=opcode == _CONTINUED)
                if data:
                    return data

    async def _message(self) -> tuple[int, bytes]:
        opcode, size = await self._reader.readexactly(2)
        size &= 0x7F
        if size in {_SHORT, _LONG}:
            size = int.from_bytes(await self._reader.readexactly(2 if size == _SHORT else 8), "big")
        if size > _LARGEST:
            raise TunnelError("the API server sent what is no port-forward")
        return opcode & 0xF, await self._reader.readexactly(size)

    def _of_channel(self, payload: bytes, *, continued: bool) -> bytes:
        """Return data of the pod; b"" for the first messages, which only repeat the port."""
        if not continued:
            self._channel, payload = (payload[0], payload[1:]) if payload else (_DATA, b"")
            if self._channel not in self._begun:
                self._begun.add(self._channel)
                return b""
        if self._channel == _ERROR and payload:
            words = payload.decode("utf-8", "replace")
            raise TunnelError(words, unused=any(one in words.lower() for one in _NEVER))
        return payload if self._channel == _DATA else b""

    def close(self) -> None:
        """Close; whoever receives gets an error."""
        with contextlib.suppress(OSError, RuntimeError):
            if not self._writer.is_closing():
                self._write(_CLOSE, (1000).to_bytes(2, "big"))
        self._writer.close()

    def abort(self) -> None:
        """Close without saying so, where nobody answers any more."""
        self._writer.transport.abort()


class Api:
    """One API server, with one set of credentials. Every request has a connection of its own."""

    def __init__(self, access: Access, namespace: str) -> None:
        self.server = access.server
        self._access = access
        self._namespace = namespace
        self._url = urlsplit(access.server)
        self._tls = access.tls()

    async def get(self, group: str, resource: str, **query: str) -> Any:
        """Return the JSON of a GET in the namespace; raises ApiError. `group` is "api/v1" or "apis/GROUP/VERSION"."""
        reader, writer, headers = await self._request(self._path(group, resource, query), {}, _OK)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                return json.loads(b"".join([part async for part in _body(reader, headers)]))
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise self._unreachable(error) from None
        finally:
            writer.close()

    async def watch(self, group: str, resource: str, **query: str) -> AsyncGenerator[dict[str, Any]]:
        """Yield the events of a watch until it ends; raises ApiError."""
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH)}
        reader, writer, headers = await self._request(self._path(group, resource, query), {}, _OK)
        rest = b""
        limit = time.monotonic() + WATCH + 15  # a machine that slept has a connection that nobody ends
        try:
            parts = aiter(_body(reader, headers))
            while True:
                part = await asyncio.wait_for(anext(parts, b""), limit - time.monotonic())
                if not part:
                    return
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    yield json.loads(line)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise self._unreachable(error) from None
        finally:
            writer.close()

    async def tunnel(self, pod: str, port: int) -> Tunnel:
        """Open a connection to a port of a pod; raises ApiError."""
        headers = {
            "Accept": "*/*",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Protocol": "v4.channel.k8s.io",
        }
        path = self._path("api/v1", f"pods/{pod}/portforward", {"ports": str(port)})
        reader, writer, _headers = await self._request(path, headers, _SWITCHING)
        return Tunnel(reader, writer)

    def _path(self, group: str, resource: str, query: Mapping[str, str]) -> str:
        prefix = self._url.path.rstrip("/")
        return f"{prefix}/{group}/namespaces/{self._namespace}/{resource}" + (f"?{urlencode(query)}" if query else "")

    async def _request(
        self, path: str, headers: Mapping[str, str], wanted: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, dict[str, str]]:
        """Send a GET and read the head of its answer; an answer of another status is an ApiError."""
        rows = {"Host": self._url.netloc, "User-Agent": "nbdeploy", "Accept": "application/json", **headers}
        if self._access.authorization:
            rows["Authorization"] = self._access.authorization
        async with contextlib.AsyncExitStack() as unless_given:
            try:
                async with asyncio.timeout(OPEN_TIMEOUT):
                    reader, writer = await self._connect()
                    unless_given.callback(writer.close)
                    writer.write(f"GET {path} HTTP/1.1\r\n".encode() + _lines(rows))
                    status, answered = await _head(reader)
                    if status == wanted:
                        unless_given.pop_all()
                        return reader, writer, answered
                    words = _words(b"".join([part async for part in _body(reader, answered)]), status)
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
                raise self._unreachable(error) from None
            raise ApiError(status, words)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._url.hostname or "", self._url.port or (443 if self._tls else 80)
        name = (self._access.server_name or host) if self._tls else None
        if not self._access.proxy:
            reader, writer = await asyncio.open_connection(
                host, port, ssl=self._tls, server_hostname=name, limit=_BUFFER
            )
        else:
            reader, writer = await self._through_proxy(f"{host}:{port}")
            if self._tls:
                await writer.start_tls(self._tls, server_hostname=name)
        _keep_alive(writer.get_extra_info("socket"))
        return reader, writer

    async def _through_proxy(self, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        proxy = urlsplit(self._access.proxy)
        tls = ssl.create_default_context() if proxy.scheme == "https" else None
        reader, writer = await asyncio.open_connection(proxy.hostname, proxy.port or 3128, ssl=tls, limit=_BUFFER)
        rows = {"Host": target}
        if proxy.username:
            login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            rows["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        writer.write(f"CONNECT {target} HTTP/1.1\r\n".encode() + _lines(rows))
        status, _headers = await _head(reader)
        if status != _OK:
            writer.close()
            raise ConnectionError(f"the proxy {proxy.hostname} answered {status}")
        return reader, writer

    def _unreachable(self, error: Exception) -> ApiError:
        return ApiError(0, f"{self.server} cannot be reached ({str(error) or type(error).__name__})")


def _lines(rows: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in rows.items()).encode() + b"\r\n"


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *rows = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (row.partition(":") for row in rows if row)
    headers = {name.strip().lower(): value.strip() for name, _colon, value in pairs}
    try:
        return int(first.split(" ")[1]), headers
    except IndexError:
        raise ValueError(f"it answered {first[:40]!r}, which is no HTTP") from None


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncGenerator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while part := await reader.read(_BUFFER):
            yield part


def _words(body: bytes, status: int) -> str:
    """Return what the API server says of an error: the message of its Status object."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip() or f"HTTP {status}"


def _keep_alive(sock: socket.socket) -> None:
    """Notice within a minute that the other end is gone: a laptop slept, a VPN was closed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for names, value in ((("TCP_KEEPIDLE", "TCP_KEEPALIVE"), 20), (("TCP_KEEPINTVL",), 10), (("TCP_KEEPCNT",), 3)):
        option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
