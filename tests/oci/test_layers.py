"""Layers are the same bytes on every machine, are never written down, and change only where their content does."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdeploy.errors import StoreError
from nbdeploy.oci.deflate import gzipped
from nbdeploy.oci.layers import Archive, Entry, Layer, packed, tree
from nbdeploy.oci.weights import blobs
from nbdeploy.store import Store

SOURCE = Path(tarfile.__file__).read_bytes()


def by_tarfile(content: dict[str, bytes], runnable: tuple[str, ...] = ()) -> bytes:
    """Return what the standard library writes for the same files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        known = set()
        for name, data in sorted(content.items()):
            for end in range(1, name.count("/") + 1):
                folder = "/".join(name.split("/")[:end])
                if folder not in known:
                    known.add(folder)
                    info = tarfile.TarInfo(folder)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755 if name in runnable else 0o644
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    """Return the digest of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read(layer: Layer) -> bytes:
    """Return a layer's bytes, held until the end as a consumer may do, checked against what it says of itself."""
    assert layer.open is not None
    data = b"".join(list(layer.open()))
    assert (len(data), digest(data)) == (layer.size, layer.digest)
    plain = gzip.decompress(data) if layer.media_type.endswith("gzip") else data
    assert digest(plain) == layer.diff_id
    return data


@given(
    st.binary(max_size=3000) | st.lists(st.sampled_from([b"a", b"bcde", b"\0" * 300, bytes(range(256))])).map(b"".join)
)
def test_encoder_gives_back_every_byte(data: bytes) -> None:
    """What our encoder wrote, the standard library reads."""
    assert gzip.decompress(gzipped(data)) == data


def test_encoder_reads_back_far_matches_and_long_runs() -> None:
    """Distances up to the window and beyond, runs, and a file of source code, which shrinks to under a half."""
    dice = random.Random(1)  # noqa: S311 - repeatable
    far = dice.randbytes(32768)
    for data in (far + far, far + b"x" + far, bytes(100_000), b"ab" * 50_000, SOURCE, dice.randbytes(70_000)):
        assert gzip.decompress(gzipped(data)) == data
    assert len(gzipped(SOURCE)) < len(SOURCE) / 2


def test_encoder_is_pinned() -> None:
    """These bytes are part of digests in registries: another encoding would send every image anew."""
    assert gzipped(b"").hex() == "1f8b08000000000000ff03000000000000000000"
    sample = (b"layers of an image, layers of an image\n" * 40) + bytes(1000) + bytes(range(256))
    assert (
        hashlib.sha256(gzipped(sample)).hexdigest()
        == "00b7c2f3ea9b24be99bc14d5f0fdbb257e5cc969a4b90c68727e014c13b29c2f"
    )


def test_archive_has_the_bytes_of_tarfile(tmp_path: Path) -> None:
    """Headers, parents, padding and end are what every tar program expects; names may be long and not ASCII."""
    content = {
        "opt/store/a": b"",
        "opt/store/b": b"x" * 511,
        "opt/store/c": os.urandom(512),
        "opt/store/large": os.urandom((3 << 20) + 17),
        f"opt/{'deep/' * 40}end": b"y" * 513,
        "opt/größe": b"z",
    }
    entries = []
    for number, (name, data) in enumerate(content.items()):
        file = tmp_path / str(number)
        file.write_bytes(data)
        entries.append(Entry(name, file if number % 2 else data, len(data), runnable=name == "opt/store/c"))
    random.Random(2).shuffle(entries)  # noqa: S311 - repeatable
    archive = Archive(entries)
    expected = by_tarfile(content, runnable=("opt/store/c",))
    assert b"".join(list(archive.chunks())) == expected
    assert archive.size == len(expected)
    assert archive.digest() == digest(expected)


def test_nine_gigabytes_are_announced_as_pax(tmp_path: Path) -> None:
    """From 8 GiB on a tar's own field for sizes is too short: tarfile reads the size of a sparse file all the same."""
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(9 << 30)
    archive = Archive([Entry("w", file, 9 << 30)])
    head = next(iter(chunk for chunk in archive.chunks() if chunk))
    info = tarfile.TarInfo.frombuf(head[1024:1536], "utf-8", "strict")
    assert b" size=9663676416\n" in head[512:1024]
    assert info.name == "w"
    content = 3 * 512 + (9 << 30) + 1024
    assert archive.size == content + -content % 10240


def test_changed_file_is_told(tmp_path: Path) -> None:
    """A file that grew, shrank or went away ends the archive with words; no wrong bytes are sent in silence."""
    file = tmp_path / "blob"
    for size in (9, 11):
        file.write_bytes(b"x" * size)
        with pytest.raises(StoreError, match="changed its size"):
            Archive([Entry("a", file, 10)]).digest()
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        Archive([Entry("a", file, 10)]).digest()


def test_small_tree_is_compressed_and_equal_everywhere() -> None:
    """The order in which files were found does not matter."""
    files = [Entry.of("opt/b.py", SOURCE), Entry.of("opt/a.py", b"1\n")]
    layer = tree(files, "code")
    assert layer == tree(reversed(files), "code")
    assert gzip.decompress(read(layer)) == by_tarfile({"opt/a.py": b"1\n", "opt/b.py": SOURCE})


def test_weights_are_hashed_once_and_grouped(tmp_path: Path) -> None:
    """A large blob is a layer alone, small ones share one; the second time no blob is read."""
    store = Store(tmp_path / "store")
    sizes = {}
    for size in (64 << 20, 3 << 20, 2 << 20, 1000, 0):
        ref = store.put_bytes(os.urandom(size))
        sizes[ref.digest] = ref.size
    hashed: list[int] = []
    first = blobs(store, sizes, "opt/store", on_bytes=hashed.append)
    assert [layer.size // (1 << 20) for layer in first] == [64, 5, 0]
    assert sum(hashed) == sum(layer.size for layer in first)
    for layer in first:
        read(layer)
    again = blobs(store, dict(reversed(sizes.items())), "opt/store", on_bytes=hashed.append)
    assert again == first
    assert len(hashed) == 3


def test_damaged_notes_are_computed_again(tmp_path: Path) -> None:
    """Half a note, or one that cannot be true, costs another pass and no wrong digest."""
    store = Store(tmp_path / "store")
    ref = store.put_bytes(b"weights" * 1000)
    first = blobs(store, {ref.digest: ref.size}, "opt/store", on_bytes=lambda _: None)
    note = next((store.root / "layers").iterdir())
    for text in ("", "{", "[]", '{"digest": 5, "size": 1}', json.dumps({"digest": "sha256:0", "size": first[0].size})):
        note.write_text(text)
        assert blobs(store, {ref.digest: ref.size}, "opt/store", on_bytes=lambda _: None) == first
    store.path(ref.digest).unlink()
    with pytest.raises(StoreError, match="missing; deploy again"):
        blobs(store, {ref.digest: ref.size}, "opt/store", on_bytes=lambda _: None)


def names(count: int, seed: int) -> list[str]:
    """Return made-up digests."""
    dice = random.Random(seed)  # noqa: S311 - repeatable
    return [f"sha256:{dice.randbytes(32).hex()}" for _ in range(count)]


@given(st.integers(0, 2**32), st.integers(1, 300))
def test_one_change_leaves_other_layers_alone(seed: int, count: int) -> None:
    """Exchanging one small blob changes the layers it leaves and enters, and those that split or join for it."""
    dice = random.Random(seed)  # noqa: S311 - repeatable
    sizes = {name: dice.randrange(1, 60 << 20) for name in names(count, seed)}
    gone = dice.choice(sorted(sizes))
    changed = {name: size for name, size in sizes.items() if name != gone} | {names(1, seed + 1)[0]: sizes[gone]}
    before = {tuple(group) for group in packed(sizes, most=10**6)}
    after = {tuple(group) for group in packed(changed, most=10**6)}
    assert len(after - before) <= 4
    assert sorted(name for group in before for name in group) == sorted(sizes)


@given(st.integers(0, 2**32), st.integers(0, 500), st.integers(1, 64))
def test_layers_are_never_too_many(seed: int, count: int, most: int) -> None:
    """However many and large the blobs: all are in some layer, once, and layers fit into an image."""
    dice = random.Random(seed)  # noqa: S311 - repeatable
    sizes = {name: dice.choice([0, 5_000, 3 << 20, 70 << 20, 6 << 30]) for name in names(count, seed)}
    groups = packed(sizes, most=max(most, 2))
    assert len(groups) <= max(most, 2)
    assert sorted(name for group in groups for name in group) == sorted(sizes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """Reading a layer of 600 MB takes no more memory than one of 6 MB: under 64 MB for the whole process."""
    file = tmp_path / "blob"
    with file.open("wb") as out:
        out.truncate(600 << 20)
    code = (
        "import re, sys, pathlib\nfrom nbdeploy.oci.layers import Archive, Entry\n"
        "Archive([Entry('a', pathlib.Path(sys.argv[1]), 600 << 20)]).digest()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, env=environ
    )
    assert int(done.stdout) < 64 << 10, f"{done.stdout} KiB"


def test_a_tree_that_is_not_small_is_not_compressed() -> None:
    """The slow encoder is spared: from 1 MiB on a layer is the plain archive, and below it a gzip of the same."""
    data = random.Random(1).randbytes(1 << 20)  # noqa: S311 - bytes that do not compress
    large, small = tree([Entry.of("a/large", data)], "large"), tree([Entry.of("a/small", data[:1000])], "small")
    plain = b"".join(large.open()) if large.open else b""
    assert (large.media_type, large.digest) == ("application/vnd.oci.image.layer.v1.tar", large.diff_id)
    assert plain == by_tarfile({"a/large": data})
    assert small.media_type.endswith("+gzip")
    assert gzip.decompress(b"".join(small.open() if small.open else [])) == by_tarfile({"a/small": data[:1000]})
