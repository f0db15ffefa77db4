"""Blobs and Bundles on this machine, each named by its sha256: what is there already is never written twice.

Weights go from the model's own memory to the disk: no copy of them is made, each buffer is hashed first and written
only where its blob is missing. What was written is hashed again from the file, so that a buffer which changed meanwhile
(a training thread) cannot leave a blob whose name lies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import signal
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO

from nbdeploy_server.bundle import Ref, blob_path, canonical, manifest_path

from nbdeploy.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

CHUNK = 16 << 20  # bytes written between two looks at the stop flag
LONE = 64 << 20  # bytes from which a buffer of a size that is new here is hashed while it is written, not before
READ = 1 << 20  # bytes read back at a time: small enough to stay in the processor's cache


class ChangedError(StoreError):
    """A buffer changed between its hash and its write."""


class _Stop:
    """A flag that a signal handler may raise: it has no lock, so it can never find itself holding one."""

    asked = False


class Store:
    """Content-addressed blobs and Bundles under one folder, which only its owner can read.

    Several processes may write at once: a blob appears whole or not at all, under the name of its content.
    Raises StoreError where the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder {root} cannot be made: {error.strerror}; set NBDEPLOY_HOME") from error

    def path(self, digest: str) -> Path:
        """Return where the blob is, or would be."""
        return blob_path(self.root, digest)

    def has(self, digest: str) -> bool:
        """Tell whether the blob is here."""
        return self.path(digest).is_file()

    def bundle_path(self, digest: str) -> Path:
        """Return where the manifest of this Bundle is, or would be."""
        return manifest_path(self.root, digest)

    def put_bytes(self, data: bytes | bytearray | memoryview) -> Ref:
        """Keep these bytes as a blob."""
        refs, _ = self.put_buffers([memoryview(data)])
        return refs[0]

    def put_file(self, path: Path) -> Ref:
        """Keep the content of a file as a blob; read twice, and copied only where the blob is missing.

        Raises ChangedError where the file changed meanwhile, StoreError where it cannot be read.
        """
        try:
            with path.open("rb") as source:
                digest = _digest(hashlib.file_digest(source, "sha256"))
                size = source.tell()
                if not self.has(digest):
                    source.seek(0)
                    written = self.put_stream(source)
                    if written.digest != digest:
                        raise ChangedError(f"{path} changed while it was copied; deploy again when it is complete")
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error
        return Ref(digest, size)

    def put_stream(self, source: BinaryIO) -> Ref:
        """Keep what a binary stream yields as a blob: one read, hashed while it is written."""
        hasher, size = hashlib.sha256(), 0
        with self._temporary(self.root, None) as (file, place):
            while chunk := source.read(READ):
                hasher.update(chunk)
                _write(file, memoryview(chunk))
                size += len(chunk)
            place(self.path(_digest(hasher)))
        return Ref(_digest(hasher), size)

    def put_buffers(self, buffers: list[memoryview]) -> tuple[list[Ref], int]:
        """Keep each buffer as a blob, straight from its memory, two at a time.

        Returns the Refs in the order of the buffers, and how many bytes were new.
        Raises ChangedError where a buffer changed while it was written, StoreError where the disk is full; then, and
        when interrupted, no partial blob stays.
        """
        flat = [buffer.cast("B") if buffer.nbytes else memoryview(b"") for buffer in buffers]
        stop = _Stop()
        if sum(buffer.nbytes for buffer in flat) <= READ:
            kept = [self._keep(buffer, stop, None, known=True) for buffer in flat]
            return [ref for ref, _ in kept], sum(new for _, new in kept)
        known = self._known(flat)
        with _held_interrupts(stop), ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(2) as pool:
            futures: list[Future[tuple[Ref, int]]] = []
            try:
                futures.extend(
                    pool.submit(self._keep, buffer, stop, readers, known=there)
                    for buffer, there in zip(flat, known, strict=True)
                )
                kept = [future.result() for future in futures]
            except BaseException:
                # the other threads must stop and take their temporary files along before we leave
                stop.asked = True
                for future in futures:
                    future.cancel()
                raise
        return [ref for ref, _ in kept], sum(new for _, new in kept)

    def put_bundle(self, manifest: dict[str, Any]) -> str:
        """Keep a manifest as a Bundle and return the Bundle's digest; the blobs it names must be here already."""
        data = canonical(manifest)
        digest = _digest(hashlib.sha256(data))
        target = self.bundle_path(digest)
        if not target.is_file():
            with self._temporary(target.parent, len(data)) as (file, place):
                _write(file, memoryview(data))
                place(target)
        return digest

    def _known(self, buffers: list[memoryview]) -> list[bool]:
        """Tell of each buffer whether its content could be in the Store, or come twice in this call."""
        looks = [(buffer.nbytes, *(bytes(part) for part in (buffer[:READ:4099], buffer[-4096:]))) for buffer in buffers]
        counts = Counter(looks)
        known = [buffer.nbytes < LONE or counts[look] > 1 for buffer, look in zip(buffers, looks, strict=True)]
        if all(known):
            return known
        sizes = {path.stat().st_size for path in self.root.glob("blobs/sha256/*/*")}
        return [there or look[0] in sizes for there, look in zip(known, looks, strict=True)]

    def _keep(
        self, buffer: memoryview, stop: _Stop, readers: ThreadPoolExecutor | None, *, known: bool
    ) -> tuple[Ref, int]:
        """Keep one buffer; return its Ref and the bytes that were new.

        Where it cannot be `known`, one pass over the memory writes it; else it is hashed first.
        """
        digest = None
        folder = self.root
        if known:
            hasher = hashlib.sha256()
            for chunk in _chunks(buffer, stop):
                hasher.update(chunk)
            digest = _digest(hasher)
            folder = self.path(digest).parent
            if self.has(digest):
                return Ref(digest, buffer.nbytes), 0
        with self._temporary(folder, buffer.nbytes) as (file, place):
            written = _copy(buffer, file, stop, readers)
            if written != digest if known else not _equal(buffer, file, stop):
                raise ChangedError(f"{buffer.nbytes} bytes in memory changed while they were written to the Store")
            new = place(self.path(written))
        return Ref(written, buffer.nbytes), buffer.nbytes if new else 0

    @contextlib.contextmanager
    def _temporary(self, folder: Path, size: int | None) -> Iterator[tuple[int, Any]]:
        """Open a temporary file beside its target, and give it up unless it is placed."""
        temporary = folder / f".{secrets.token_hex(8)}.part"

        def place(target: Path) -> bool:
            """Give the file its final name; False where the same content came first from somebody else."""
            self._make_folder(target.parent)
            os.fchmod(file, 0o444)
            try:
                # link never replaces, so exactly one of several writers counts its bytes as new
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                temporary.replace(target)
            return True

        try:
            self._make_folder(folder)
            file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise StoreError(f"the Store {self.root} cannot be written: {error.strerror}") from error
        try:
            yield file, place
        except OSError as error:
            raise self._cannot_write(error, size) from error
        finally:
            os.close(file)
            temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the Store and those above it: mkdir's mode holds for the last one only."""
        for part in reversed([folder, *folder.parents]):
            if part != self.root and part.is_relative_to(self.root):
                part.mkdir(mode=0o700, exist_ok=True)

    def _cannot_write(self, error: OSError, size: int | None) -> StoreError:
        """Put a failed write in words."""
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return StoreError(f"the Store {self.root} cannot be written: {error.strerror}")
        needed = "" if size is None else f" {size:,} bytes are needed,"
        free = shutil.disk_usage(self.root).free
        return StoreError(
            f"the disk of the Store {self.root} is full:{needed} {free:,} are free. "
            "Free space there, or set NBDEPLOY_HOME to another disk"
        )


@contextlib.contextmanager
def _held_interrupts(stop: _Stop) -> Iterator[None]:
    """Turn an interrupt into a request to stop, and deliver it once all threads have ended.

    A KeyboardInterrupt inside the locks of a thread pool can leave them locked, and the cell would hang.
    """
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if in_main else None
    if previous in {None, signal.SIG_IGN}:
        yield
        return
    interrupted = False

    def note(*_: Any) -> None:
        nonlocal interrupted
        interrupted = stop.asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupted:
            signal.raise_signal(signal.SIGINT)


def _digest(hasher: Any) -> str:
    return f"sha256:{hasher.hexdigest()}"


def _chunks(buffer: memoryview, stop: _Stop) -> Iterable[memoryview]:
    """Cut a buffer into chunks, and stop early once the call is given up."""
    for start in range(0, buffer.nbytes, CHUNK):
        if stop.asked:
            raise StoreError("writing to the Store was interrupted")
        yield buffer[start : start + CHUNK]


def _write(file: int, data: memoryview) -> None:
    """Write all of it: one write call moves at most 2 GiB, and a signal may cut it short."""
    done = 0
    while done < data.nbytes:
        done += os.write(file, data[done:])


def _copy(buffer: memoryview, file: int, stop: _Stop, readers: ThreadPoolExecutor | None) -> str:
    """Write a buffer and return the digest of what the file holds, hashed while the next chunk is written."""
    hasher, offset = hashlib.sha256(), 0
    pending: Future[None] | None = None
    try:
        for chunk in _chunks(buffer, stop):
            _write(file, chunk)
            if pending is not None:
                pending.result()
            if readers is None or buffer.nbytes <= CHUNK:  # too short to overlap with anything
                _read_back(hasher, file, offset, chunk.nbytes)
            else:
                pending = readers.submit(_read_back, hasher, file, offset, chunk.nbytes)
            offset += chunk.nbytes
    finally:
        if pending is not None:
            pending.result()  # the file is closed after this: nobody may still read it
    return _digest(hasher)


def _equal(buffer: memoryview, file: int, stop: _Stop) -> bool:
    """Tell whether a file holds what is in memory now."""
    offset = 0
    for chunk in _chunks(buffer, stop):
        for start in range(0, chunk.nbytes, READ):
            part = bytes(chunk[start : start + READ])  # bytes are compared at once, memoryviews item by item
            if os.pread(file, len(part), offset) != part:
                return False
            offset += len(part)
    return True


def _read_back(hasher: Any, file: int, offset: int, size: int) -> None:
    """Hash a stretch of the file."""
    end = offset + size
    while offset < end:
        data = os.pread(file, min(READ, end - offset), offset)
        if not data:
            raise OSError(errno.EIO, "the file is shorter than what was written")
        hasher.update(data)
        offset += len(data)
