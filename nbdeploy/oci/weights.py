"""Layers of weights: the Store's own files, sent as a tar that is never written.

The digest of a layer costs one pass over its files and is kept in the Store under the list of contents, which names
blobs by their digests. Weights are not compressed: that would save a tenth of their size for ten times the processor
time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nbdeploy_server.bundle import canonical
from nbdeploy_server.manifest import DIGEST

from nbdeploy.errors import StoreError
from nbdeploy.oci.layers import MOST, Archive, Entry, Layer, archived, packed
from nbdeploy.store import Store


def blob_entry(store: Store, below: str, digest: str, size: int) -> Entry:
    """Return the entry of a Store's blob, in a Store that lies at `below` in the image."""
    name = digest.partition(":")[2]
    return Entry(f"{below}/blobs/sha256/{name[:2]}/{name}", store.path(digest), size)


def blobs(
    store: Store, sizes: Mapping[str, int], below: str, *, most: int = MOST, on_bytes: Callable[[int], None]
) -> tuple[Layer, ...]:
    """Return the layers of these blobs (digest → size in bytes), `most` at most, uncompressed and never spooled.

    Digests of layers that were made before come from the Store; the others are computed by two threads, and
    `on_bytes` hears of each layer's bytes when that is done. Raises StoreError where a blob is missing.
    """
    groups = [[blob_entry(store, below, name, sizes[name]) for name in group] for group in packed(sizes, most=most)]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(_known, itertools.repeat(store), groups, itertools.repeat(on_bytes))
        layers = [
            archived(group, _title(group), digest, size) for group, (digest, size) in zip(groups, found, strict=True)
        ]
    return tuple(layers)


def _title(group: Sequence[Entry]) -> str:
    size = sum(entry.size for entry in group)
    return f"weights {Path(group[0].name).name[:12]}" if len(group) == 1 else f"{len(group)} blobs, {size / 1e6:.1f} MB"


def _known(store: Store, group: Sequence[Entry], on_bytes: Callable[[int], None]) -> tuple[str, int]:
    """Return digest and size of a layer of blobs: what the Store remembers under its contents, or computed."""
    archive = Archive(group)
    size = archive.size
    key = hashlib.sha256(canonical({"contents": [[entry.name, entry.size] for entry in group]})).hexdigest()
    note = store.root / "layers" / f"{key}.json"
    digest = _remembered(note, size)
    if digest is None:
        digest = archive.digest()
        on_bytes(size)
        _remember(note, {"digest": digest, "size": size})
    for entry in group:
        if isinstance(entry.source, Path) and not entry.source.is_file():
            raise StoreError(f"{entry.source} is missing; deploy again")
    return digest, size


def _remembered(note: Path, size: int) -> str | None:
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(known, dict) and known.get("size") == size and isinstance(known.get("digest"), str)
    return str(known["digest"]) if whole and DIGEST.fullmatch(known["digest"]) else None


def _remember(note: Path, known: Mapping[str, Any]) -> None:
    temporary = note.with_name(f".{secrets.token_hex(8)}.part")
    try:
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_bytes(canonical(known))
        temporary.replace(note)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"the Store cannot keep {note}: {error.strerror}") from error
