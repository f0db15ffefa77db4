"""The only file that sends requests to the API server: time limits, repetition, new logins, refusals in words."""

from __future__ import annotations

import json
import random
import re
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from nbdeploy.engines.kubernetes.connecting import Connection
from nbdeploy.engines.kubernetes.refusals import (
    BUSY,
    Asked,
    ChangedError,
    UnavailableError,
    hopeful,
    refused,
    status_of,
    unreachable,
    unreadable,
)
from nbdeploy.engines.kubernetes.streaming import Stream
from nbdeploy.errors import EngineError
from nbdeploy.oci.transport import without_login

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
RETRY_SECONDS = 30.0  # that a request is tried again, once the server is known to be there
FIRST_SECONDS = 4.0  # that a first connection is tried again: a wrong address stays wrong
JSON = "application/json"
_NO_SUCH_GROUP = b"404 page not found"  # the API server on paths of kinds that it does not know
_FAILED = 400  # from it on, a status is of a failure
_BAD, _UNAUTHORIZED, _NOT_FOUND, _CONFLICT, _GONE = 400, 401, 404, 409, 410
_NOTHING = (_BAD, _NOT_FOUND, _GONE)  # a container that has not started; no such object; a version that is too old


class Session:
    """Sends requests: rights, certificates, time limits, repetition, refusals in words."""

    def __init__(self, connection: Connection) -> None:
        self.server = connection.server
        self.requests = 0
        self.closed = False
        self.warnings: list[str] = []
        self._connection = connection
        self._lock = threading.Lock()
        self._pool: Any = None
        self._reached = False
        self._streams: set[Stream] = set()

    def ask(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        accept: str = JSON,
        content: str = JSON,
        repeatable: bool = True,
        absent: bool = False,
    ) -> dict[str, Any] | None:
        """Send one request and return the answer's JSON; None for a 404 where `absent` is allowed.

        Raises EngineError in words for every refusal. Where nothing answers, or 429 or 5xx, the request is sent again
        for up to RETRY_SECONDS; one that is not `repeatable` only where it cannot have been carried out.
        """
        data = json.dumps(body, separators=(",", ":")).encode() if body is not None else b""
        headers = {"accept": accept, **({"content-type": content} if data else {})}
        response = self.open(
            method, path, asked, query=query, data=data, headers=headers, repeatable=repeatable, tolerated=(_NOT_FOUND,)
        )
        if response.status == _NOT_FOUND:
            said = status_of(response.data)
            if not said and _NO_SUCH_GROUP not in response.data:
                raise unreadable(self.server, response.data)  # something else answers at this address
            if absent and (said.get("details") or {}).get("kind") != "namespaces":
                return None
            raise self._refused(response, asked)
        try:
            found = json.loads(response.data)
        except ValueError as error:
            raise unreadable(self.server, response.data) from error
        return found if isinstance(found, dict) else {}

    def open(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        data: bytes = b"",
        headers: Mapping[str, str] | None = None,
        read: float = READ_SECONDS,
        patience: float = RETRY_SECONDS,
        repeatable: bool = True,
        streamed: bool = False,
        tolerated: tuple[int, ...] = (),
    ) -> Any:
        """Send one request as `ask` does and return the answer as urllib3 has it, its body unread where `streamed`.

        Args:
            method: of HTTP.
            path: of the API.
            query: its empty values are left out.
            data: body, in JSON.
            headers: of the request; who we are is added.
            asked: for words.
            read: seconds that the server may be silent.
            patience: seconds that the request may be repeated for.
            repeatable: it may be sent twice.
            streamed: leave the body to be read.
            tolerated: statuses that are no failure.
        """
        import urllib3

        given = urlencode({key: value for key, value in (query or {}).items() if value})
        url = f"{self.server}{path}{'?' + given if given else ''}"
        began, pause, renewed = time.monotonic(), 0.1, False
        while True:
            wait = pause
            try:
                response = self._send(method, url, data, dict(headers or {}), read, streamed=streamed)
            except urllib3.exceptions.HTTPError as error:
                failure: EngineError = UnavailableError(self._unreachable(error))
                failure.__cause__ = error
                again = hopeful(error, repeatable=repeatable)
            else:
                if response.status < _FAILED or response.status in tolerated:
                    return response
                if response.status == _UNAUTHORIZED and not renewed:
                    renewed = True
                    self._renew()
                    continue
                failure = self._refused(response, asked)
                again = _again(method, response.status, failure, repeatable=repeatable)
                wait = max(wait, _retry_after(response))
            limit = patience if self._reached else min(patience, FIRST_SECONDS)
            if not again or self.closed or time.monotonic() - began + wait > limit:
                raise failure
            time.sleep(wait)
            pause = min(pause * 2, 5.0) * random.uniform(0.8, 1.0)  # noqa: S311 - so that clients do not march in step

    def stream(self, path: str, asked: Asked, *, query: Mapping[str, str], read: float) -> Stream | None:
        """GET an answer that goes on; None where there is nothing to read from, or not (any more) from there."""
        response = self.open("GET", path, asked, query=query, read=read, streamed=True, tolerated=_NOTHING)
        if response.status in _NOTHING:
            response.drain_conn()
            return None
        made = Stream(response, self._streams.discard)
        self._streams.add(made)
        if self.closed:  # meanwhile: `close` may have missed it
            made.stop()
        return made

    def text(self, path: str, asked: Asked, *, query: Mapping[str, str]) -> str:
        """GET a whole text; "" where there is none."""
        response = self.open("GET", path, asked, query=query, tolerated=_NOTHING)
        return "" if response.status in _NOTHING else bytes(response.data).decode(errors="replace")

    def close(self) -> None:
        """End all connections, those that other threads read from as well."""
        self.closed = True
        with self._lock:
            pool, self._pool = self._pool, None
        for stream in list(self._streams):
            stream.stop()
        if pool is not None:
            pool.clear()

    def _send(self, method: str, url: str, data: bytes, headers: dict[str, str], read: float, *, streamed: bool) -> Any:
        from urllib3 import Timeout

        with self._lock:
            self.requests += 1
            pool = self._pool = self._pool or self._connected()
        headers |= self._connection.headers()
        response = pool.request(
            method,
            url,
            body=data or None,
            headers=headers,
            timeout=Timeout(connect=CONNECT_SECONDS, read=read),
            retries=False,
            redirect=False,
            preload_content=not streamed,
        )
        self._reached = True
        for warning in response.headers.getlist("warning"):
            text = warning.partition('"')[2].rpartition('"')[0].replace('\\"', '"') or warning
            if text not in self.warnings:
                self.warnings.append(text)
        return response

    def _connected(self) -> Any:
        from kubernetes.client.rest import RESTClientObject

        configuration = self._connection.configuration
        configuration.connection_pool_maxsize = 32
        if not configuration.verify_ssl:  # the kubeconfig says so; a warning at each request tells nothing new
            host = re.escape(urlsplit(self.server).hostname or "")
            warnings.filterwarnings("ignore", f"Unverified HTTPS request is being made to host '{host}'")
        return RESTClientObject(configuration).pool_manager

    def _renew(self) -> None:
        self._connection.renew()
        with self._lock:
            self._pool = None  # what is being read from the old one is read to its end

    def _refused(self, response: Any, asked: Asked) -> EngineError:
        return refused(response.status, response.data, asked, server=self.server, context=self._connection.context)

    def _unreachable(self, error: Exception) -> str:
        configuration = self._connection.configuration
        proxy = without_login(str(configuration.proxy or ""))
        return unreachable(error, self.server, proxy=proxy, in_cluster=self._connection.in_cluster)


def _again(method: str, status: int, failure: EngineError, *, repeatable: bool) -> bool:
    """Tell whether a refusal may pass by itself."""
    if status == _CONFLICT:  # the server lost a race of its own; where a version was given, it is the answer
        return repeatable and method == "PATCH" and isinstance(failure, ChangedError)
    return status in BUSY


def _retry_after(response: Any) -> float:
    """Return the seconds that a refusal asks to wait."""
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date: nobody who stands before an API server sends one
        return 0.0
