"""The HTTP client of an Endpoint: what `connect` speaks. It knows a URL and a key, nothing of engines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from nbdeploy_server import wire

from nbdeploy.errors import BusyError, InvalidRequestError, RemoteError, UnauthorizedError, UnreachableError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 60.0  # seconds for a call, retries included
_RETRY = 0.1  # seconds before the first retry, doubled each time up to a second
_STREAM = wire.CONTENT_TYPE + "-seq"
_ITEM, _ERROR = 0, 1


class Client:
    """Calls one Endpoint; keeps its connections, is safe to use from several threads.

    Connection failures and 503 are tried again within the timeout. A request whose body was sent is never sent again
    unless `idempotent`: predict may have run.
    """

    def __init__(
        self, url: str, key: str = "", *, timeout: float = TIMEOUT, streams: bool = False, idempotent: bool = False
    ) -> None:
        self.url = url.rstrip("/")
        self.streams = streams
        self._timeout = timeout
        self._idempotent = idempotent
        self._headers = {"content-type": wire.CONTENT_TYPE, "accept": wire.CONTENT_TYPE}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._sync: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _http(self) -> httpx.Client:
        if self._sync is None:
            import httpx

            # trust_env off: a proxy of the environment must not see calls to this machine
            self._sync = httpx.Client(
                headers=self._headers, timeout=self._timeout, trust_env=not _is_local(self.url), limits=_limits()
            )
        return self._sync

    # -- one call -----------------------------------------------------------------------------------------------

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Return what predict returned.

        Raises:
            RemoteError and its kinds.
        """
        import httpx

        body = _pack(arguments)
        limit = time.monotonic() + self._timeout
        pause = _RETRY
        while True:
            try:
                response = self._http().post(f"{self.url}/predict", content=body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if time.monotonic() + pause > limit or not _is_worth_a_retry(error, self.url):
                    raise self._unreachable(error) from None
            except httpx.TimeoutException:
                raise RemoteError(f"{self.url} did not answer within {self._timeout:g} s.", status=504) from None
            except httpx.TransportError as error:
                if not self._idempotent or time.monotonic() + pause > limit:
                    raise self._cut(error) from None
            else:
                if response.status_code != 503 or time.monotonic() + pause > limit:  # noqa: PLR2004 - the HTTP status
                    return _result(response.status_code, response.content, response.headers.get("content-type", ""))
            time.sleep(pause)
            pause = min(1.0, pause * 2)

    async def call_async(self, arguments: Mapping[str, Any]) -> Any:
        """As `call`, for async code."""
        import asyncio

        import httpx

        body = _pack(arguments)
        limit = time.monotonic() + self._timeout
        pause = _RETRY
        async with httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, trust_env=not _is_local(self.url)
        ) as client:
            while True:
                try:
                    response = await client.post(f"{self.url}/predict", content=body)
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    if time.monotonic() + pause > limit or not _is_worth_a_retry(error, self.url):
                        raise self._unreachable(error) from None
                except httpx.TimeoutException:
                    raise RemoteError(f"{self.url} did not answer within {self._timeout:g} s.", status=504) from None
                except httpx.TransportError as error:
                    if not self._idempotent or time.monotonic() + pause > limit:
                        raise self._cut(error) from None
                else:
                    if response.status_code != 503 or time.monotonic() + pause > limit:  # noqa: PLR2004 - the HTTP status
                        return _result(response.status_code, response.content, response.headers.get("content-type", ""))
                await asyncio.sleep(pause)
                pause = min(1.0, pause * 2)

    def map(self, items: Iterable[Mapping[str, Any]], concurrency: int) -> list[Any]:
        """Call for each item, `concurrency` at once; results in order. A full queue is waited for."""
        from concurrent.futures import ThreadPoolExecutor

        def one(arguments: Mapping[str, Any]) -> Any:
            limit = time.monotonic() + self._timeout
            pause = _RETRY
            while True:
                try:
                    return self.call(arguments)
                except BusyError:
                    if time.monotonic() + pause > limit:
                        raise
                time.sleep(pause)
                pause = min(1.0, pause * 2)

        with ThreadPoolExecutor(max(1, concurrency)) as pool:
            return list(pool.map(one, items))

    # -- streams ------------------------------------------------------------------------------------------------

    def stream(self, arguments: Mapping[str, Any]) -> Iterator[Any]:
        """Yield what a generator yields, as it comes."""
        import httpx

        try:
            with self._http().stream(
                "POST", f"{self.url}/predict", content=_pack(arguments), headers={"accept": _STREAM}
            ) as response:
                kind = response.headers.get("content-type", "")
                if response.status_code != 200 or not kind.startswith(_STREAM):  # noqa: PLR2004 - the HTTP status
                    value = _result(response.status_code, response.read(), kind)
                    yield from value if isinstance(value, list) else [value]
                    return
                yield from _frames(response.iter_raw())
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from None
        except httpx.TransportError as error:
            raise self._cut(error) from None

    # -- words --------------------------------------------------------------------------------------------------

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"{self.url} cannot be reached ({error}). `nbdeploy ls` shows what runs; a stopped Endpoint starts with "
            "`nbdeploy start NAME`."
        )

    def _cut(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"The connection to {self.url} broke before the answer came ({error or type(error).__name__}). predict may "
            "have run; connect(..., idempotent=True) lets the client ask again."
        )


def _limits() -> httpx.Limits:
    import httpx

    # Above the server's own keep-alive there would be races; httpx's default of 5 s reconnects more than it need.
    return httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=30.0)


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1", "http://localhost", "http://[::1]"))


def _is_worth_a_retry(error: Exception, url: str) -> bool:
    """A name that does not resolve, or a port of this machine that nobody listens on, will not change in a minute."""
    text = str(error).lower()
    return not ("name or service" in text or "nodename" in text or ("refused" in text and _is_local(url)))


def _pack(arguments: Mapping[str, Any]) -> bytes:
    try:
        return wire.pack(dict(arguments), name="request")
    except wire.WireError as error:
        raise InvalidRequestError(f"The request cannot be sent: {error}.", status=422) from None


def _result(status: int, content: bytes, kind: str) -> Any:
    if status == 200:  # noqa: PLR2004 - the HTTP status
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
