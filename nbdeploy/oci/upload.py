"""One blob into a registry: one streaming request, or chunks where a proxy takes no large one.

Nothing is held in memory: pieces go from the source to the socket. A blob whose upload broke is sent again from its
start, since registries in use forget half an upload.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from nbdeploy.errors import RegistryError
from nbdeploy.oci import refusal
from nbdeploy.oci.session import Session
from nbdeploy.oci.tokens import Scopes
from nbdeploy.oci.transport import CutError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

PIECE = 256 << 10  # bytes handed to the network at once; each must go out within transport.CONNECT_SECONDS
CHUNK = 64 << 20  # bytes of one request where a single one is refused; proxies that limit mostly allow 100 MB
_MOUNTING = 4  # patience with a mount, which can be done without: one renewed token, or three lost connections
_EMPTY = {"Content-Length": "0"}
_BINARY = {"Content-Type": "application/octet-stream"}

Source = Callable[[], Iterable[bytes | memoryview]]


@dataclass(frozen=True)
class Blob:
    """What is uploaded.

    Attributes:
        repository: where to.
        digest: "sha256:<hex>"; the registry checks it.
        size: bytes.
        open: gives the bytes, each time from the start.
        on_bytes: called with the bytes sent since the last call; negative where a broken upload starts again.
        source: another repository of the registry that may have the blob already, or "".
    """

    repository: str
    digest: str
    size: int
    open: Source
    on_bytes: Callable[[int], None]
    source: str = ""


@dataclass(frozen=True)
class _Place:
    address: str
    chunk: int  # bytes of one request where a single one is refused


class Uploader:
    """Uploads over one session. Many threads may use it; it remembers what a registry did not take."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._chunked = False
        self._refused: set[str] = set()  # repositories that nothing may be taken from

    def upload(self, blob: Blob) -> int:
        """Bring the blob there and return the bytes that were sent: 0 where the registry took them from `source`.

        Raises RegistryError.
        """
        return self._session.patiently(lambda: self._attempt(blob))

    def rehearse(self, repository: str) -> None:
        """Begin an upload, and let the registry forget it: whoever may do that may push."""
        place = self._start(repository)
        with contextlib.suppress(RegistryError):  # some have no such request, and forget by themselves
            action = f"push to {repository}"
            self._session.once(
                "DELETE", place.address, scopes=scopes(repository), action=action, expect={200, 202, 204}
            )

    def _mount(self, repository: str, digest: str, source: str) -> _Place | None:
        """Ask for a blob from another repository: None where it is there now, else where to upload it to."""
        path = f"/v2/{repository}/blobs/uploads/?mount={urllib.parse.quote(digest)}&from={urllib.parse.quote(source)}"
        try:
            answer = self._session.ask(
                "POST",
                path,
                scopes=scopes(repository, source),
                action=f"take layers of {source} for {repository}",
                expect={201, 202},
                headers=_EMPTY,
                patience=_MOUNTING,
            )
        except RegistryError:  # a registry that does not let us read there, or cannot mount: it is uploaded then
            self._refused.add(source)
            return self._start(repository)
        return None if answer.status == HTTPStatus.CREATED else self._place(self._session.transport.url(path), answer)

    def _start(self, repository: str) -> _Place:
        path = f"/v2/{repository}/blobs/uploads/"
        answer = self._session.ask(
            "POST", path, scopes=scopes(repository), action=f"push to {repository}", expect={202}, headers=_EMPTY
        )
        return self._place(self._session.transport.url(path), answer)

    def _place(self, asked: str, answer: BaseHTTPResponse) -> _Place:
        location = answer.headers.get("Location", "")
        if not location:
            raise RegistryError(f"{self._session.host} does not say where to upload to: is this a registry?")
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        address = self._session.transport.locate(asked, location, upload=True)
        return _Place(address, max(CHUNK, int(least) if least.isdigit() else 0))

    def _attempt(self, blob: Blob) -> int:
        mounted = blob.source and blob.source not in self._refused
        place = self._mount(blob.repository, blob.digest, blob.source) if mounted else self._start(blob.repository)
        if place is None:
            return 0
        with _Pieces(blob) as pieces:
            if self._chunked and blob.size > place.chunk:
                answer = self._in_chunks(blob, place, pieces)
            else:
                answer = self._put(blob, place, pieces.take(blob.size), blob.size)
                if answer.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and blob.size > place.chunk:
                    self._chunked = True
                    raise CutError(f"{self._session.host} takes no request of {blob.size} bytes", after=0.0)
            self._done(blob, answer)
        return blob.size

    def _in_chunks(self, blob: Blob, place: _Place, pieces: _Pieces) -> BaseHTTPResponse:
        start = 0
        while start < blob.size:
            size = min(place.chunk, blob.size - start)
            answer = self._session.once(
                "PATCH",
                place.address,
                scopes=scopes(blob.repository),
                action=f"push to {blob.repository}",
                expect={202, 204},
                headers={"Content-Length": str(size), "Content-Range": f"{start}-{start + size - 1}", **_BINARY},
                body=pieces.take(size),
            )
            address = self._place(place.address, answer).address
            place, start = _Place(address, place.chunk), start + size
        return self._put(blob, place, (), 0)

    def _put(self, blob: Blob, place: _Place, body: Iterable[memoryview], size: int) -> BaseHTTPResponse:
        mark = "&" if "?" in place.address else "?"
        return self._session.once(
            "PUT",
            f"{place.address}{mark}digest={urllib.parse.quote(blob.digest)}",
            scopes=scopes(blob.repository),
            action=f"push to {blob.repository}",
            expect={201, 204, 400, HTTPStatus.REQUEST_ENTITY_TOO_LARGE},
            headers={"Content-Length": str(size), **_BINARY},
            body=body,
            slow=True,
        )

    def _done(self, blob: Blob, answer: BaseHTTPResponse) -> None:
        host = self._session.host
        told = answer.headers.get("Docker-Content-Digest", blob.digest)
        spoilt = answer.status == HTTPStatus.BAD_REQUEST and "DIGEST_INVALID" in refusal.codes(answer.data)
        if spoilt or told != blob.digest:
            raise RegistryError(
                f"{host} received other bytes than {blob.digest[:19]}... should be: the file changed on disk since "
                "it was captured, or the network spoilt it. Run the deploy again"
            )
        if answer.status not in {201, 204}:
            raise refusal.refusal(host, f"push to {blob.repository}", answer.status, answer.data, known=True)


def scopes(repository: str, source: str = "", *, push: bool = True) -> Scopes:
    """Return what a token must allow: to push to a repository and to pull from another one."""
    found = {f"repository:{repository}:{'pull,push' if push else 'pull'}"}
    return frozenset(found | {f"repository:{source}:pull"} if source and source != repository else found)


class _Pieces:
    """A blob's bytes in requests of given sizes; what was told of progress is taken back where the block fails."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._sent = 0
        self._left = memoryview(b"")
        self._source: Iterator[bytes | memoryview] | None = None

    def __enter__(self) -> Self:
        """Nothing is opened before the first byte is asked for."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Let go of the source."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()
        if kind is not None and self._sent:
            self._blob.on_bytes(-self._sent)

    def take(self, size: int) -> Iterator[memoryview]:
        """Yield the next `size` bytes in small pieces."""
        while size:
            piece = self._next(min(size, PIECE))
            yield piece
            size -= len(piece)
            self._sent += len(piece)
            self._blob.on_bytes(len(piece))

    def _next(self, most: int) -> memoryview:
        try:
            if self._source is None:
                self._source = iter(self._blob.open())
            while not self._left:
                self._left = memoryview(next(self._source)).cast("B")
        except StopIteration:
            words = f"{self._blob.digest[:19]}... is shorter than it was: it changed while it was sent. Deploy again"
            raise RegistryError(words) from None
        except OSError as error:  # here, so that a failing disk is not taken for a failing network
            raise RegistryError(
                f"{self._blob.digest[:19]}... cannot be read from this disk: {error.strerror}"
            ) from error
        piece, self._left = self._left[:most], self._left[most:]
        return piece
