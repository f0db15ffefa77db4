"""Layers of an Image: what they are, how files are grouped into them, and tar archives that are never written down.

A large layer is a tar made while it is sent: headers, the files themselves, padding.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdeploy.errors import StoreError
from nbdeploy.oci.deflate import gzipped
from nbdeploy.oci.reference import Reference

TAR = "application/vnd.oci.image.layer.v1.tar"
BLOCK = 256 << 10  # bytes read, hashed and sent at a time: they stay in the processor's cache
LONE = 64 << 20  # bytes from which a file is a layer of its own
BUNDLED = 256 << 20  # bytes of smaller files in one layer, at most
PLAIN = 1 << 20  # bytes from which the slow encoder would cost more than it saves (2 MB/s, 160 times the memory)
TINY = 1 << 20  # bytes up to which files are kept apart from larger ones: they change more often
MOST = 64  # layers of one kind


@dataclass(frozen=True)
class Layer:
    """One layer of an Image.

    Attributes:
        media_type: as in the image's manifest.
        digest: of the bytes that are sent.
        diff_id: digest of the uncompressed tar.
        size: bytes that are sent.
        title: what it holds, for people.
        open: yields exactly `size` bytes, from the start at each call; None for a layer that lies in a registry.
        origin: the image in whose repository the layer lies already.
    """

    media_type: str
    digest: str
    diff_id: str
    size: int
    title: str
    open: Callable[[], Iterable[bytes | memoryview]] | None = field(default=None, compare=False, repr=False)
    origin: Reference | None = None


@dataclass(frozen=True)
class Entry:
    """A file in an archive: its path there, its content or the file that holds it, its size in bytes."""

    name: str
    source: bytes | Path
    size: int
    runnable: bool = False

    @classmethod
    def of(cls, name: str, data: bytes) -> Entry:
        """Return an entry of content in memory."""
        return cls(name, data, len(data))


class Archive:
    """A tar of entries, sorted, with the folders above them, without times and owners: equal content, equal bytes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.name)

    @property
    def size(self) -> int:
        """Bytes of the whole archive."""
        return sum(len(item) if isinstance(item, bytes) else item.size for item in self._items())

    def chunks(self) -> Iterator[bytes]:
        """Yield the archive, about a block at a time. Raises StoreError where a file is gone or has another size."""
        pending = bytearray()
        for item in self._items():
            if isinstance(item, Entry) and item.size > BLOCK // 4:
                yield bytes(pending)
                pending.clear()
                yield from _read(item)
            else:
                for part in (item,) if isinstance(item, bytes) else _read(item):
                    pending += part
            if len(pending) >= BLOCK:
                yield bytes(pending)
                pending.clear()
        yield bytes(pending)

    def digest(self) -> str:
        """Return the digest of the archive, in one pass over its files."""
        hasher = hashlib.sha256()
        for chunk in self.chunks():
            hasher.update(chunk)
        return f"sha256:{hasher.hexdigest()}"

    def _items(self) -> Iterator[bytes | Entry]:
        """Yield headers and padding as bytes, and the entries whose content stands between them."""
        folders: set[str] = set()
        total = 0
        for entry in self._entries:
            head = b"".join(_folders(entry.name, folders)) + _header(entry.name, entry.size, runnable=entry.runnable)
            yield head
            yield entry
            padding = bytes(-entry.size % tarfile.BLOCKSIZE)
            yield padding
            total += len(head) + entry.size + len(padding)
        total += 2 * tarfile.BLOCKSIZE
        yield bytes(2 * tarfile.BLOCKSIZE + -total % tarfile.RECORDSIZE)


def _folders(name: str, known: set[str]) -> Iterator[bytes]:
    """Yield the headers of the folders above a file that were not there yet."""
    parts = name.split("/")
    for end in range(1, len(parts)):
        folder = "/".join(parts[:end])
        if folder not in known:
            known.add(folder)
            yield _header(folder, 0, folder=True)


def _header(name: str, size: int, *, folder: bool = False, runnable: bool = False) -> bytes:
    """Return the header of a file or folder; sizes from 8 GiB and long names get a PAX record before it."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o755 if folder or runnable else 0o644
    if folder:
        info.type = tarfile.DIRTYPE
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _read(entry: Entry) -> Iterator[bytes]:
    """Yield an entry's content. A block is new memory each time: whoever sends it may keep it as long as they like."""
    if isinstance(entry.source, bytes):
        yield entry.source
        return
    left = entry.size
    try:
        with entry.source.open("rb", buffering=0) as file:
            while block := file.read(min(BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    break
                yield block
    except OSError as error:
        raise StoreError(f"{entry.source} cannot be read: {error.strerror}; deploy again") from error
    if left:
        raise StoreError(f"{entry.source} has changed its size since it was looked at; deploy again")


def tree(entries: Iterable[Entry], title: str) -> Layer:
    """Return a small layer, with the same bytes on every machine; one of PLAIN bytes or more is not compressed."""
    plain = b"".join(Archive(entries).chunks())
    if len(plain) >= PLAIN:
        return Layer(TAR, _digest(plain), _digest(plain), len(plain), title, lambda: (plain,))
    data = gzipped(plain)
    return Layer(f"{TAR}+gzip", _digest(data), _digest(plain), len(data), title, lambda: (data,))


def archived(entries: Sequence[Entry], title: str, digest: str, size: int) -> Layer:
    """Return the layer of an archive whose digest and size are known; its files are read when it is sent."""
    return Layer(TAR, digest, digest, size, title, lambda: Archive(entries).chunks())


def stored(archive: Path, title: str, digest: str, size: int) -> Layer:
    """Return the layer of an archive that lies in a file."""
    return Layer(TAR, digest, digest, size, title, lambda: _read(Entry(archive.name, archive, size)))


def packed(sizes: Mapping[str, int], *, lone: int = LONE, bundled: int = BUNDLED, most: int = MOST) -> list[list[str]]:
    """Group named things into layers: large ones alone, the others together as long as they stay below `bundled`.

    Groups follow from the names' own hashes, so that a change of one thing changes its own group and hardly ever
    another. With more than `most` groups both limits, in bytes, are doubled until it fits.
    """
    while True:
        alone = [[name] for name, size in sorted(sizes.items()) if size >= lone]
        tiny = [name for name, size in sizes.items() if size <= min(TINY, lone - 1)]
        other = [name for name, size in sizes.items() if TINY < size < lone]
        groups = [*alone, *_halved(other, sizes, bundled, 0), *_halved(tiny, sizes, bundled, 0)]
        if len(groups) <= most:
            return groups
        lone, bundled = lone * 2, bundled * 2


def _halved(names: Iterable[str], sizes: Mapping[str, int], limit: int, depth: int) -> list[list[str]]:
    """Split names by one more bit of their hashes for as long as they are too much together."""
    group = sorted(names)
    if not group:
        return []
    if len(group) == 1 or sum(sizes[name] for name in group) <= limit:
        return [group]
    sides: tuple[list[str], list[str]] = ([], [])
    for name in group:
        sides[hashlib.sha256(name.encode()).digest()[depth // 8] >> (7 - depth % 8) & 1].append(name)
    return [*_halved(sides[0], sizes, limit, depth + 1), *_halved(sides[1], sizes, limit, depth + 1)]


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
