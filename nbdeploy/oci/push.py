"""An image into a registry, with as few requests and bytes as can be.

What the previous image of the same repository holds is not even asked for. Layers of the base are taken over within
the registry, or copied from registry to registry without touching this disk.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from nbdeploy.errors import RegistryError
from nbdeploy.oci.refusal import RefusedError
from nbdeploy.oci.registry import OpenRegistry

if TYPE_CHECKING:
    from nbdeploy.oci.layers import Layer
    from nbdeploy.oci.reference import Reference

AT_ONCE = 4  # blobs in flight
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
_SMALL = 1 << 20  # bytes below which a blob is sent without asking for it: asking would cost as much
_PAUSES = (0.2, 1.0, 3.0)  # seconds before blobs are looked after again
_TELL_SECONDS = 0.2  # between two reports

OnProgress = Callable[[str, Mapping[str, float]], None]


class Pushable(Protocol):
    """What is pushed: an image.Image."""

    @property
    def layers(self) -> Sequence[Layer]:
        """All layers, the base's first."""

    @property
    def config(self) -> bytes:
        """The configuration."""

    @property
    def manifest(self) -> bytes:
        """The manifest."""

    @property
    def digest(self) -> str:
        """The manifest's digest."""


@dataclass(frozen=True)
class Pushed:
    """What a push took: bytes of blobs sent, requests to the registry of the image, seconds."""

    digest: str
    bytes_sent: int
    requests: int
    seconds: float


@dataclass(frozen=True)
class _Blob:
    digest: str
    size: int
    open: Callable[[], Iterable[bytes | memoryview]] | None = None
    origin: Reference | None = None


class _StoppedError(Exception):
    """Another blob failed, so this one need not go on."""


def push(
    image: Pushable,
    to: Reference,
    open_registry: OpenRegistry,
    *,
    previous: str = "",
    mounts: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Bring an image to a repository: its blobs, then the manifest by its digest, then the tag if `to` has one.

    Args:
        image: what is pushed.
        to: registry, repository and perhaps a tag; a digest in it is ignored.
        open_registry: gives the Registry of a host, always the same for a host; the caller closes it.
        previous: digest of an image of ours in the same repository, or "": its blobs are taken to be there.
        mounts: repositories of the same registry that may hold a large blob, by the blob's digest; a wrong one costs
            a request.
        on_progress: called at most five times a second with words and {"bytes": sent, "total": to be sent, "rate":
            bytes per second}, from any thread, never twice at once.

    Raises RegistryError in the user's words.
    """
    registry, began = open_registry(to.host), time.monotonic()
    before = registry.requests
    registry.will_push(to.repository)
    work = _Push(image, to, open_registry, dict(mounts or {}), on_progress)
    if registry.has_manifest(to.repository, image.digest):
        if to.tag and registry.digest_of(to.repository, to.tag) != image.digest:
            work.put_manifest(to.tag)
    else:
        work.whole(previous)
        if to.tag:
            work.put_manifest(to.tag)
    return Pushed(image.digest, work.bytes_sent, registry.requests - before, time.monotonic() - began)


class _Push:
    def __init__(
        self,
        image: Pushable,
        to: Reference,
        open_registry: OpenRegistry,
        mounts: dict[str, str],
        on_progress: OnProgress | None,
    ) -> None:
        self._image = image
        self._to = to
        self._open_registry = open_registry
        self._registry = open_registry(to.host)
        self._mounts = mounts
        self._progress = _Progress(to.host, on_progress)
        self._stop = threading.Event()
        self.bytes_sent = 0

    def whole(self, previous: str) -> None:
        """Send what is missing, and the manifest by its digest."""
        blobs = self._blobs()
        known = self._known(previous)
        self._send([blob for blob in blobs if blob.digest not in known])
        for pause in (*_PAUSES, None):
            try:
                self.put_manifest(self._image.digest)
            except RefusedError as error:
                if pause is None or error.status not in {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND}:
                    raise
            else:
                return
            # A blob that was there is not: somebody cleaned the registry, or sends the same one at this very moment.
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that two do not march in step
            self._send(blobs)

    def put_manifest(self, reference: str) -> None:
        """Store the manifest under its digest or a tag."""
        self._registry.put_manifest(self._to.repository, reference, self._image.manifest, MANIFEST)

    def _blobs(self) -> list[_Blob]:
        config = self._image.config
        found = {
            layer.digest: _Blob(layer.digest, layer.size, layer.open, layer.origin) for layer in self._image.layers
        }
        digest = "sha256:" + hashlib.sha256(config).hexdigest()
        return [*found.values(), _Blob(digest, len(config), lambda: [config])]

    def _known(self, previous: str) -> frozenset[str]:
        """Return the blobs of the previous image; none where it is gone."""
        manifest = self._registry.manifest(self._to.repository, previous) if previous else None
        if manifest is None:
            return frozenset()
        content = manifest.json
        return frozenset(str(one["digest"]) for one in [*content.get("layers", ()), content.get("config")] if one)

    def _send(self, blobs: list[_Blob]) -> None:
        """Bring blobs there, the biggest first, so that no long one is left for the end."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="nbdeploy-push") as pool:
            try:
                asked = [pool.submit(self._missing, blob) for blob in blobs]
                missing = [blob for blob, one in zip(blobs, asked, strict=True) if one.result()]
                missing.sort(key=lambda blob: -blob.size)
                self._progress.expect(sum(blob.size for blob in missing))
                sent = [pool.submit(self._bring, blob) for blob in missing]
                done, _ = wait(sent, return_when=FIRST_EXCEPTION)
                for one in done:
                    one.result()
                self.bytes_sent += sum(one.result() for one in sent)
            except BaseException:
                self._stop.set()  # uploads in flight end at their next piece
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _missing(self, blob: _Blob) -> bool:
        if self._stop.is_set():
            raise _StoppedError
        if blob.origin is None and blob.size < _SMALL:
            return True
        return not self._registry.has_blob(self._to.repository, blob.digest)

    def _bring(self, blob: _Blob) -> int:
        """Return the bytes sent for this blob."""
        source = self._mounts.get(blob.digest, "")
        opens = blob.open
        origin = blob.origin
        if origin is not None:
            if origin.api_host == self._to.api_host:
                source = origin.repository
            base = self._open_registry(origin.host)
            repository = origin.repository
            opens = lambda: base.stream(repository, blob.digest)  # noqa: E731 - it is a value
        if opens is None:
            raise RegistryError(f"the layer {blob.digest} has neither content nor a place to copy it from")
        sent = self._registry.upload(self._to.repository, blob.digest, blob.size, opens, self._count, source=source)
        if not sent:
            self._progress.expect(-blob.size)
        return sent

    def _count(self, size: int) -> None:
        if self._stop.is_set() and size > 0:
            raise _StoppedError
        self._progress.sent(size)


class _Progress:
    """Bytes and rate for the user, from several threads."""

    def __init__(self, host: str, on_progress: OnProgress | None) -> None:
        self._host = host
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._began = self._told = time.monotonic()
        self._done = self._total = 0

    def expect(self, size: int) -> None:
        """Add to what is to be sent."""
        with self._lock:
            self._total += size

    def sent(self, size: int) -> None:
        """Count bytes, and tell the user if it is time."""
        with self._lock:
            self._done += size
            now = time.monotonic()
            if self._on_progress is None or (now - self._told < _TELL_SECONDS and self._done < self._total):
                return
            self._told = now
            rate = max(0.0, self._done / max(now - self._began, 1e-6))
            numbers = {"bytes": self._done, "total": self._total, "rate": rate}
            self._on_progress(f"pushing to {self._host}", numbers)
