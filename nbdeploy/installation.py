"""Environments made from a lock, each made once and kept: rooms for verification, and what goes into an Image.

The kernel's own environment holds more than the lock says, so what works in it proves little. A room holds exactly the
lock: a Bundle that answers there will find all its packages in a pod. Folders are complete or absent, whoever dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbdeploy_server
from nbdeploy_server.bundle import canonical

from nbdeploy import environment
from nbdeploy.errors import DeployError, StoreError

KEPT = 3  # folders of each kind that stay for the next deploy
IDLE = 3600.0  # seconds after which one that nobody used may go
_CONTENTS = "contents.json"
LAYERS = "layers.json"  # what `oci.packages` notes about a Site, beside its folder
BYTECODE = ".bytecode"  # what `oci.bytecode` keeps about a Site, beside its folder
_JUNK = {"__pycache__", ".lock", _CONTENTS, LAYERS, BYTECODE}

Rows = Sequence[Mapping[str, Any]]
"""The manifest's distributions, as `environment.lock` makes them."""

Progress = Callable[[str], None]
"""Hears in words what is going on."""


def silent(_words: str) -> None:
    """Take progress that nobody watches."""


@dataclass(frozen=True)
class Room:
    """A virtual environment of exactly a lock and the server.

    Attributes:
        folder: of the environment.
        python: its interpreter, for `process.launch(python=...)`.
        path: what to put on `sys.path` there (`process.launch(path=...)`); the interpreter adds its standard library.
    """

    folder: Path
    python: Path
    path: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Packages installed for another machine: their folder, and its files as (path in it, size in bytes)."""

    folder: Path
    files: tuple[tuple[str, int], ...]


def installed(
    rows: Rows, wheels: Path | None, home: Path, *, index: str | None = None, on_progress: Progress = silent
) -> Room:
    """Return the room of these rows, made with uv where it is not there yet or was damaged.

    Args:
        rows: the manifest's rows. Those that travel as a wheel are not installed: the Bundle brings them.
        wheels: the folder with the wheels that the rows name; None where none travels.
        home: the folder of nbdeploy on this machine.
        index: address of a package index that is asked first.
        on_progress: hears in words that packages are being installed.

    Raises DeployError with uv's reason where a package cannot be had or installed.
    """
    python = environment.minor()
    server = server_source()
    here = [sys.platform, platform.machine(), sys.base_prefix, platform.python_version()]
    sources = {name: hashlib.sha256(data).hexdigest() for name, data in server.items()}
    key = _key({"rows": rows, "python": python, "index": index, "here": here, "server": sources})

    def make(folder: Path) -> None:
        on_progress(f"installing {len(rows)} packages as locked")
        with _locked(rows, wheels, python, None, index) as lock:
            _uv("venv", "--quiet", "--relocatable", "--no-project", "--python", sys.executable, folder / "room")
            _uv("pip", "install", *_EXACT, "--python", folder / "room", "-r", lock)
        for name, data in server.items():
            target = folder / "server" / "nbdeploy_server" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    folder = _kept(home / "environments", key, make)
    site = folder / "room" / "lib" / f"python{python}" / "site-packages"
    return Room(folder, folder / "room" / "bin" / "python", (str(folder / "server"), str(site)))


def site(
    rows: Rows,
    wheels: Path | None,
    root: Path,
    *,
    python: str,
    platform: str,
    index: str | None = None,
    on_lock: Callable[[str], None] | None = None,
    on_progress: Progress = silent,
) -> Site:
    """Return the packages of these rows installed for a platform of uv's names, kept in a folder below `root`.

    Arguments and errors are those of `installed`; python is the version there, "3.11". `on_lock` hears the text of the
    pylock.toml before anything is installed; not where the folder is there already.
    """
    key = _key({"rows": rows, "python": python, "platform": platform, "index": index})

    def make(folder: Path) -> None:
        on_progress(f"installing {len(rows)} packages for {platform}")
        there = (
            "--python",
            sys.executable,
            "--python-version",
            environment.patched(python),
            "--python-platform",
            platform,
        )
        with _locked(rows, wheels, python, platform, index) as lock:
            if on_lock is not None:
                on_lock(lock.read_text(encoding="utf-8"))
            (folder / "site").mkdir()
            _uv("pip", "install", *_EXACT, *there, "--target", folder / "site", "-r", lock)

    folder = _kept(root, key, make)
    listed = json.loads((folder / _CONTENTS).read_bytes())
    return Site(folder / "site", tuple((path.removeprefix("site/"), size) for path, size, _ in listed))


def server_files() -> dict[str, Path]:
    """Return the modules of the server package: path below its folder → file."""
    folder = Path(nbdeploy_server.__file__).parent
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}


def server_source() -> dict[str, bytes]:
    """Return the server package's own source: path below its folder → content."""
    return {name: path.read_bytes() for name, path in server_files().items()}


# Links of uv's own settings would be taken for changed files: a symlink has another size than what it points to.
_EXACT = ("--quiet", "--no-deps", "--only-binary", ":all:", "--link-mode", "hardlink")


@contextlib.contextmanager
def _locked(rows: Rows, wheels: Path | None, python: str, platform: str | None, index: str | None) -> Iterator[Path]:
    """Lend a file with the lock of these rows, without the packages that travel in the Bundle."""
    travelling = {str(row["name"]) for row in rows if row["wheel"]}
    with tempfile.TemporaryDirectory(prefix="nbdeploy-lock-") as empty:
        # paths in the lock are relative to the folder that it was made in, so it has to lie there too
        folder = wheels or Path(empty)
        text = environment.resolve(rows, python=python, platform=platform, wheels=folder, index=index)
        lock = folder / f"pylock.{secrets.token_hex(8)}.toml"
        try:
            lock.write_text(_without(text, travelling), encoding="utf-8")
            yield lock
        finally:
            lock.unlink(missing_ok=True)


def _without(lock: str, names: set[str]) -> str:
    """Return a pylock.toml without the packages of these names."""
    mark = "[[packages]]\n"
    head, *parts = lock.split(mark)
    kept = [part for part in parts if tomllib.loads(mark + part)["packages"][0]["name"] not in names]
    return mark.join([head, *kept])


def _uv(*arguments: str | Path) -> None:
    import uv

    command = [uv.find_uv_bin(), *map(str, arguments), "--no-progress", "--color", "never", "--no-python-downloads"]
    with tempfile.TemporaryDirectory(prefix="nbdeploy-uv-") as empty:  # no project's settings shall change the answer
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=empty)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"uv ended with status {done.returncode}"
        raise DeployError(f"The locked packages cannot be installed: {reason}")


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({"layout": 1, **content})).hexdigest()


def _kept(root: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of this key, complete: found as it was made, or made now. Others wait while it is made."""
    final = root / key
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(root / f".{key}.lock"):
            if not _whole(final):
                part = root / f".{key}.{secrets.token_hex(4)}.part"
                try:
                    part.mkdir(mode=0o700)
                    make(part)
                    (part / _CONTENTS).write_text(json.dumps(_contents(part)), encoding="utf-8")
                    if final.exists():
                        shutil.rmtree(final)
                    part.rename(final)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
            os.utime(final)  # so that the oldest unused can be told
        _forget(root, final)
    except OSError as error:
        raise StoreError(
            f"the packages cannot be kept in {root}: {error.strerror or error}; make room there, or set NBDEPLOY_HOME"
        ) from error
    return final


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, so that two deploys at once install only once."""
    with path.open("w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks: both install, and the last one stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _contents(folder: Path) -> list[tuple[str, int, int]]:
    """List the files of a folder: path, size in bytes, modification time in ns; without what running Python adds."""
    found = []
    for below, inner, names in os.walk(folder):
        inner[:] = sorted(each for each in inner if each not in _JUNK)
        for name in names:
            if name not in _JUNK and not name.endswith(".pyc"):
                path = os.path.join(below, name)  # noqa: PTH118 - tens of thousands of files
                state = os.lstat(path)
                found.append((os.path.relpath(path, folder).replace(os.sep, "/"), state.st_size, state.st_mtime_ns))
    return sorted(found)


def _whole(folder: Path) -> bool:
    """Tell whether a folder holds what it held when it was made."""
    try:
        known = json.loads((folder / _CONTENTS).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(known, list) and [tuple(row) for row in known] == _contents(folder)


def _forget(root: Path, used: Path) -> None:
    """Remove folders beyond the kept ones that nobody has used for long, and what broken installs left."""
    found = []
    for path in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another deploy has given it its final name
            if path.is_dir() and path != used:
                found.append((path.stat().st_mtime, path))
    kept = sorted((pair for pair in found if not pair[1].name.startswith(".")), reverse=True)
    stale = [pair for pair in found if pair[1].name.startswith(".")]
    for changed, path in [*kept[KEPT - 1 :], *stale]:
        if changed < time.time() - IDLE:
            shutil.rmtree(path, ignore_errors=True)
            (root / f".{path.name}.lock").unlink(missing_ok=True)
