"""What to put into `Authorization` for one registry: Basic, or tokens from the server that the registry names.

A token is for one set of scopes, and lives for minutes; it is asked for again before its end, or when the registry no
longer takes it. The user's credentials are looked up when a registry first asks for them, and go to the registry
itself or to its token server, nowhere else.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from nbdeploy.errors import RegistryError
from nbdeploy.oci.credentials import Credentials, find
from nbdeploy.oci.reference import is_loopback
from nbdeploy.oci.transport import CutError, Transport

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from urllib3 import BaseHTTPResponse

Scopes = frozenset[str]  # like "repository:team/iris:pull,push"

_CLIENT = "nbdeploy"
_LEAST_SECONDS = 60.0  # a token without a stated end lives so long (the protocol's default)
_MARGIN = 0.2  # of a token's life: it is renewed that much before its end
_PARAMETER = re.compile(r'(?:([A-Za-z][\w-]*)\s+)?([A-Za-z][\w-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')


@dataclass(frozen=True)
class _Token:
    header: str
    until: float  # time.monotonic()


def challenges(values: Iterable[str]) -> dict[str, dict[str, str]]:
    """Read WWW-Authenticate headers: parameters by scheme, both in small letters."""
    found: dict[str, dict[str, str]] = {}
    for value in values:
        scheme = value.strip().partition(" ")[0].lower()
        found.setdefault(scheme, {})
        for name, key, quoted, plain in _PARAMETER.findall(value):
            scheme = name.lower() or scheme
            found.setdefault(scheme, {})[key.lower()] = re.sub(r"\\(.)", r"\1", quoted) or plain
    return found


class Tokens:
    """The headers for one registry. Many threads may use it."""

    def __init__(self, transport: Transport, environ: Mapping[str, str]) -> None:
        self._transport = transport
        self._environ = environ
        self._lock = threading.Lock()
        self._basic = ""
        self._server: dict[str, str] = {}  # the registry's Bearer challenge, once known
        self._tokens: dict[Scopes, _Token] = {}
        self.known = False  # whether there are credentials for this registry

    def header(self, scopes: Scopes) -> str:
        """Return the header's value for a request of these scopes, "" before the registry asked for any."""
        with self._lock:
            if self._basic or not self._server:
                return self._basic
            token = self._tokens.get(scopes)
            if token is None or token.until < time.monotonic():
                token = self._tokens[scopes] = self._ask(scopes)
            return token.header

    def renew(self, answer: BaseHTTPResponse, scopes: Scopes, used: str) -> bool:
        """Learn from a 401 that came for the header `used`; False where another try cannot end differently."""
        asked = challenges(answer.headers.getlist("WWW-Authenticate"))
        with self._lock:
            if "bearer" in asked:
                self._basic, self._server = "", asked["bearer"]
                current = self._tokens.get(scopes)
                if current is None or current.header == used:  # else another thread has renewed it
                    self._tokens[scopes] = self._ask(scopes)
                return True
            if "basic" not in asked:
                return False
            found = self._find()
            if found is None or not found.username:
                return False
            self._basic = _basic(found)
            return self._basic != used

    def _find(self) -> Credentials | None:
        found = find(self._transport.host, self._environ)
        self.known = found is not None
        return found

    def _ask(self, scopes: Scopes) -> _Token:
        realm = self._realm()
        found = self._find()  # each time: a helper's secret may itself have a short life
        wanted = sorted(scopes) or self._server.get("scope", "").split()
        fields = [("service", self._server["service"])] if "service" in self._server else []
        began = time.monotonic()
        if found is not None and found.identity_token:
            fields += [("grant_type", "refresh_token"), ("refresh_token", found.identity_token), ("client_id", _CLIENT)]
            body = urllib.parse.urlencode([*fields, ("scope", " ".join(wanted))]).encode()
            answer = self._send("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, body)
        else:
            query = urllib.parse.urlencode([*fields, *(("scope", one) for one in wanted), ("client_id", _CLIENT)])
            headers = {"Authorization": _basic(found)} if found is not None else {}
            answer = self._send("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers)
        return self._read(answer, began)

    def _realm(self) -> str:
        """Return the token server's address. It is told the password, so it must be fit for that."""
        realm = self._server.get("realm", "")
        parts = urllib.parse.urlsplit(realm)
        host = self._transport.host
        self._transport.check(realm)
        if parts.scheme != "https" and not is_loopback(parts.netloc):
            raise RegistryError(f"{host} wants passwords sent to {realm} unencrypted: ask its admin to give it HTTPS")
        return realm

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> BaseHTTPResponse:
        answer = self._transport.send(method, url, headers=headers, body=body)
        if answer.status == HTTPStatus.TOO_MANY_REQUESTS or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            server = urllib.parse.urlsplit(url).netloc
            raise CutError(f"{server}, which gives the tokens for {self._transport.host}, answered {answer.status}")
        return answer

    def _read(self, answer: BaseHTTPResponse, began: float) -> _Token:
        host = self._transport.host
        if answer.status != HTTPStatus.OK:
            if self.known:
                words = f"{host} does not accept the user name and password found on this machine ({answer.status})"
                raise RegistryError(f"{words}: log in again with docker login {host}")
            raise RegistryError(f"{host} wants a user name and password ({answer.status}): docker login {host}")
        try:
            content = json.loads(answer.data)
            token = str(content.get("token") or content.get("access_token") or "")
            seconds = float(content.get("expires_in") or _LEAST_SECONDS)
        except (ValueError, AttributeError, TypeError) as error:
            raise RegistryError(f"the token server of {host} gave an answer that is no JSON object") from error
        if not token:
            raise RegistryError(f"the token server of {host} gave no token: log in again with docker login {host}")
        return _Token(f"Bearer {token}", began + seconds * (1 - _MARGIN))


def _basic(credentials: Credentials) -> str:
    both = f"{credentials.username}:{credentials.password}"
    return "Basic " + base64.b64encode(both.encode()).decode("ascii")
