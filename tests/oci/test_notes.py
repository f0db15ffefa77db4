"""What this machine remembers of registries saves work, and is never needed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nbdeploy.errors import RegistryError
from nbdeploy.oci import notes as module
from nbdeploy.oci.base import base_of
from nbdeploy.oci.notes import Notes
from nbdeploy.oci.reference import Reference
from tests.oci.test_image import make_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbdeploy.oci.registry import Registry
    from tests.oci.servers import Front

HOST = "registry.example.com:5000"
A, B = (f"sha256:{letter * 64}" for letter in "ab")


def digest(data: bytes) -> str:
    """Return the digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_the_last_repository_is_remembered(tmp_path: Path) -> None:
    """Who got a blob last is known to the next process, for this registry alone; nobody else may read it."""
    Notes(tmp_path, HOST).got("team/iris", [A, B])
    Notes(tmp_path, HOST).got("team/other", [B])
    assert [Notes(tmp_path, HOST).source(one) for one in (A, B)] == ["team/iris", "team/other"]
    assert Notes(tmp_path, "registry.example.com").source(A) == ""
    found = list(tmp_path.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in found if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}


@pytest.mark.parametrize("content", [b"", b"../x", b"a b", b"team/iris:1", b"\xff\xfe", b"x?from=y", b"[1]" * 9999])
def test_a_damaged_note_is_none(tmp_path: Path, content: bytes) -> None:
    """What cannot name a repository is not used."""
    notes = Notes(tmp_path, HOST)
    notes.got("team/iris", [A])
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(content)
    assert notes.source(A) == ""


def test_documents_are_checked(tmp_path: Path) -> None:
    """A document whose bytes changed is as good as none."""
    notes = Notes(tmp_path, HOST)
    notes.keep(digest(b"{}"), b"{}")
    assert notes.document(digest(b"{}")) == b"{}"
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(b"[]")
    assert notes.document(digest(b"{}")) is None
    assert notes.document("3.11") is None


def test_notes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go."""
    monkeypatch.setitem(module._MOST, "blobs", 3)
    notes = Notes(tmp_path, HOST)
    blobs = [digest(bytes([number])) for number in range(6)]
    for number, blob in enumerate(blobs):
        notes.got("a", [blob])
        path = next(tmp_path.rglob(blob[7:]))
        os.utime(path, (number, number))
    assert [notes.source(blob) for blob in blobs] == ["", "", "", "a", "a", "a"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """Where no note can be kept nothing is remembered, and nothing fails."""
    (tmp_path / "file").write_bytes(b"")
    notes = Notes(tmp_path / "file", HOST)
    notes.got("a", [A])
    notes.resolve(Reference.parse("a"), A)
    assert notes.source(A) == notes.resolved(Reference.parse("a"), 60.0) == ""


WRITES = """
import sys, pathlib
from nbdeploy.oci.notes import Notes
notes = Notes(pathlib.Path(sys.argv[1]), "a.b")
for _ in range(200):
    notes.got(sys.argv[2], ["sha256:" + "a" * 64])
    assert notes.source("sha256:" + "a" * 64) in {"x" * 99, "y" * 99}
"""


def test_two_at_once(tmp_path: Path) -> None:
    """Two processes that note the same never read half a note, and leave nothing half written."""
    both = [subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path), name * 99]) for name in "xy"]
    assert [one.wait(60) for one in both] == [0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_base_that_was_seen_costs_one_request(front: Front, connect: Callable[..., Registry], tmp_path: Path) -> None:
    """One HEAD, or none just after another looked; a tag that moved, and a document that is damaged, are fetched."""
    client = connect(front.host)
    make_base(client, PYTHON_VERSION="3.11.8")
    text = f"{front.host}/python:3.11"

    def found(fresh: float = 0.0) -> list[str]:
        front.seen.clear()
        base = base_of(text, "linux/amd64", connect, python="3.11", notes=tmp_path, fresh=fresh)
        seen = [one.method for one in front.seen]
        assert base == base_of(text, "linux/amd64", connect, python="3.11")
        return seen

    assert found() == ["HEAD", "GET", "GET", "GET"]
    assert found() == ["HEAD"]
    assert found(fresh=60.0) == []
    make_base(client, PYTHON_VERSION="3.11.9")
    assert found() == ["HEAD", "GET", "GET", "GET"]
    for path in tmp_path.rglob("documents/*"):
        path.write_bytes(b"{}")
    assert found() == ["HEAD", "GET", "GET", "GET"]


def test_a_base_that_was_removed_is_told(front: Front, connect: Callable[..., Registry], tmp_path: Path) -> None:
    """Having seen a base does not mean that it is still there."""
    make_base(connect(front.host))
    text = f"{front.host}/python:3.11"
    base_of(text, "linux/amd64", connect, notes=tmp_path)
    front.fail("HEAD", "/manifests/", lambda handler: handler.answer(404))
    front.fail("GET", "/manifests/", lambda handler: handler.answer(404))
    with pytest.raises(RegistryError, match="There is no base image"):
        base_of(text, "linux/amd64", connect, notes=tmp_path)
