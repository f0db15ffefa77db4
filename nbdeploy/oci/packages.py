"""Layers of the packages that a Bundle needs, installed from its lock for the cluster's machines.

A large distribution is a layer of its own, so that an upgrade of one package sends that package. Layers are tars of the
installed files, uncompressed: bytes of a compressor differ between builds of zlib, and with them digests between
machines; packing torch would also take minutes of processor time. Nothing is copied: uv links files from its own cache,
and the tar is made while it is sent.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
import secrets
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nbdeploy_server.bundle import canonical

from nbdeploy import environment
from nbdeploy.distributions import normalised
from nbdeploy.errors import StoreError
from nbdeploy.installation import BYTECODE, LAYERS, Progress, Rows, Site, server_files, silent, site
from nbdeploy.oci import bytecode
from nbdeploy.oci.layers import Archive, Entry, Layer, archived, packed

PLACE = "opt/nbdeploy/site"
SERVER = "opt/nbdeploy/server"
LONE = 20_000_000  # bytes from which a distribution is a layer of its own
MOST = 32  # layers of packages

_VARYING = {"INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "RECORD.jws", "RECORD.p7s"}


@dataclass(frozen=True)
class Environment:
    """Packages of an Image.

    Attributes:
        layers: of the packages, one or more, and then of their bytecode and the server's.
        note: what the user should know about them, "" for nothing.
    """

    layers: tuple[Layer, ...]
    note: str = ""


def layers(
    rows: Rows,
    wheels: Path | None,
    root: Path,
    *,
    python: str,
    platform: str,
    gpus: int = 0,
    torch_index: str | None = None,
    on_progress: Progress = silent,
) -> Environment:
    """Return the layers of these rows; nothing is installed, hashed or compiled where this was done before.

    Args:
        rows: the manifest's distributions. Those that travel as wheels are left out: the Bundle brings them.
        wheels: folder with the wheels that the rows name; None where none travels.
        root: folder for installed packages, in the Store.
        python: minor version there, "3.11".
        platform: of the cluster's machines, as uv calls it.
        gpus: of a Replica; with 0, CUDA is not needed.
        torch_index: package index asked first, for CPU or CUDA builds of torch.
        on_progress: hears in words what is done, and what a CUDA build costs, before anything is installed.

    Raises DeployError naming the packages that have no wheel for that platform.
    """
    rows = environment.targeted(rows, gpus=gpus, torch_index=torch_index)

    def on_lock(text: str) -> None:
        if not gpus and (words := cuda_words(cuda_bytes(_wheel_sizes(text)), "of wheels")):
            on_progress(words)

    made = site(
        rows,
        wheels,
        root,
        python=python,
        platform=platform,
        index=torch_index,
        on_lock=on_lock,
        on_progress=on_progress,
    )
    owned = functools.cache(lambda: _owned(made))
    groups = functools.cache(lambda: _groups(owned()))
    known = _noted(made) or _note(made, owned(), groups(), on_progress)
    found = tuple(
        Layer(row.media_type, row.digest, row.diff_id, row.size, row.title, functools.partial(_chunks, groups, number))
        for number, row in enumerate(known.layers)
    )
    compiled = bytecode.layers(owned, _server(), made.folder.parent / BYTECODE, python, on_progress)
    return Environment((*found, *compiled), "" if gpus else known.note)


def cuda_bytes(sizes: Mapping[str, int]) -> int:
    """Return how many bytes of these distributions (name → bytes) are CUDA's; torch counts where it comes with CUDA."""
    parts = sum(size for name, size in sizes.items() if environment.is_cuda(name))
    return parts + sizes.get("torch", 0) if parts else 0


def cuda_words(size: int, what: str = "of the image") -> str:
    """Say how many bytes of what a CUDA build of torch costs machines without a GPU; "" for nothing."""
    if not size:
        return ""
    return (
        f"torch is a build for CUDA: {size / 1e9:.1f} GB {what} serve no purpose without a GPU. Set "
        'torch_index = "https://download.pytorch.org/whl/cpu" in the engine\'s settings to take the CPU wheels.'
    )


def _wheel_sizes(lock: str) -> dict[str, int]:
    """Return the size of each package's wheel, as far as the lock tells it."""
    packages = tomllib.loads(lock).get("packages", ())
    return {
        each["name"]: max((wheel.get("size", 0) for wheel in each.get("wheels", ())), default=0) for each in packages
    }


def _chunks(groups: Callable[[], list[list[Entry]]], number: int) -> Iterator[bytes]:
    return Archive(groups()[number]).chunks()


def _noted(made: Site) -> Environment | None:
    """Return the layers as they were noted when they were hashed; None where there is no whole note."""
    try:
        note = json.loads((made.folder.parent / LAYERS).read_bytes())
        rows = tuple(archived((), row["title"], row["digest"], row["size"]) for row in note["layers"])
        return Environment(rows, note["note"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _note(
    made: Site, owned: Mapping[str, list[Entry]], groups: list[list[Entry]], on_progress: Progress
) -> Environment:
    """Hash the layers, two at a time, and note them beside the packages."""
    on_progress(f"packing {sum(size for _, size in made.files) / 1e6:.0f} MB of packages")
    with ThreadPoolExecutor(2) as pool:
        archives = [Archive(group) for group in groups]
        digests = list(pool.map(Archive.digest, archives))
    rows = tuple(
        archived((), _title(group), digest, archive.size)
        for group, digest, archive in zip(groups, digests, archives, strict=True)
    )
    words = cuda_words(cuda_bytes({name: sum(entry.size for entry in own) for name, own in owned.items()}))
    shown = [{"title": row.title, "digest": row.digest, "size": row.size} for row in rows]
    target = made.folder.parent / LAYERS
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        temporary.write_bytes(canonical({"layers": shown, "note": words}))
        temporary.replace(target)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror}") from error
    return Environment(rows, words)


def _title(group: list[Entry]) -> str:
    """Name the distributions of a layer by their metadata folders."""
    names = sorted({part for entry in group for part in entry.name.split("/") if part.endswith(".dist-info")})
    return names[0].removesuffix(".dist-info").replace("-", " ") if len(names) == 1 else f"{len(names)} packages"


def _groups(owned: Mapping[str, list[Entry]]) -> list[list[Entry]]:
    """Return the entries of each layer; equal packages give equal entries on every machine."""
    sizes = {name: sum(entry.size for entry in entries) for name, entries in owned.items()}
    groups = packed(sizes, lone=LONE, most=MOST)
    return [list(itertools.chain.from_iterable(owned[name] for name in group)) for group in groups]


def _server() -> list[Entry]:
    return [
        Entry(f"{SERVER}/nbdeploy_server/{name}", path, path.stat().st_size) for name, path in server_files().items()
    ]


def _owned(made: Site) -> dict[str, list[Entry]]:
    """Return the entries of each distribution, by its normalised name; "" has the files that no RECORD lists."""
    left = {path: size for path, size in made.files if not _is_made_here(made.folder, path)}
    owned: dict[str, list[Entry]] = {}
    for record in sorted(path for path in left if path.endswith(".dist-info/RECORD") and path.count("/") == 1):
        rows = [row for row in csv.reader(io.StringIO((made.folder / record).read_text(encoding="utf-8"))) if row]
        names = sorted({os.path.normpath(row[0]) for row in rows} & set(left))
        kept = sorted(row for row in rows if row[0] in left)
        own = [_entry(made.folder, name, left.pop(name)) for name in names if name != record]
        left.pop(record)
        owned[normalised(record.partition("-")[0])] = [*own, Entry.of(f"{PLACE}/{record}", _csv(kept))]
    if left:
        owned[""] = [_entry(made.folder, name, size) for name, size in sorted(left.items())]
    return owned


def _is_made_here(folder: Path, path: str) -> bool:
    """Tell whether the installer made a file: notes about the install, and scripts that name this machine's Python."""
    above, _, name = path.rpartition("/")
    if above.endswith(".dist-info") and "/" not in above:
        return name in _VARYING
    if above != "bin":
        return False
    with (folder / path).open("rb") as file:
        return file.read(2) == b"#!"


def _entry(folder: Path, name: str, size: int) -> Entry:
    path = folder / name
    return Entry(f"{PLACE}/{name}", path, size, runnable=bool(path.stat().st_mode & 0o100))


def _csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
