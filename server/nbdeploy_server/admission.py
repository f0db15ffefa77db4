"""Admission: who may ask, and how much may wait. Everything here is decided before the body is read."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets

from nbdeploy_server.errors import RequestError
from nbdeploy_server.metrics import Metrics
from nbdeploy_server.settings import ReplicaSettings

Headers = dict[bytes, bytes]

# Names under which a browser on this machine may reach a public Endpoint: any other Host is a web page that made its
# own name point here (DNS rebinding).
_LOCAL_HOSTS = {b"127.0.0.1", b"localhost", b"[::1]", b""}


class Admission:
    """Checks key, origin, size and queue of a request.

    Raises:
        RequestError: 401, 403, 413, 429 or 503.
    """

    def __init__(self, settings: ReplicaSettings, metrics: Metrics, concurrency: int) -> None:
        self._digest = bytes.fromhex(settings.key_sha256)
        self._origins = tuple(origin.encode() for origin in settings.cors)
        self._any_host = settings.any_host
        self._max_body = settings.max_body
        self._limit = concurrency + settings.queue
        self._concurrency = concurrency
        self._metrics = metrics
        self._seconds = 0.0  # smoothed time of one call, for Retry-After
        self._prefix = secrets.token_hex(4).encode() + b"-%x"
        self._count = 0

    def check(self, headers: Headers) -> None:
        """Let the request pass, or raise."""
        if self._digest:
            self._check_key(headers)
        else:
            self.check_host(headers)
            self._check_origin(headers)
        length = headers.get(b"content-length")
        if length is not None and (not length.isdigit() or int(length) > self._max_body):
            raise self.too_large()
        self.check_queue()

    def check_queue(self) -> None:
        """Raise where no more may wait."""
        if self._metrics.inflight >= self._limit:
            self._reject("queue_full")
            wait = max(1, math.ceil(self._seconds * self._metrics.inflight / self._concurrency))
            raise RequestError(
                429,
                f"The queue is full: {self._metrics.inflight} requests are running or waiting. Try again in {wait} s, "
                "or deploy with more Replicas.",
                retry_after=wait,
            )

    def check_host(self, headers: Headers) -> None:
        """For a public Endpoint, raise where the name by which it was asked is not this machine's own."""
        if self._digest or self._any_host:
            return
        host = headers.get(b"host", b"")
        name = host[: host.index(b"]") + 1] if host.startswith(b"[") and b"]" in host else host.partition(b":")[0]
        if name.lower() not in _LOCAL_HOSTS:
            self._reject("host")
            raise RequestError(403, "This Endpoint answers only to local names such as 127.0.0.1.")

    def too_large(self) -> RequestError:
        """Count a body that is too large and return the error."""
        self._reject("too_large")
        return RequestError(413, f"The body is larger than {self._max_body >> 20} MiB, the most this Endpoint reads.")

    def _check_key(self, headers: Headers) -> None:
        given = headers.get(b"authorization", b"")
        token = given[7:] if given[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(hashlib.sha256(token).digest(), self._digest):
            self._reject("key")
            raise RequestError(
                401,
                ("The key is wrong." if token else "This Endpoint wants a key.")
                + " Send it as 'Authorization: Bearer KEY'; `nbdeploy key NAME` prints it.",
            )

    def _check_origin(self, headers: Headers) -> None:
        """Without a key, any page in the user's browser could call: only its own /docs and allowed ones may."""
        origin = headers.get(b"origin")
        host = headers.get(b"host", b"")  # https where a proxy or gateway took the encryption off
        if origin is None or origin in {b"http://" + host, b"https://" + host} or self._allows(origin):
            return
        self._reject("origin")
        raise RequestError(403, "Pages of this origin may not call this Endpoint; deploy it with --cors ORIGIN.")

    def _allows(self, origin: bytes) -> bool:
        return origin in self._origins or b"*" in self._origins

    def _reject(self, reason: str) -> None:
        self._metrics.rejected[reason] = self._metrics.rejected.get(reason, 0) + 1

    def observe(self, seconds: float) -> None:
        """Remember how long a call took."""
        self._seconds += (seconds - self._seconds) * 0.1

    def request_id(self, headers: Headers) -> bytes:
        """Return the caller's request id where it is fit to be repeated, else a new one."""
        given = headers.get(b"x-request-id")
        if given and len(given) <= 128 and given.isascii() and given.decode().isprintable():  # noqa: PLR2004 - as proxies allow
            return given
        self._count += 1
        return self._prefix % self._count

    def cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Return the headers that let a page of an allowed origin read the answer."""
        origin = headers.get(b"origin")
        if origin is None or not self._allows(origin):
            return []
        shown = (b"access-control-expose-headers", b"x-request-id, server-timing, retry-after")
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin"), shown]
