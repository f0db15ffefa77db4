"""Bytecode of what an Image runs, in layers of its own, so that a Replica imports without compiling.

A pod's root is read-only: what it compiled at one start would be gone at the next. Beside the packages' layers, not in
them: theirs are equal for all versions of Python, and stay so. A group of distributions is compiled once and its
archive kept with the Site; a Site of other packages takes over the archives of the groups that did not change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nbdeploy_server.bundle import canonical

from nbdeploy import environment
from nbdeploy.errors import StoreError
from nbdeploy.installation import IDLE, Progress
from nbdeploy.oci.layers import Archive, Entry, Layer, packed, stored
from nbdeploy.process import clean_environment

LONE = 4_000_000  # bytes of modules from which a distribution's bytecode is a layer of its own
BUNDLED = 16_000_000  # bytes of modules of other distributions in one layer, at most
MOST = 16  # layers of bytecode

_PROGRAM = Path(__file__).with_name("compiling.py")
_LEFT_OUT = {"bin", "test", "tests"}  # up to half of all bytecode; whatever imports those compiles them itself
_LAYOUT = 1  # of archives; another one makes them anew

Owned = Mapping[str, Sequence[Entry]]
"""Files of each distribution, by its name: their place in the Image, and where they lie here."""


@dataclass(frozen=True)
class Group:
    """Modules whose bytecode is one layer.

    Attributes:
        title: of the layer.
        modules: some.
    """

    title: str
    modules: tuple[Entry, ...]

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that the bytecode follows from."""
        return _key([(module.name, _digest(Path(str(module.source)))) for module in self.modules])


def layers(owned: Callable[[], Owned], server: Sequence[Entry], folder: Path, python: str, on: Progress) -> list[Layer]:
    """Return the layers of bytecode, none where this interpreter is of another version than the Image's.

    Args:
        owned: returns the packages' files; not called where their layers are noted.
        server: the server's own files.
        folder: where archives are kept; those beside it, of other Sites, are looked through.
        python: minor version there, "3.11".
        on: hears that modules are compiled.

    Raises StoreError where the archives cannot be read or written.
    """
    if sys.implementation.name != "cpython" or python != environment.minor():
        return []
    own = Group("bytecode of the server", _modules(server))
    note = folder / f"{_key([])}.json"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = _noted(note)
        groups = [] if known is not None else _groups(owned())
        *made, last = _made([*groups, own], folder, on)
        if known is None:
            known = [_layer(archive, group.title) for archive, group in zip(made, groups, strict=True) if archive]
            if len(known) == len(groups):
                _write(note, [archive for archive in made if archive], known)
        return [*known, *([_layer(last, own.title)] if last else [])]
    except OSError as error:
        raise StoreError(f"bytecode cannot be kept in {folder}: {error.strerror or error}; deploy again") from error


def _key(content: Sequence[tuple[str, str]]) -> str:
    named = {"layout": _LAYOUT, "python": sys.version, "content": content}
    return hashlib.sha256(canonical(named)).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _modules(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Choose what can be imported, by its name."""
    return tuple(sorted((entry for entry in entries if _importable(entry.name)), key=lambda entry: entry.name))


def _importable(name: str) -> bool:
    parts = name.removesuffix(".py").split("/")[3:]  # below opt/nbdeploy/site or opt/nbdeploy/server
    return name.endswith(".py") and all(part.isidentifier() for part in parts) and _LEFT_OUT.isdisjoint(parts[:-1])


def _groups(owned: Owned) -> list[Group]:
    """Group the packages' modules; equal packages give equal groups on every machine."""
    modules = {name: found for name, entries in owned.items() if (found := _modules(entries))}
    sizes = {name: sum(entry.size for entry in entries) for name, entries in modules.items()}
    groups = []
    for names in packed(sizes, lone=LONE, bundled=BUNDLED, most=MOST - 1):
        what = names[0] if len(names) == 1 else f"{len(names)} packages"
        groups.append(Group(f"bytecode of {what}", tuple(entry for name in names for entry in modules[name])))
    return groups


def _made(groups: Sequence[Group], folder: Path, on: Progress) -> list[Path | None]:
    """Return each group's archive, compiled where there is none; None where the compiler came to no good end."""
    found = {group: _kept(group, folder) for group in groups}
    missing = [group for group, archive in found.items() if archive is None]
    if missing:
        on(f"compiling {sum(len(group.modules) for group in missing)} modules")
        _sweep(folder)
        missing.sort(key=lambda group: -sum(module.size for module in group.modules))  # the longest first
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(lambda group: _compiled(group, folder), missing)
            found.update(zip(missing, made, strict=True))
    return [found[group] for group in groups]


def _compiled(group: Group, folder: Path) -> Path | None:
    """Compile a group in a process of its own and keep the archive: what this process has run would show in it."""
    tag = sys.implementation.cache_tag
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as name:
        below = Path(name)
        targets = [
            str(path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc")
            for path in (PurePosixPath(module.name) for module in group.modules)
        ]
        order = [
            (str(module.source), f"/{module.name}", str(below / target))
            for module, target in zip(group.modules, targets, strict=True)
        ]
        done = subprocess.run(
            [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-W", "ignore", str(_PROGRAM)],
            input=json.dumps(order).encode(),
            capture_output=True,
            check=False,
            env={**clean_environment(os.environ), "PYTHONHASHSEED": "0"},
        )
        if done.returncode:  # a Replica will compile these itself: slower, and no reason to deploy nothing
            return None
        entries = [Entry(each, below / each, size) for each in targets if (size := _size(below / each)) is not None]
        hasher = hashlib.sha256()
        with (below / "archive").open("wb") as file:
            for chunk in Archive(entries).chunks():
                hasher.update(chunk)
                file.write(chunk)
        archive = folder / f"{group.key}-{hasher.hexdigest()}.tar"
        (below / "archive").replace(archive)
    return archive


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it did not compile
        return None


def _kept(group: Group, folder: Path) -> Path | None:
    """Return a whole archive that is here or beside another Site."""
    for archive in sorted(folder.parent.parent.glob(f"*/{folder.name}/{group.key}-*.tar")):
        with contextlib.suppress(FileNotFoundError):  # another deploy cleans up
            if archive.stem == f"{group.key}-{_digest(archive)}":
                here = folder / archive.name
                if archive != here:
                    _link(archive, here)
                return here
    return None


def _link(source: Path, target: Path) -> None:
    part = target.with_name(f"making-{secrets.token_hex(8)}.tar")
    try:
        os.link(source, part)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, part)
    part.replace(target)
    part.unlink(missing_ok=True)  # two links of one file are left as they are by rename(2)


def _layer(archive: Path, title: str) -> Layer:
    return stored(archive, title, f"sha256:{archive.stem.partition('-')[2]}", archive.stat().st_size)


def _noted(note: Path) -> list[Layer] | None:
    """Return the layers as noted; None where there is no note, or an archive is gone or of another size."""
    try:
        rows = json.loads(note.read_bytes())
        found = [_layer(note.parent / row["archive"], row["title"]) for row in rows["layers"]]
        return found if [layer.size for layer in found] == [row["size"] for row in rows["layers"]] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(note: Path, archives: Sequence[Path], known: Sequence[Layer]) -> None:
    rows = zip(archives, known, strict=True)
    sized = [{"archive": archive.name, "title": layer.title, "size": layer.size} for archive, layer in rows]
    part = note.with_name(f"making-{secrets.token_hex(8)}.json")
    part.write_bytes(canonical({"layers": sized}))
    part.replace(note)


def _sweep(folder: Path) -> None:
    """Remove what deploys that were ended have left."""
    for path in folder.glob("making-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - IDLE:
                (shutil.rmtree if path.is_dir() else os.unlink)(path)
