"""image.py NAME ARCHITECTURE OUT.tar FOLDER [ENTRYPOINT...]: write a folder as a docker-archive of one layer."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import IO


def write_image(name: str, architecture: str, out: Path, folder: Path, entrypoint: list[str]) -> None:
    """Write an image whose only layer is this folder; it appears under its name when it is complete."""
    layer, part = out.with_suffix(".layer"), out.with_suffix(".part")
    with tarfile.open(layer, "w") as tar:
        tar.add(folder, ".")
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": entrypoint},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(part, "w") as tar, layer.open("rb") as file:
        _add(tar, "config.json", io.BytesIO(json.dumps(config).encode()))
        _add(tar, f"{digest}/layer.tar", file)
        _add(tar, "manifest.json", io.BytesIO(json.dumps(manifest).encode()))
    layer.unlink()
    shutil.move(part, out)


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = file.seek(0, io.SEEK_END)
    file.seek(0)
    tar.addfile(entry, file)


if __name__ == "__main__":
    write_image(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
