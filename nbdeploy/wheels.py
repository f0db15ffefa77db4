"""Wheels of what no index has: editable installs and local folders, packed from their files as they are now."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from nbdeploy.distributions import Distribution, Installed, index_of, project_files
from nbdeploy.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_COMPILED = (".so", ".pyd", ".dylib")
_REWRITTEN = {"RECORD", "RECORD.jws", "RECORD.p7s", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL"}


def wheel(distribution: Distribution, target: Path) -> Path:
    """Make a wheel of an installed distribution in the folder `target`, from its files as they are now.

    Its build backend is not run and nothing is fetched: what travels is what the notebook imports. Equal files make
    equal bytes. Raises CaptureError where the files cannot be found or read.
    """
    index = index_of([str(distribution.location)])
    installed = index.named.get(distribution.name)
    if installed is None:
        raise CaptureError(f"{distribution.name} is no longer installed in {distribution.location}; install it again")
    stem = f"{distribution.name.replace('-', '_')}-{distribution.version.replace('-', '_')}"
    info = f"{stem}.dist-info"
    try:
        content = _editable_content(installed, info) if installed.editable else _recorded_content(installed, stem)
        tag = _tag(content)
        purelib = str(tag == "py3-none-any").lower()
        about = f"Wheel-Version: 1.0\nGenerator: nbdeploy\nRoot-Is-Purelib: {purelib}\nTag: {tag}\n"
        content[f"{info}/WHEEL"] = about.encode()
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"{stem}-{tag}.whl"
        _write_wheel(path, content, info)
    except OSError as error:
        raise CaptureError(
            f"{distribution.name} {distribution.version} cannot be packed, for {error.filename} cannot be used: "
            f"{error.strerror}; install {distribution.name} again"
        ) from error
    return path


def _editable_content(installed: Installed, info: str) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {**project_files(installed.roots)}
    if not files:
        raise CaptureError(
            f"{installed.name} is installed as editable in a way that nbdeploy cannot follow (no packages found from "
            f"{installed.base}); install it with `pip install .`, without -e, and deploy again"
        )
    for name in ("METADATA", "entry_points.txt", "top_level.txt"):
        text = installed.found.read_text(name)
        if text is None and name == "METADATA":
            text = installed.found.read_text("PKG-INFO")
        if text is not None:
            files[f"{info}/{name}"] = text.encode()
    return files


def _recorded_content(installed: Installed, stem: str) -> dict[str, Path | bytes]:
    """Return the files of RECORD: path in a wheel → file or content."""
    prefix = Path(os.path.abspath(installed.base / "../../.."))  # noqa: PTH100 - links in it are part of the prefix
    commands = {f"{point.name}{end}" for point in installed.found.entry_points for end in ("", ".exe", "-script.py")}
    files: dict[str, Path | bytes] = {}
    for path in installed.record:
        parts = PurePosixPath(path).parts
        if "__pycache__" in parts or path.endswith((".pyc", ".pyo")):
            continue
        file = Path(os.path.abspath(installed.base / path))  # noqa: PTH100 - as above
        if parts[0].endswith(".dist-info"):
            if len(parts) > 2 or not (parts[1] in _REWRITTEN or parts[1].startswith("uv_")):  # noqa: PLR2004 - a folder
                files[str(PurePosixPath(f"{stem}.dist-info", *parts[1:]))] = file
        elif parts[0] != ".." and not PurePosixPath(path).is_absolute():
            files[path] = file
        elif file.parent.name in {"bin", "Scripts"}:
            if file.name not in commands:  # commands of entry points are made again by the installer
                files[f"{stem}.data/scripts/{file.name}"] = _script(file)
        elif file.is_relative_to(prefix):
            files[f"{stem}.data/data/{file.relative_to(prefix).as_posix()}"] = file
    return files


def _script(file: Path) -> bytes:
    """Return a script with the first line that tells an installer to put its own Python there."""
    data = file.read_bytes()
    first, newline, rest = data.partition(b"\n")
    return b"#!python" + newline + rest if first.startswith(b"#!") and b"python" in first else data


def _tag(names: Iterable[str]) -> str:
    if not any(name.endswith(_COMPILED) or ".so." in PurePosixPath(name).name for name in names):
        return "py3-none-any"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{python}-{python}-{re.sub(r'[-.]', '_', sysconfig.get_platform())}"


def _write_wheel(path: Path, content: Mapping[str, Path | bytes], info: str) -> None:
    """Write the archive: sorted, uncompressed, without times, so that equal content has equal bytes everywhere."""
    rows = []
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".wheel-", delete=False) as out:
        try:
            with zipfile.ZipFile(out, "w") as archive:
                for name in sorted(content, key=lambda each: (each.startswith(f"{info}/"), each)):
                    item = content[name]
                    data = item if isinstance(item, bytes) else item.read_bytes()
                    runnable = isinstance(item, Path) and bool(item.stat().st_mode & 0o100)
                    _add(archive, name, data, 0o755 if runnable else 0o644)
                    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                    rows.append(f"{_quoted(name)},sha256={digest},{len(data)}\n")
                record = f"{info}/RECORD"
                _add(archive, record, "".join([*rows, f"{record},,\n"]).encode(), 0o644)
            Path(out.name).replace(path)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)  # half a wheel must not stay, whatever stopped it
            raise


def _add(archive: zipfile.ZipFile, name: str, data: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix on every system, so that the modes count and the bytes are equal
    entry.external_attr = (0o100000 | mode) << 16
    archive.writestr(entry, data)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if {",", '"'} & set(name) else name
