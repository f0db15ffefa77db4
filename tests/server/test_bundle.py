"""Reading Bundles: nothing damaged, foreign or unlisted gets as far as the first byte of the pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbdeploy_server import restore
from nbdeploy_server.bundle import Bundle, Manifest, Ref, blob_path, canonical, manifest_path
from nbdeploy_server.errors import BundleInvalid, LoadFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LARGE = (1 << 20) + 1
RAN: list[str] = []


def tripwire(text: str) -> str:
    """Be called by a skeleton that must not be unpickled."""
    RAN.append(text)
    return text


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def put(store: Path, data: bytes) -> dict[str, Any]:
    """Write a blob as a Store does."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    path = blob_path(store, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"digest": digest, "size": len(data)}


def put_manifest(store: Path, data: bytes) -> str:
    """Write the bytes of a manifest as a Bundle."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    path = manifest_path(store, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return digest


def example(store: Path, value: Any = None, **changes: Any) -> dict[str, Any]:
    """Return a manifest whose blobs are in the Store, with one of every part."""
    skeleton = pickle.dumps({"predict": value}, protocol=5)
    cell = put(store, b"def predict(x):\n    return x\n")
    names = [f"{__name__}:tripwire"] if value is None else changes.pop("globals", [])
    return {
        "format_version": 1,
        "requires": {
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "implementation": platform.python_implementation().lower(),
            "platform": "linux-x86_64",
        },
        "made_with": {"python": "3.11.7"},
        "skeleton": put(store, skeleton),
        "blobs": [{**put(store, b"\1" * LARGE), "start": 64, "storage_size": LARGE + 64, "device": "cpu"}],
        "files": [
            {**put(store, b"x = 1\n"), "path": "pkg/mod.py", "kind": "code"},
            {**put(store, b"a,b\n"), "path": "data.csv", "kind": "file"},
            {**put(store, b"\2" * LARGE), "path": "sub/weights.bin", "kind": "model"},
            {**put(store, b"wheel"), "path": "p-1-py3-none-any.whl", "kind": "wheel"},
        ],
        "cells": {"<cell 0123456789ab>": cell},
        "variables": {"KERAS_BACKEND": "torch"},
        "secrets": ["OPENAI_API_KEY"],
        "distributions": [{"name": "numpy", "version": "2.0", "origin": None, "wheel": None}],
        "predict": {
            "name": "predict",
            "kind": "function",
            "model": None,
            "how": "none",
            "variable": None,
            "source": "none",
        },
        "signature": {"parameters": []},
        "sample": put(store, b"sample"),
        "answer": None,
        "seed": 0,
        "globals": names,
    } | changes


def opened(store: Path, manifest: dict[str, Any]) -> Bundle:
    """Write and open a Bundle."""
    return Bundle.open(store, put_manifest(store, canonical(manifest)))


def test_whole_bundle_loads(tmp_path: Path) -> None:
    """An intact Bundle passes the full check and gives its objects."""
    bundle = opened(tmp_path, example(tmp_path, Call(abs, -3), globals=["builtins:abs"]))
    bundle.check(full=True)
    assert bundle.load() == {"predict": 3}
    sample = bundle.manifest.sample
    assert sample is not None
    assert bundle.read(sample) == b"sample"


def test_one_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    """A changed byte in any blob is found before anything is unpickled, and the blob is named."""
    manifest = example(tmp_path, Call(tripwire, "flipped"), globals=[f"{__name__}:tripwire"])
    bundle = opened(tmp_path, manifest)
    for digest in bundle.manifest.refs():
        path = blob_path(tmp_path, digest)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BundleInvalid, match=f"{digest[:19]} is damaged"):
            Bundle.open(tmp_path, bundle.digest).load()
        path.write_bytes(data)
    assert "flipped" not in RAN
    Bundle.open(tmp_path, bundle.digest).load()
    assert "flipped" in RAN


def test_missing_and_short_blobs_are_found(tmp_path: Path) -> None:
    """A blob that is gone or cut short is named."""
    bundle = opened(tmp_path, example(tmp_path))
    path = blob_path(tmp_path, bundle.manifest.blobs[0].ref.digest)
    path.write_bytes(b"short")
    with pytest.raises(BundleInvalid, match=f"has 5 bytes instead of {LARGE}"):
        bundle.check()
    path.unlink()
    with pytest.raises(BundleInvalid, match=r"is missing in"):
        bundle.check()


def test_stamp_spares_the_second_hash(tmp_path: Path) -> None:
    """A large blob that a stamp vouches for is not hashed again, unless asked for; a touched one is."""
    bundle = opened(tmp_path, example(tmp_path))
    bundle.check(full=True)
    stamp = json.loads((tmp_path / "verified" / f"{bundle.digest[7:]}.json").read_bytes())
    path = blob_path(tmp_path, bundle.manifest.blobs[0].ref.digest)
    state = path.stat()
    assert stamp[bundle.manifest.blobs[0].ref.digest] == [state.st_size, state.st_mtime_ns]
    path.write_bytes(b"\3" * LARGE)
    with pytest.raises(BundleInvalid, match="is damaged"):
        bundle.check()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    bundle.check()
    with pytest.raises(BundleInvalid, match="is damaged"):
        bundle.check(full=True)


def test_broken_stamp_is_no_stamp(tmp_path: Path) -> None:
    """A stamp that is no JSON only costs the hashing."""
    bundle = opened(tmp_path, example(tmp_path))
    path = tmp_path / "verified" / f"{bundle.digest[7:]}.json"
    path.parent.mkdir()
    path.write_bytes(b"[1")
    bundle.check()
    assert json.loads(path.read_bytes())


def test_changed_or_absent_manifest(tmp_path: Path) -> None:
    """A manifest that does not match the Bundle's digest is not read at all."""
    digest = put_manifest(tmp_path, canonical(example(tmp_path)))
    manifest_path(tmp_path, digest).write_bytes(canonical(example(tmp_path, seed=1)))
    with pytest.raises(BundleInvalid, match="was changed"):
        Bundle.open(tmp_path, digest)
    with pytest.raises(BundleInvalid, match="is not in"):
        Bundle.open(tmp_path, f"sha256:{'0' * 64}")
    with pytest.raises(BundleInvalid, match="is no digest"):
        Bundle.open(tmp_path, "../../etc/passwd")


def test_newer_format_says_what_to_do(tmp_path: Path) -> None:
    """A Bundle of a later format is refused before its other fields are looked at."""
    with pytest.raises(BundleInvalid, match=r"made by a newer nbdeploy \(format 2\); upgrade nbdeploy here"):
        opened(tmp_path, {"format_version": 2})


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ({"python": "2.7"}, r"made for Python 2\.7, this is 3\."),
        ({"implementation": "pypy"}, r"made for pypy, this is "),
    ],
)
def test_other_python_is_refused_before_unpickling(tmp_path: Path, requires: dict[str, str], message: str) -> None:
    """Bytecode of another Python is never loaded."""
    manifest = example(tmp_path, Call(tripwire, message), globals=[f"{__name__}:tripwire"])
    manifest["requires"] |= requires
    with pytest.raises(BundleInvalid, match=message):
        opened(tmp_path, manifest).load()
    assert message not in RAN


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a/../b", "a//b", "", ".", "a/.", "a\\b", "C:x", "a\0b", "a/", "a\nb", 3, None]
)
def test_paths_that_leave_the_folder(tmp_path: Path, path: object) -> None:
    """A file's path cannot point outside, on any operating system."""
    file = {**put(tmp_path, b"x"), "path": path, "kind": "code"}
    with pytest.raises(BundleInvalid, match=r"files\[0\].path"):
        Manifest.parse(canonical(example(tmp_path, files=[file])))


def test_paths_that_clash(tmp_path: Path) -> None:
    """No file appears twice, or below another file."""
    file = {**put(tmp_path, b"x"), "path": "a", "kind": "model"}
    for other in ("a", "a/b"):
        with pytest.raises(BundleInvalid, match="manifest's files"):
            Manifest.parse(canonical(example(tmp_path, files=[file, {**file, "path": other}])))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("skeleton", {"digest": "sha256:12", "size": 1}, "skeleton.digest"),
        ("skeleton", {"digest": f"sha256:{'0' * 64}", "size": -1}, "skeleton.size"),
        ("skeleton", {"digest": f"sha256:{'0' * 64}", "size": True}, "skeleton.size"),
        ("seed", "0", "seed"),
        ("globals", ["os"], r"globals\[0\]"),
        ("secrets", [""], r"secrets\[0\]"),
        ("variables", {"A": 1}, r"variables\['A'\]"),
        ("requires", {"python": "3.11"}, r"requires\['implementation'\]"),
        ("predict", {"name": "p"}, "predict.kind"),
        ("distributions", [{"name": "x", "version": "1", "wheel": "../x"}], r"distributions\[0\].wheel"),
        ("extra", 1, r"does not know \['extra'\]"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, field: str, value: object, message: str) -> None:
    """A message leads to the field that is wrong."""
    with pytest.raises(BundleInvalid, match=message):
        Manifest.parse(canonical(example(tmp_path, **{field: value})))


def test_blob_outside_its_storage(tmp_path: Path) -> None:
    """A blob cannot claim bytes beyond its storage, or an odd device."""
    for change, message in (({"start": 65}, "start"), ({"device": "../x"}, "device")):
        manifest = example(tmp_path)
        manifest["blobs"][0] |= change
        with pytest.raises(BundleInvalid, match=rf"blobs\[0\].{message}"):
            Manifest.parse(canonical(manifest))


def test_unlisted_global_is_refused(tmp_path: Path) -> None:
    """A skeleton that names something its manifest does not list is not of this manifest."""
    bundle = opened(tmp_path, example(tmp_path, Call(tripwire, "unlisted"), globals=["builtins:abs"]))
    with pytest.raises(BundleInvalid, match=r"the skeleton names .*tripwire, which its manifest does not list"):
        bundle.load()
    assert "unlisted" not in RAN


@pytest.mark.parametrize("name", ["Handle", "io.BytesIO", "importlib"])
def test_restore_gives_only_its_functions(tmp_path: Path, name: str) -> None:
    """The rebuild functions are reached by their written names, nothing else through their module."""
    skeleton = b"\x80\x04" + b"\x8c" + bytes([len("nbdeploy_server.restore")]) + b"nbdeploy_server.restore"
    skeleton += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    bundle = opened(tmp_path, example(tmp_path, skeleton=put(tmp_path, skeleton)))
    with pytest.raises(BundleInvalid, match="of the restore functions"):
        bundle.load()


def test_blobs_are_mapped_once_and_privately(tmp_path: Path) -> None:
    """Two mentions of a blob share memory; writing there leaves the blob alone; a wrong index is an error."""
    value = [Call(restore.blob, 0), Call(restore.blob, 0)]
    bundle = opened(tmp_path, example(tmp_path, value, globals=[]))
    one, two = bundle.load()["predict"]
    assert one is two
    assert (one.start, len(one.buffer)) == (64, LARGE)
    one.buffer[0] = 7
    bundle.check(full=True)
    for index in (-1, 1):
        with pytest.raises(BundleInvalid, match="names blob"):
            opened(tmp_path, example(tmp_path, Call(restore.blob, index), globals=[])).load()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_xyz:f", "need the module 'no_such_module_xyz'"),
        ("json:no_such_name", "need a name that is missing here"),
    ],
)
def test_what_is_missing_here_is_named(tmp_path: Path, name: str, message: str) -> None:
    """A module or name that this environment lacks is told, not a traceback of the unpickler."""
    module, attribute = name.split(":")
    skeleton = f"c{module}\n{attribute}\n.".encode()
    bundle = opened(tmp_path, example(tmp_path, skeleton=put(tmp_path, skeleton), globals=[name]))
    with pytest.raises(LoadFailed, match=message):
        bundle.load()


def test_objects_that_fail_to_rebuild(tmp_path: Path) -> None:
    """Any exception of user code is told with its type and words."""
    bundle = opened(tmp_path, example(tmp_path, Call(int, "x"), globals=["builtins:int"]))
    with pytest.raises(LoadFailed, match="cannot be rebuilt: ValueError: invalid literal"):
        bundle.load()


def test_truncated_skeleton_of_a_matching_manifest(tmp_path: Path) -> None:
    """A skeleton that ends early ends in LoadFailed."""
    bundle = opened(tmp_path, example(tmp_path, skeleton=put(tmp_path, pickle.dumps([1, 2])[:-1])))
    with pytest.raises(LoadFailed, match="cannot be rebuilt"):
        bundle.load()


def test_files_are_unpacked_by_kind(tmp_path: Path) -> None:
    """Each kind has its folder, models are links to the blobs, doing it again changes nothing."""
    store, target = tmp_path / "store", tmp_path / "target"
    bundle = opened(store, example(store))
    bundle.unpack_files(target)
    assert (target / "code/pkg/mod.py").read_text() == "x = 1\n"
    assert (target / "files/data.csv").read_text() == "a,b\n"
    assert (target / "wheels/p-1-py3-none-any.whl").read_bytes() == b"wheel"
    link = target / "model/sub/weights.bin"
    assert link.is_symlink()
    assert link.stat().st_size == LARGE
    before = {path: path.lstat().st_ino for path in target.rglob("*")}
    bundle.unpack_files(target)
    assert {path: path.lstat().st_ino for path in target.rglob("*")} == before
    (target / "code/pkg/mod.py").write_text("x = 2\n")
    (target / "code/old.py").write_text("")
    bundle.unpack_files(target)
    assert (target / "code/pkg/mod.py").read_text() == "x = 1\n"
    assert sorted(path.name for path in (target / "code").rglob("*")) == ["mod.py", "pkg"]
    assert sorted(path.name for path in target.iterdir()) == ["code", "files", "model", "wheels"]


def test_links_in_the_target_are_not_followed(tmp_path: Path) -> None:
    """A folder that was replaced by a link is refused, and nothing is written behind a link inside."""
    store, target, outside = tmp_path / "store", tmp_path / "target", tmp_path / "outside"
    bundle = opened(store, example(store))
    outside.mkdir()
    (target / "code").mkdir(parents=True)
    (target / "code" / "pkg").symlink_to(outside)
    bundle.unpack_files(target)
    assert list(outside.iterdir()) == []
    assert (target / "code/pkg/mod.py").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "code").symlink_to(outside)
    with pytest.raises(BundleInvalid, match="is a link"):
        bundle.unpack_files(other)


def test_damaged_file_is_not_unpacked(tmp_path: Path) -> None:
    """A damaged file leaves no folder behind."""
    store, target = tmp_path / "store", tmp_path / "target"
    bundle = opened(store, example(store))
    blob_path(store, bundle.manifest.files[0].ref.digest).write_bytes(b"x = 9\n")
    with pytest.raises(BundleInvalid, match="is damaged"):
        bundle.unpack_files(target)
    assert list(target.iterdir()) == []


def test_read_checks_the_digest(tmp_path: Path) -> None:
    """Reading a blob that changed is an error, whatever was checked before."""
    bundle = opened(tmp_path, example(tmp_path))
    sample = bundle.manifest.sample
    assert sample is not None
    blob_path(tmp_path, sample.digest).write_bytes(b"sampel")
    with pytest.raises(BundleInvalid, match="is damaged"):
        bundle.read(sample)
    with pytest.raises(BundleInvalid, match="cannot be read"):
        bundle.read(Ref(f"sha256:{'0' * 64}", 1))


def test_truncated_manifests_are_refused(tmp_path: Path) -> None:
    """A manifest cut off anywhere is no manifest."""
    data = canonical(example(tmp_path))
    for end in range(0, len(data), 37):
        with pytest.raises(BundleInvalid):
            Manifest.parse(data[:end])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_manifests_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any change of a manifest is either read or refused as BundleInvalid, and runs no code."""
    store = tmp_path_factory.mktemp("store")
    manifest: Any = example(store, Call(tripwire, "mutated"), globals=["builtins:abs"])
    for _ in range(data.draw(st.integers(1, 3))):
        place = manifest
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key: Any = data.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(json_values)
            break
    raw = json.dumps(manifest).encode()
    at = data.draw(st.integers(0, len(raw)))
    if data.draw(st.booleans()):
        raw = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + 1 :]
    try:
        bundle = Bundle.open(store, put_manifest(store, raw))
        bundle.check()
        bundle.unpack_files(store / "target")
        bundle.fill_linecache()
        bundle.load()
    except (BundleInvalid, LoadFailed):
        pass
    assert "mutated" not in RAN
