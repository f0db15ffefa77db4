"""HTTP to one registry and to the hosts it sends us to: TLS, proxies, and which host may be told or asked what."""

from __future__ import annotations

import math
import ssl
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdeploy.errors import RegistryError
from nbdeploy.oci.reference import api_host, is_loopback, is_private

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_SECONDS = 20.0  # to connect, and to hand one piece of a body to the network
READ_SECONDS = 60.0
COMMIT_SECONDS = 900.0  # a registry may copy gigabytes within its storage before it says that a blob is there
_MOMENT = 0.05  # seconds
_CONNECTIONS = 8
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")


class CutError(RegistryError):
    """It went wrong in a way that another try may mend.

    Attributes:
        cost: how much of the patience it takes (a lost connection is 1).
        after: seconds to wait that the registry asked for, or None.
        slow: the registry is there and only makes us wait.
    """

    def __init__(self, words: str, *, cost: int = 1, after: float | None = None, slow: bool = False) -> None:
        super().__init__(words)
        self.cost = cost
        self.after = after
        self.slow = slow


class Transport:
    """Connections for one registry. Many threads may use it.

    Args:
        host: of the registry.
        environ: where proxies and certificates are read from.
        seconds: from now on, after which nothing is waited for.
    """

    def __init__(self, host: str, environ: Mapping[str, str], seconds: float = math.inf) -> None:
        self.host = host
        self.requests = 0
        self.answered = False  # whether anything at its address has been reached
        self._until = time.monotonic() + seconds
        self._api_host = api_host(host)
        self._scheme = "http" if is_loopback(host) else "https"
        self._environ = environ
        self._pools: dict[str, PoolManager] = {}
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds that are left; at least a moment, so that what is begun may end."""
        return max(_MOMENT, self._until - time.monotonic())

    def url(self, path: str) -> str:
        """Return the address of a path of the registry."""
        return f"{self._scheme}://{self._api_host}{path}"

    def use_tls(self) -> bool:
        """Speak TLS from now on; False where that is so already. Only a registry on this machine begins without."""
        before, self._scheme = self._scheme, "https"
        return before == "http"

    def trusts(self, url: str) -> bool:
        """Tell whether this is the registry itself, which alone may see what the user's credentials gave us."""
        return _origin(url) == _origin(self.url("/"))

    def locate(self, asked: str, location: str, *, upload: bool) -> str:
        """Return where a Location sends us.

        Raises RegistryError where that is a private address though the registry is none (a request that only someone
        inside the user's network could make), or where an upload would travel readable by all.
        """
        url = urllib.parse.urljoin(asked, location)
        parts = urllib.parse.urlsplit(url)
        if self._scheme == "https" and parts.scheme == "http" and parts.netloc == self._api_host:
            return parts._replace(
                scheme="https"
            ).geturl()  # behind a proxy that ends TLS, registries name themselves so
        if self.trusts(url):
            return url
        self.check(url)
        if upload and parts.scheme != "https" and not is_loopback(self.host):
            raise RegistryError(
                f"{self.host} wants the image sent to {parts.netloc} unencrypted: ask its admin to mend it"
            )
        return url

    def check(self, url: str) -> None:
        """Refuse an address on another host that the registry may not send us to. Raises RegistryError."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise RegistryError(f"{self.host} answered with an address that nobody can follow: {url[:200]}")
        if is_private(parts.netloc.rpartition("@")[2]) and not is_private(self.host):
            raise RegistryError(
                f"{self.host} sends us to {parts.netloc}, an address inside this network: refused, since a registry "
                "outside has no business there. Ask its admin for an address that is reachable from outside"
            )

    def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes | memoryview] | None = None,
        stream: bool = False,
        slow: bool = False,
    ) -> BaseHTTPResponse:
        """Make one request and return its answer, whatever its status; cookies and redirects are left alone.

        Raises CutError where another try may do better, else RegistryError.
        """
        import urllib3

        if self.trusts(url):
            with self._lock:
                self.requests += 1
        connect, read = min(CONNECT_SECONDS, self.left), min(COMMIT_SECONDS if slow else READ_SECONDS, self.left)
        limits = urllib3.Timeout(connect=connect, read=read)
        try:
            answer = self._pool(url).urlopen(
                method,
                url,
                body=body,
                headers=headers,
                timeout=limits,
                redirect=False,
                retries=False,
                preload_content=not stream,
                decode_content=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            found = in_words(urllib.parse.urlsplit(url).netloc, error, connect)
            self.answered = self.answered or (isinstance(found, CutError) and found.slow)
            raise found from error
        self.answered = True
        return answer

    def close(self) -> None:
        """Let go of the connections."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.clear()

    def _pool(self, url: str) -> PoolManager:
        parts = urllib.parse.urlsplit(url)
        proxy = _proxy(parts.scheme, parts.netloc.rpartition("@")[2], self._environ)
        key = f"{parts.scheme} {proxy}"
        with self._lock:
            if key not in self._pools:
                self._pools[key] = self._new_pool(parts.scheme, proxy)
            return self._pools[key]

    def _new_pool(self, scheme: str, proxy: str) -> PoolManager:
        import urllib3

        more: dict[str, Any] = {"maxsize": _CONNECTIONS}
        if scheme == "https" or proxy.startswith("https"):
            more["ssl_context"] = _tls(self._environ)
        if not proxy:
            return urllib3.PoolManager(**more)
        parts = urllib.parse.urlsplit(proxy)
        if parts.scheme not in {"http", "https"}:
            raise RegistryError(
                f"the proxy {without_login(proxy)} is of a kind that cannot be used here: HTTPS_PROXY takes http://"
            )
        who = (
            f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            if parts.username
            else ""
        )
        secret = urllib3.make_headers(proxy_basic_auth=who) if who else None
        return urllib3.ProxyManager(without_login(proxy), proxy_headers=secret, **more)


def without_login(url: str) -> str:
    """Return a URL without user and password, fit to be shown."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def in_words(host: str, error: Exception, seconds: float = CONNECT_SECONDS) -> RegistryError:
    """Return what a failed connection, for which we waited so long, means for the user."""
    from urllib3 import exceptions

    chain = _chain(error)
    texts = " ".join(str(one) for one in chain)
    if any(isinstance(one, ssl.SSLError | exceptions.SSLError) for one in chain) or "SSLError" in texts:
        return _tls_words(host, chain, texts)
    kinds = [type(one) for one in chain]
    if exceptions.ProxyError in kinds:
        words = f"the proxy of this machine does not let us reach {host} ({chain[-1]}): see HTTPS_PROXY, NO_PROXY"
        return CutError(words, cost=2)
    if exceptions.NameResolutionError in kinds:
        return CutError(f"no machine is called {host}: check the registry's name, and the network (VPN, DNS)", cost=3)
    if ConnectionRefusedError in kinds:
        return CutError(f"{host} refuses connections: is the registry running, and is its port right?", cost=2)
    if exceptions.ConnectTimeoutError in kinds:
        words = f"{host} did not answer in {seconds:.0f} s: check the network (VPN, firewall, HTTPS_PROXY)"
        return CutError(words, cost=3)
    if isinstance(error, exceptions.ReadTimeoutError):
        return CutError(
            f"{host} took the request and then said nothing: it may be overloaded, deploy again later",
            cost=2,
            slow=True,
        )
    return CutError(f"the connection to {host} was lost again and again ({chain[-1]}): check the network, deploy again")


def _tls_words(host: str, chain: list[BaseException], texts: str) -> RegistryError:
    if any(mark in texts.upper().replace(" ", "_") for mark in _NO_TLS):
        return RegistryError(
            f"{host} speaks plain HTTP where HTTPS is needed: nbdeploy sends images unencrypted to this machine only. "
            "Give the registry a certificate, or name its HTTPS port"
        )
    for one in chain:
        if isinstance(one, ssl.SSLCertVerificationError):
            return RegistryError(
                f"the certificate of {host} is not trusted here ({one.verify_message}): set SSL_CERT_FILE to a file "
                "with the certificate of its authority (PEM), which the registry's admin has"
            )
    return CutError(f"TLS with {host} failed ({chain[-1]}): check the registry's certificate, and HTTPS_PROXY", cost=2)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it, as urllib3 nests them in four different ways."""
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and one not in found:
            found.append(one)
            waiting += [
                getattr(one, "reason", None),
                getattr(one, "original_error", None),
                one.__cause__,
                one.__context__,
            ]
            waiting += list(one.args)
    return found


def _origin(url: str) -> tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _proxy(scheme: str, host: str, environ: Mapping[str, str]) -> str:
    if is_loopback(host):
        return ""
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    found = next((environ[name] for name in names if environ.get(name)), "")
    skip = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if not found or urllib.request.proxy_bypass_environment(host, {"no": skip}):  # type: ignore[attr-defined]
        return ""
    return found if "://" in found else f"http://{found}"


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Trust what the system trusts, or SSL_CERT_FILE; a Python without a system's certificates uses certifi's."""
    file, folder = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    if not (file or folder):
        usual = ssl.get_default_verify_paths()
        places = [Path(place) for place in (usual.cafile, usual.capath) if place]  # absent ones are None
        if not any(place.is_file() or any(place.iterdir()) for place in places):
            import certifi

            file = certifi.where()
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except OSError as error:
        raise RegistryError(f"SSL_CERT_FILE names {file}, which cannot be read as certificates: {error}") from error
