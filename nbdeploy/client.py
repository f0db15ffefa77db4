"""The HTTP client of an Endpoint: what `connect` speaks. It knows a URL and a key, nothing of engines."""

from __future__ import annotations

import json
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from nbdeploy_server import wire

from nbdeploy.errors import BusyError, InvalidRequestError, RemoteError, UnauthorizedError, UnreachableError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 60.0  # seconds for a call, retries included
LOCAL_PATIENCE = 3.0  # seconds to ask a port of this machine that refuses: it is restarting, or it is stopped
OK, BUSY_STARTING = 200, 503
_RETRY = 0.1  # seconds before the first retry, doubled each time up to a second
_STREAM = wire.CONTENT_TYPE + "-seq"
_ITEM, _ERROR = 0, 1


class Client:
    """Calls one Endpoint; keeps its connections, is safe to use from several threads.

    Connection failures and 503 are tried again within the timeout. A request whose body was sent is never sent again
    unless `idempotent`: predict may have run.

    Where a port of this machine refuses, `revive` is called once in a call: it has what stands there brought up again
    and returns its URL.
    """

    def __init__(
        self,
        url: str,
        key: str = "",
        *,
        timeout: float = TIMEOUT,
        idempotent: bool = False,
        revive: Callable[[], str] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.idempotent = idempotent
        self._revive = revive
        self._headers = {"content-type": wire.CONTENT_TYPE, "accept": wire.CONTENT_TYPE}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._sync: httpx.Client | None = None
        self._names: tuple[str, ...] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            if self._sync is not None:
                self._sync.close()
                self._sync = None

    def _http(self) -> httpx.Client:
        with self._lock:
            if self._sync is None:
                import httpx

                # trust_env off: a proxy of the environment must not see calls to this machine
                self._sync = httpx.Client(
                    headers=self._headers, trust_env=not _is_local(self.url), limits=_limits(), verify=_tls(self.url)
                )
                # A Client that is dropped closes its sockets without a ResourceWarning in the user's own tests.
                weakref.finalize(self, self._sync.close)
            return self._sync

    def revive(self) -> None:
        """Have what stands at a port of this machine brought up again; its URL may have changed."""
        if self._revive is not None:
            self.url = self._revive().rstrip("/")

    # -- one call -----------------------------------------------------------------------------------------------

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Return what predict returned.

        Raises:
            RemoteError and its kinds.
        """
        import httpx

        body = _pack(arguments)
        tries = _Tries(self)
        while True:
            try:
                response = self._http().post(f"{self.url}/predict", content=body, timeout=tries.left)
            except httpx.TransportError as error:
                pause = tries.after(error)
            else:
                if response.status_code != BUSY_STARTING or tries.over:
                    return _result(response.status_code, response.content, response.headers.get("content-type", ""))
                pause = tries.pause()
            time.sleep(pause)

    async def call_async(self, arguments: Mapping[str, Any]) -> Any:
        """As `call`, for async code."""
        import asyncio

        import httpx

        body = _pack(arguments)
        tries = _Tries(self)
        async with httpx.AsyncClient(
            headers=self._headers, trust_env=not _is_local(self.url), verify=_tls(self.url)
        ) as client:
            while True:
                try:
                    response = await client.post(f"{self.url}/predict", content=body, timeout=tries.left)
                except httpx.TransportError as error:
                    pause = tries.after(error)
                else:
                    if response.status_code != BUSY_STARTING or tries.over:
                        return _result(response.status_code, response.content, response.headers.get("content-type", ""))
                    pause = tries.pause()
                await asyncio.sleep(pause)

    def map(self, items: Iterable[Mapping[str, Any]], concurrency: int) -> list[Any]:
        """Call for each item, `concurrency` at once; results in order. A full queue is waited for."""
        from concurrent.futures import ThreadPoolExecutor

        def one(arguments: Mapping[str, Any]) -> Any:
            tries = _Tries(self)
            while True:
                try:
                    return self.call(arguments)
                except BusyError:
                    if tries.over:
                        raise
                time.sleep(tries.pause())

        with ThreadPoolExecutor(max(1, concurrency)) as pool:
            return list(pool.map(one, items))

    def parameters(self) -> tuple[str, ...]:
        """Return the names of predict's parameters in their order, as the Endpoint's schema tells them."""
        if self._names is None:
            import httpx

            try:
                document = self._document().json()
                body = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
                self._names = tuple(body["schema"]["properties"])
            except (httpx.TransportError, ValueError, KeyError) as error:
                raise UnreachableError(f"{self.url} does not tell its parameters ({error}): name them.") from None
        return self._names

    def _document(self) -> httpx.Response:
        import httpx

        try:
            return self._http().get(f"{self.url}/openapi.json", timeout=self.timeout)
        except httpx.ConnectError:
            self.revive()
            return self._http().get(f"{self.url}/openapi.json", timeout=self.timeout)

    # -- streams ------------------------------------------------------------------------------------------------

    def stream(self, arguments: Mapping[str, Any]) -> Iterator[Any]:
        """Yield what a generator yields, as it comes; the timeout is that of each wait for an item.

        Raises:
            RemoteError and its kinds; UnreachableError where the stream broke off. It is tried again only as long as
            nothing has come.
        """
        body = _pack(arguments)
        tries = _Tries(self)
        while True:
            begun = False
            try:
                for item in self._items(body, tries):
                    begun = True
                    yield item
            except _NotNowError:
                pause = tries.pause()
            except _TransportError as error:
                pause = tries.after(error.cause, again=not begun)
            else:
                return
            time.sleep(pause)

    def _items(self, body: bytes, tries: _Tries) -> Iterator[Any]:
        import httpx

        head = {"accept": _STREAM}
        try:
            with self._http().stream(
                "POST", f"{self.url}/predict", content=body, headers=head, timeout=self.timeout
            ) as response:
                kind = response.headers.get("content-type", "")
                if response.status_code == BUSY_STARTING and not tries.over:
                    raise _NotNowError
                if response.status_code != OK or not kind.startswith(_STREAM):
                    value = _result(response.status_code, response.read(), kind)
                    yield from value if isinstance(value, list) else [value]
                    return
                yield from _frames(response.iter_raw())
        except httpx.TransportError as error:
            raise _TransportError(error) from None


class _NotNowError(Exception):
    """The Endpoint answered 503."""


class _TransportError(Exception):
    """httpx's error, told apart from what the reader of the items raises into the generator."""

    def __init__(self, cause: httpx.TransportError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Tries:
    """How often one call may still be tried, and the words where it may not."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._began = time.monotonic()
        self._pause = _RETRY
        self._revived = False

    @property
    def left(self) -> float:
        """Seconds of the timeout that are left, enough for one last try."""
        return max(0.05, self._began + self._client.timeout - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether there is no time for a pause and another try."""
        return time.monotonic() + self._pause > self._began + self._client.timeout

    def pause(self) -> float:
        """Return the seconds to wait before the next try."""
        pause, self._pause = self._pause, min(1.0, self._pause * 2)
        return pause

    def after(self, error: httpx.TransportError, *, again: bool = True) -> float:
        """Return the pause before the next try after this error, or raise what the caller shall see."""
        import httpx

        url = self._client.url
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            if self._refused_here(error) and not self._revived:
                self._revived = True
                self._client.revive()
            if self.over or not self._may_change(error):
                raise UnreachableError(
                    f"{url} cannot be reached ({error}). `nbdeploy ls` shows what runs; a stopped Endpoint starts with "
                    "`nbdeploy start NAME`."
                ) from None
        elif isinstance(error, httpx.TimeoutException):
            raise RemoteError(f"{url} did not answer within {self._client.timeout:g} s.", status=504) from None
        elif not (again and self._client.idempotent) or self.over:
            raise UnreachableError(
                f"The connection to {url} broke before the answer came ({str(error) or type(error).__name__}). predict "
                "may have run; connect(..., idempotent=True) lets the client ask again."
            ) from None
        return self.pause()

    def _may_change(self, error: Exception) -> bool:
        """A name that does not resolve stays so; a port of this machine without a listener gets one soon or never."""
        text = str(error).lower()
        if "name or service" in text or "nodename" in text:
            return False
        return not self._refused_here(error) or time.monotonic() - self._began < LOCAL_PATIENCE

    def _refused_here(self, error: Exception) -> bool:
        return "refused" in str(error).lower() and _is_local(self._client.url)


def _tls(url: str) -> bool | ssl.SSLContext:
    """Spare a plain http:// URL the reading of every certificate authority, which takes 20 ms and more."""
    return True if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _limits() -> httpx.Limits:
    import httpx

    # Above the server's own keep-alive there would be races; httpx's default of 5 s reconnects more than it need.
    return httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=30.0)


def _is_local(url: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1"}


def _pack(arguments: Mapping[str, Any]) -> bytes:
    try:
        return wire.pack(dict(arguments), name="request")
    except wire.WireError as error:
        raise InvalidRequestError(f"The request cannot be sent: {error}.", status=422) from None


def _result(status: int, content: bytes, kind: str) -> Any:
    if status == OK:
        try:
            return wire.unpack(content) if kind.startswith(wire.CONTENT_TYPE) else json.loads(content)
        except ValueError as error:
            raise RemoteError(f"The answer cannot be read: {error}.", status=status) from None
    raise failure(status, content)


def failure(status: int, content: bytes) -> RemoteError:
    """Return the exception for an error answer."""
    try:
        problem = json.loads(content)
        detail = str(problem["detail"])
        if len(problem.get("errors") or ()) > 1:  # the detail names the first one only
            detail = "; ".join(f"{row['parameter']} {row['message']}" for row in problem["errors"]) + "."
    except (ValueError, KeyError, TypeError):
        problem, detail = {}, content[:200].decode("utf-8", "replace") or "no words"
    kinds: dict[int, type[RemoteError]] = {
        400: InvalidRequestError,
        401: UnauthorizedError,
        422: InvalidRequestError,
        429: BusyError,
    }
    return kinds.get(status, RemoteError)(
        detail,
        status=status,
        remote_type=str(problem.get("exception", "")),
        remote_traceback=tuple(str(line) for line in problem.get("traceback", ())),
    )


def _frames(chunks: Iterator[bytes]) -> Iterator[Any]:
    """Cut tagged frames out of a stream; one that ends without its end tag broke."""
    data = b""
    for chunk in chunks:
        data += chunk
        while len(data) >= 5:  # noqa: PLR2004 - tag and length
            size = int.from_bytes(data[1:5], "big")
            if len(data) < 5 + size:
                break
            tag, payload, data = data[0], data[5 : 5 + size], data[5 + size :]
            if tag == _ITEM:
                yield wire.unpack(payload)
            elif tag == _ERROR:
                raise failure(int(json.loads(payload).get("status", 500)), payload)
            else:
                return
    raise UnreachableError("The stream broke off before its end.")
