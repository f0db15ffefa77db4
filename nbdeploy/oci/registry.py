"""What nbdeploy asks of an image registry (OCI distribution API). The only door to registries."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdeploy.errors import RegistryError
from nbdeploy.oci.session import Session
from nbdeploy.oci.transport import in_words
from nbdeploy.oci.upload import Blob, Source, Uploader, scopes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from urllib3 import BaseHTTPResponse

ACCEPT = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"
)
_READ = 1 << 20  # bytes read from a registry at once
_FOUND, _ABSENT = 200, 404
_HASHES = "sha256:"


@dataclass(frozen=True)
class Manifest:
    """A manifest or an index, as the registry keeps it. Its digest is that of `data`, computed here."""

    data: bytes
    media_type: str
    digest: str

    @property
    def json(self) -> dict[str, Any]:
        """The content."""
        return dict(json.loads(self.data))


class Registry:
    """One registry. Many threads may use it. Every method raises RegistryError in the user's words.

    Plain HTTP is spoken to registries on this machine only. Credentials are found when the registry asks for them.

    Args:
        host: host of the registry, with its port if it has one.
        environ: where proxies, certificates and the places of credentials are read from.
        delay: seconds before the second try of what failed; each further wait is twice as long.
        seconds: from now on, after which nothing is begun or waited for; UndecidedError tells of a registry that was
            merely slow until then.
    """

    def __init__(
        self, host: str, *, environ: Mapping[str, str] = os.environ, delay: float = 0.25, seconds: float = math.inf
    ) -> None:
        self.host = host
        self._session = Session(host, environ, delay, seconds)
        self._uploader = Uploader(self._session)
        self._written: set[str] = (
            set()
        )  # repositories whose reads ask for the right to push at once: one token, not two

    @property
    def requests(self) -> int:
        """How many requests the registry has had from this object."""
        return self._session.transport.requests

    @property
    def answered(self) -> bool:
        """Whether anything at its address has been reached."""
        return self._session.transport.answered

    def will_push(self, repository: str) -> None:
        """Say that this repository will be pushed to, so that one token serves for all its requests."""
        self._written.add(repository)

    def close(self) -> None:
        """Let go of the connections."""
        self._session.transport.close()

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        """Return the manifest of a tag or digest, None where there is none. Its bytes are checked."""
        answer = self._read("GET", repository, f"manifests/{reference}", {"Accept": ACCEPT})
        if answer.status == _ABSENT:
            return None
        data = answer.data
        digest = _HASHES + hashlib.sha256(data).hexdigest()
        wanted = reference if reference.startswith(_HASHES) else answer.headers.get("Docker-Content-Digest", digest)
        if digest != wanted:
            raise _wrong(self.host, repository, wanted)
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        try:
            manifest = Manifest(data, kind, digest)
            return Manifest(data, str(manifest.json.get("mediaType") or kind), digest)
        except (ValueError, TypeError) as error:
            raise RegistryError(f"{self.host} gave a manifest of {repository} that is no JSON object") from error

    def digest_of(self, repository: str, reference: str) -> str:
        """Return the digest of a tag's or digest's manifest without fetching it, "" where there is none or no say."""
        answer = self._read("HEAD", repository, f"manifests/{reference}", {"Accept": ACCEPT})
        if answer.status == _ABSENT:
            return ""
        return answer.headers.get("Docker-Content-Digest") or (reference if reference.startswith(_HASHES) else "")

    def has_manifest(self, repository: str, reference: str) -> bool:
        """Tell whether a tag or digest is there."""
        answer = self._read("HEAD", repository, f"manifests/{reference}", {"Accept": ACCEPT})
        return answer.status == _FOUND

    def has_blob(self, repository: str, digest: str) -> bool:
        """Tell whether a blob is there."""
        return self._read("HEAD", repository, f"blobs/{digest}").status == _FOUND

    def blob(self, repository: str, digest: str) -> bytes:
        """Return a small blob whole (the image's configuration), its bytes checked."""
        return self._session.patiently(lambda: b"".join(self.stream(repository, digest)))

    def stream(self, repository: str, digest: str) -> Iterator[bytes]:
        """Yield a blob's bytes. The last of them come only when the digest is right."""
        answer = self._read("GET", repository, f"blobs/{digest}", stream=True)
        if answer.status == _ABSENT:
            answer.drain_conn()
            raise RegistryError(f"{self.host} has no {digest[:19]}... in {repository}, though the image names it")
        checked, held = hashlib.sha256(), b""
        try:
            for piece in _pieces(self.host, answer):
                if held:
                    yield held
                checked.update(piece)
                held = piece
            if _HASHES + checked.hexdigest() != digest:
                raise _wrong(self.host, repository, digest)
            yield held
        finally:
            answer.close()

    def check_push(self, repository: str) -> None:
        """Return where a push may begin. Two requests, and nothing stays in the registry."""
        self._uploader.rehearse(repository)

    def upload(
        self,
        repository: str,
        digest: str,
        size: int,
        open: Source,  # noqa: A002 - it is what it does
        on_bytes: Callable[[int], None] | None = None,
        *,
        source: str = "",
    ) -> int:
        """Send a blob and return the bytes sent: 0 where the registry took it from the repository `source`.

        Args:
            repository: where to.
            digest: "sha256:<hex>"; the registry checks it.
            size: bytes.
            open: gives the bytes, in pieces of any size, from the start each time it is called.
            on_bytes: called with the bytes sent since the last call; negative where a broken upload starts again.
            source: a repository of this registry that may have the blob.
        """
        return self._uploader.upload(Blob(repository, digest, size, open, on_bytes or (lambda _: None), source))

    def put_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> None:
        """Store a manifest under a tag, or its own digest."""
        self._session.ask(
            "PUT",
            f"/v2/{repository}/manifests/{reference}",
            scopes=scopes(repository),
            action=f"push to {repository}",
            expect={200, 201, 202},
            headers={"Content-Type": media_type},
            body=data,
        )

    def _read(
        self, method: str, repository: str, rest: str, headers: Mapping[str, str] | None = None, *, stream: bool = False
    ) -> BaseHTTPResponse:
        return self._session.ask(
            method,
            f"/v2/{repository}/{rest}",
            scopes=scopes(repository, push=repository in self._written),
            action=f"pull from {repository}",
            expect={_FOUND, _ABSENT},
            headers=headers,
            stream=stream,
        )


def _pieces(host: str, answer: BaseHTTPResponse) -> Iterator[bytes]:
    import urllib3

    try:
        yield from answer.stream(_READ, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise in_words(host, error) from error


def _wrong(host: str, repository: str, digest: str) -> RegistryError:
    return RegistryError(
        f"{host} gave other bytes than {digest[:19]}... of {repository}: they are not used. The registry or a proxy "
        "before it is at fault; deploy again, and tell its admin if it stays so"
    )


OpenRegistry = Callable[[str], Registry]
"""Gives the Registry of a host, always the same for a host; whoever passes it closes what it opened."""
