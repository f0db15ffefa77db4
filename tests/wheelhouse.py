"""Wheels made for a test, and an index of them: nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, bytes],
    *,
    tag: str = "py3-none-any",
    requires: tuple[str, ...] = (),
    entry_points: str = "",
) -> Path:
    """Write a wheel into the folder and return its path."""
    stem = f"{name.replace('-', '_')}-{version}"
    about = "".join(["Metadata-Version: 2.1\n", f"Name: {name}\nVersion: {version}\n"])
    content = {
        **files,
        f"{stem}.dist-info/METADATA": (about + "".join(f"Requires-Dist: {each}\n" for each in requires)).encode(),
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    if entry_points:
        content[f"{stem}.dist-info/entry_points.txt"] = entry_points.encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{tag}.whl"
    rows = io.StringIO()
    record = csv.writer(rows, lineterminator="\n")
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in content.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            record.writerow([inner, f"sha256={digest}", len(data)])
            archive.writestr(inner, data)
        record.writerow([f"{stem}.dist-info/RECORD", "", ""])
        archive.writestr(f"{stem}.dist-info/RECORD", rows.getvalue())
    return path


def row(name: str, version: str, wheel: str | None = None) -> dict[str, Any]:
    """Return a row of a manifest's distributions."""
    return {"name": name, "version": version, "origin": None, "wheel": wheel}


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where uv finds packages, as a folder that wheels are put into; with a cache of its own."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return folder
