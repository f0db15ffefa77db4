"""Requests to one registry that end well or in words: authorised, redirected, tried again with patience."""

from __future__ import annotations

import datetime as dt
import email.utils
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from nbdeploy.errors import RegistryError
from nbdeploy.oci import refusal
from nbdeploy.oci.tokens import Scopes, Tokens
from nbdeploy.oci.transport import CutError, Transport

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

T = TypeVar("T")

PATIENCE = 6  # lost connections in one operation before it is given up
_LONGEST = 60.0  # seconds between two tries, whatever the registry asks for
_HOPS = 5
_RENEWAL = 3  # patience that a refused token takes: the second refusal in one operation is believed
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_TLS_WANTED = (b"HTTP request to an HTTPS server", b"HTTP request was sent to HTTPS port")


class UndecidedError(RegistryError):
    """The time was over while the registry did no more than make us wait."""


class Session:
    """What Registry and its uploads share. Many threads may use it. See Registry for the arguments."""

    def __init__(self, host: str, environ: Mapping[str, str], delay: float, seconds: float = math.inf) -> None:
        self.host = host
        self.transport = Transport(host, environ, seconds)
        self._tokens = Tokens(self.transport, environ)
        self._delay = delay

    def patiently(self, action: Callable[[], T], patience: int = PATIENCE) -> T:
        """Return the action's result; it is done again after a CutError, later each time, until patience or time ends.

        Raises UndecidedError where it is the time, and the registry is merely slow; else RegistryError.
        """
        left, wait = patience, self._delay
        while True:
            try:
                return action()
            except CutError as error:
                left -= error.cost
                seconds = wait * random.uniform(0.5, 1.5) if error.after is None else error.after  # noqa: S311 - jitter
                seconds = min(seconds, _LONGEST)
                late = seconds >= self.transport.left
                if left <= 0 or late:
                    kind = UndecidedError if late and error.slow else RegistryError
                    raise kind(str(error)) from error
                time.sleep(seconds)
                wait *= 2

    def ask(
        self,
        method: str,
        path: str,
        *,
        scopes: Scopes,
        action: str,
        expect: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        stream: bool = False,
        patience: int = PATIENCE,
    ) -> BaseHTTPResponse:
        """Make a small request, again where that may help, and return an answer whose status is expected."""
        return self.patiently(
            lambda: self.once(
                method, path, scopes=scopes, action=action, expect=expect, headers=headers, body=body, stream=stream
            ),
            patience,
        )

    def once(
        self,
        method: str,
        target: str,
        *,
        scopes: Scopes,
        action: str,
        expect: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes | memoryview] | None = None,
        stream: bool = False,
        slow: bool = False,
    ) -> BaseHTTPResponse:
        """Make one request and follow its redirects.

        Args:
            method: HTTP method.
            target: a path of the registry, or an address that `transport.locate` gave.
            scopes: what a token must allow.
            action: what to call this in an error, like "push to team/iris".
            expect: statuses that are returned.
            headers: those beside Authorization.
            body: what is sent.
            stream: leave the answer's body to be read by the caller.
            slow: wait long for the answer, since the registry has much to do.

        Raises CutError where another try may help, else RegistryError.
        """
        url = self.transport.url(target) if target.startswith("/") else target
        for _ in range(_HOPS):
            used = self._tokens.header(scopes) if self.transport.trusts(url) else ""
            sent = {**(headers or {}), **({"Authorization": used} if used else {})}
            answer = self.transport.send(method, url, headers=sent, body=body, stream=stream, slow=slow)
            if answer.status in expect:
                return answer
            if answer.status not in _REDIRECTS or body or not (location := answer.headers.get("Location")):
                break
            answer.drain_conn()
            url = self.transport.locate(url, location, upload=method not in {"GET", "HEAD"})
        raise self._refused(answer, url, scopes, used, action)

    def _refused(self, answer: BaseHTTPResponse, url: str, scopes: Scopes, used: str, action: str) -> RegistryError:
        """Return the error for an unexpected answer, once what it teaches (a login, TLS) is learnt."""
        ours, body = self.transport.trusts(url), answer.data
        error = refusal.refusal(self.host, action, answer.status, body, known=self._tokens.known)
        if ours and answer.status == HTTPStatus.UNAUTHORIZED and self._tokens.renew(answer, scopes, used):
            error = refusal.refusal(self.host, action, answer.status, body, known=self._tokens.known)
            return CutError(str(error), cost=_RENEWAL, after=0.0)
        if any(words in body for words in _TLS_WANTED) and self.transport.use_tls():
            return CutError(str(error), after=0.0)
        if answer.status in _AGAIN and not refusal.is_full(answer.status, body):
            after = _retry_after(answer.headers.get("Retry-After", ""))
            slow = after is not None or answer.status == HTTPStatus.TOO_MANY_REQUESTS
            return CutError(str(error), after=after, slow=slow)
        return error


def _retry_after(value: str) -> float | None:
    """Return the seconds that a Retry-After asks for: it holds seconds or a date."""
    if value.strip().isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when - dt.datetime.now(tz=when.tzinfo)).total_seconds())
