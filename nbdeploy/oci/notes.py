"""What this machine remembers of registries, so that less is asked and sent.

    FOLDER/<host>/blobs/<hex>        the repository that got this large blob last
    FOLDER/<host>/tags/<hash>        the digest that the name of a base image stood for
    FOLDER/<host>/documents/<hex>    a base's manifest or configuration

Every note is a small private file of its own, written whole or not at all, so that two deploys at once spoil nothing.
What is told of one registry stays with it. A note may be missing or out of date: it saves work, and is never needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from nbdeploy.errors import UsageError
from nbdeploy.oci.reference import Reference
from nbdeploy.private import write_private

if TYPE_CHECKING:
    from collections.abc import Iterable

LARGE = 32 << 10  # bytes from which a blob is worth a note: a smaller one is sent as fast as taken over
_LONGEST = 1 << 20  # bytes of a document that is kept
_MOST = {"blobs": 2000, "tags": 100, "documents": 200}  # notes of a registry; the oldest go


class Notes:
    """The notes on one registry. Many threads and processes may use them; what fails to be kept is forgotten.

    Args:
        folder: of the notes on all registries; made where it is missing.
        host: the registry's, as in Reference.
    """

    def __init__(self, folder: Path, host: str) -> None:
        self._host = host
        self._folder = folder / urllib.parse.quote(host, safe="")

    def source(self, digest: str) -> str:
        """Return the repository that got a blob last, or ""."""
        text = self._read("blobs", _hex(digest)).decode("ascii", "replace")
        try:
            return text if Reference.parse(f"{self._host}/{text}").repository == text else ""
        except UsageError:
            return ""

    def got(self, repository: str, digests: Iterable[str]) -> None:
        """Note that a repository has these blobs."""
        for digest in digests:
            self._write("blobs", _hex(digest), repository.encode("ascii"))
        self._prune("blobs")

    def resolved(self, image: Reference, seconds: float) -> str:
        """Return the digest that a name stood for when somebody looked in the last `seconds`, or ""."""
        key = _hash(str(image))
        try:
            age = time.time() - (self._folder / "tags" / key).stat().st_mtime
        except OSError:
            return ""
        return self._read("tags", key).decode("ascii", "replace") if 0 <= age <= seconds else ""

    def resolve(self, image: Reference, digest: str) -> None:
        """Note what a name stands for now."""
        self._write("tags", _hash(str(image)), digest.encode("ascii"))
        self._prune("tags")

    def document(self, digest: str) -> bytes | None:
        """Return the document of this digest, None where it is not known. Its bytes are checked."""
        data = self._read("documents", _hex(digest))
        return data if hashlib.sha256(data).hexdigest() == _hex(digest) else None

    def keep(self, digest: str, data: bytes) -> None:
        """Keep a document."""
        if len(data) <= _LONGEST:
            self._write("documents", _hex(digest), data)
            self._prune("documents")

    def _read(self, kind: str, key: str) -> bytes:
        with contextlib.suppress(OSError):
            return (self._folder / kind / key).read_bytes()
        return b""

    def _write(self, kind: str, key: str, data: bytes) -> None:
        folder = self._folder / kind
        with contextlib.suppress(OSError):  # a full disk must not fail a deploy that needs no note
            for one in (folder.parent.parent, folder.parent, folder):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(folder / key, data)

    def _prune(self, kind: str) -> None:
        """Remove the oldest notes beyond what is kept; what a killed write left behind grows old too."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self._folder / kind) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process was faster
                    found.append((entry.stat().st_mtime, entry.path))
        for _, path in sorted(found, reverse=True)[_MOST[kind] :]:
            with contextlib.suppress(OSError):
                Path(path).unlink()


def _hex(digest: str) -> str:
    """Return a digest's own hexadecimal digits, fit to name a file whatever a registry sent."""
    found = digest.partition(":")[2]
    return found if found.isalnum() and found.isascii() else _hash(digest)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
