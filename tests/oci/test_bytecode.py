"""Replicas import without compiling; bytecode is the same from every home, and the packages' own layers stay theirs."""

from __future__ import annotations

import asyncio
import email
import io
import json
import marshal
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.oci import packages
from tests.wheelhouse import make_wheel, row, wheelhouse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdeploy.oci.layers import Layer

__all__ = ["wheelhouse"]

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = sys.implementation.cache_tag
SITE = "opt/nbdeploy/site"


def layers(root: Path, *rows: dict[str, Any], python: str = PYTHON) -> tuple[list[Layer], list[Layer], list[str]]:
    """Return the layers of packages, those of bytecode, and what was told meanwhile."""
    words: list[str] = []
    platform = "x86_64-manylinux_2_28"
    made = packages.layers(list(rows), None, root, python=python, platform=platform, on_progress=words.append).layers
    bytecode = [layer for layer in made if layer.title.startswith("bytecode")]
    return [layer for layer in made if layer not in bytecode], bytecode, words


def read(layer: Layer) -> bytes:
    """Return a layer's bytes."""
    assert layer.open is not None
    data = b"".join(layer.open())
    assert len(data) == layer.size
    return data


def unpack(found: Iterable[Layer], folder: Path) -> None:
    """Lay out layers as a node does."""
    for layer in found:
        with tarfile.open(fileobj=io.BytesIO(read(layer))) as archive:
            archive.extractall(folder, filter="fully_trusted")  # noqa: S202 - written by us


def modules(name: str, source: str | None) -> dict[str, bytes]:
    """Return a package of the standard library under another name: code of every kind."""
    folder = Path(source or "").parent
    return {f"{name}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*.py")}


def test_a_replica_imports_from_the_bytecode(tmp_path: Path, wheelhouse: Path) -> None:
    """With a root that holds what an Image holds, every module of a package and of the server comes compiled."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple/__init__.py": b"import apple.core\n", "apple/core.py": b"x = 1\n"})
    own, bytecode, _ = layers(tmp_path / "sites", row("apple", "1.0"))
    root = tmp_path / "root"
    unpack([*own, *bytecode], root)
    for name, file in packages.server_files().items():
        shutil.copyfile(file, root / packages.SERVER / "nbdeploy_server" / name)
    paths = [str(root / SITE), str(root / packages.SERVER)]
    code = (
        f"import sys, os; sys.path[:0] = {paths}\n"
        "import apple.core as core, nbdeploy_server.manifest as manifest\n"
        "print(all(os.path.exists(each.__cached__) for each in (core, manifest)))"
    )
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.pyc")}
    done = subprocess.run([sys.executable, "-I", "-B", "-v", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    server = f"{packages.SERVER}/nbdeploy_server/__pycache__/manifest"
    for name in (f"{SITE}/apple/__pycache__/__init__", f"{SITE}/apple/__pycache__/core", server):
        assert f"# {root}/{name}.{TAG}.pyc matches" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.pyc")} == before
    data = (root / SITE / "apple" / "__pycache__" / f"core.{TAG}.pyc").read_bytes()
    assert data[4:8] == b"\1\0\0\0"  # never compared with its source
    assert marshal.loads(data[16:]).co_filename == f"/{SITE}/apple/core.py"  # noqa: S302 - written by us


def test_what_cannot_be_compiled_or_imported_is_left_out(tmp_path: Path, wheelhouse: Path) -> None:
    """Files of other Pythons, broken ones, scripts and tests have no bytecode; all others have."""
    good = {"apple/__init__.py": b"", "apple/ä.py": "x = 'ä'\n".encode(), "plain.py": b"y = '\\d'\n"}
    bad = {
        "apple/old.py": b"print 'two'\n",
        "apple/zero.py": b"x = '\0'\n",
        "apple/coded.py": b"# coding: latin-2x\n",
        "apple/deep.py": b"x = " + b"(" * 5000 + b")" * 5000,
        "apple/long.py": b"x = " + b"+".join([b"y"] * 20_000),
        "apple/tests/test_core.py": b"x = 1\n",
        "apple/not-a-name.py": b"x = 1\n",
        "apple/data.txt": b"x = 1\n",
        "apple-1.0.data/scripts/tool.py": b"x = 1\n",
    }
    make_wheel(wheelhouse, "apple", "1.0", {**good, **bad})
    own, (bytecode, _), _ = layers(tmp_path / "sites", row("apple", "1.0"))
    unpack([*own, bytecode], tmp_path / "root")
    found = {path.relative_to(tmp_path / "root" / SITE).as_posix() for path in tmp_path.glob("root/**/*.pyc")}
    assert found == {
        f"apple/__pycache__/__init__.{TAG}.pyc",
        f"apple/__pycache__/ä.{TAG}.pyc",
        f"__pycache__/plain.{TAG}.pyc",
    }


def test_same_bytes_from_two_homes_whatever_ran_before(
    tmp_path: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the folder, nor variables of Python, nor what else was compiled before leaves a trace."""
    make_wheel(wheelhouse, "apple", "1.0", modules("apple", asyncio.__file__))
    make_wheel(wheelhouse, "pear", "1.0", modules("pear", email.__file__))
    first = layers(tmp_path / "a", row("apple", "1.0"), row("pear", "1.0"))
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "cache"))
    monkeypatch.setenv("LC_ALL", "C")
    second = layers(tmp_path / "deeper" / "in" / "b", row("apple", "1.0"), row("pear", "1.0"))
    assert first[:2] == second[:2]
    assert [read(layer) for layer in first[1]] == [read(layer) for layer in second[1]]
    source = {name: data for name, data in modules("apple", asyncio.__file__).items() if "/test" not in name}
    reverse = compiled_alone(tmp_path, dict(reversed(list(source.items()))))
    with tarfile.open(fileobj=io.BytesIO(read(first[1][0]))) as archive:
        for name, data in reverse.items():
            file = archive.extractfile(f"{SITE}/{name}")
            assert file is not None
            assert file.read() == data, name


def compiled_alone(folder: Path, source: dict[str, bytes]) -> dict[str, bytes]:
    """Compile files in this order, in a process of their own with another hash seed; return the bytecode by name."""
    order, targets = [], {}
    for number, (name, data) in enumerate(source.items()):
        (folder / f"{number}.py").write_bytes(data)
        path = Path(name)
        targets[f"{path.parent}/__pycache__/{path.stem}.{TAG}.pyc"] = folder / f"{number}.pyc"
        order.append([str(folder / f"{number}.py"), f"/{SITE}/{name}", str(folder / f"{number}.pyc")])
    program = Path(packages.__file__).with_name("compiling.py")
    command = [sys.executable, "-P", "-s", "-S", "-W", "ignore", str(program)]
    subprocess.run(command, input=json.dumps(order).encode(), check=True, env={"PYTHONHASHSEED": "123"})
    return {name: path.read_bytes() for name, path in targets.items()}


def test_other_version_of_python_gets_none_and_the_same_packages(tmp_path: Path, wheelhouse: Path) -> None:
    """An Image of another Python gets no bytecode of ours; layers of packages do not depend on whether there is any."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"x = 1\n"})
    own, bytecode, _ = layers(tmp_path / "sites", row("apple", "1.0"))
    other, none, words = layers(tmp_path / "sites", row("apple", "1.0"), python="3.9")
    assert (len(bytecode), none) == (2, [])
    assert [layer.digest for layer in other] == [layer.digest for layer in own]
    assert not [text for text in words if "compiling" in text]


def test_upgrade_of_one_package_compiles_and_sends_that_one(tmp_path: Path, wheelhouse: Path) -> None:
    """A Site of other packages takes over what did not change, bytes and all, and the first Site can go."""
    large = b"#" * 4_000_000
    for version in ("1.0", "2.0"):
        make_wheel(wheelhouse, "apple", version, {"apple.py": f"x = {version}\n".encode()})
    make_wheel(wheelhouse, "pear", "1.0", {"pear.py": large + b"\nx = 1\n", "pears.py": b""})
    _, first, words = layers(tmp_path / "sites", row("apple", "1.0"), row("pear", "1.0"))
    assert [layer.title for layer in first] == ["bytecode of pear", "bytecode of apple", "bytecode of the server"]
    assert words[-1] == f"compiling {3 + len(packages.server_files())} modules"
    _, second, words = layers(tmp_path / "sites", row("apple", "2.0"), row("pear", "1.0"))
    assert words[-1] == "compiling 1 modules"
    assert [layer == other for layer, other in zip(first, second, strict=True)] == [True, False, True]
    assert [read(layer) for layer in second[::2]] == [read(layer) for layer in first[::2]]


def test_damaged_archives_are_made_again(tmp_path: Path, wheelhouse: Path) -> None:
    """Whatever happened to the kept archives and their note, the next layers are right."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"x = 1\n"})
    _, first, _ = layers(tmp_path / "sites", row("apple", "1.0"))
    content = [read(layer) for layer in first]
    folder = next((tmp_path / "sites").glob("*/.bytecode"))
    archives, (note,) = sorted(folder.glob("*.tar")), folder.glob("*.json")
    kept = note.read_bytes()

    def again() -> None:
        _, made, words = layers(tmp_path / "sites", row("apple", "1.0"))
        assert made == first
        assert [read(layer) for layer in made] == content
        assert not [text for text in words if "installing" in text]

    for text in (b"", b"[]", b'{"layers": [{}]}', b'{"layers": 5}'):
        note.write_bytes(text)
        again()
    for archive in archives:
        archive.unlink()
    again()
    for archive in archives:
        os.truncate(archive, 100)
    again()
    for archive in archives:
        archive.write_bytes(bytes(archive.stat().st_size))
    note.unlink()
    again()
    assert note.read_bytes() == kept
    assert sorted(folder.iterdir()) == sorted([*archives, note])
