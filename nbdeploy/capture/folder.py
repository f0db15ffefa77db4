"""--model-from: a folder's files, or a hub's, as content-addressed blobs that never pass through kernel memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from nbdeploy.errors import CaptureError, UsageError
from nbdeploy.store import Store

_LEFT_OUT = {".git", ".cache", "__pycache__", ".ipynb_checkpoints"}


def resolve(source: str, base: Path) -> Path:
    """Return the local folder of a --model-from: `hf:ORG/NAME@REV`, or a path.

    Raises:
        UsageError: no such folder; CaptureError: the hub cannot be reached.
    """
    if source.startswith("hf:"):
        name, _, revision = source[3:].partition("@")
        return _download(name, revision or None)
    folder = (base / Path(source).expanduser()).resolve()
    if not folder.is_dir():
        raise UsageError(
            f"--model-from {source}: there is no folder {folder}. Give a folder, or hf:ORG/NAME@REVISION for a model "
            "of a hub."
        )
    return folder


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError("--model-from hf:… needs the package huggingface_hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:  # the hub's client raises errors of many packages; all mean the same here
        raise CaptureError(
            f"The model {name} could not be fetched from the hub: {type(error).__name__}: {error}. Check the name and "
            "the connection, or give a local folder to --model-from."
        ) from error


def walk(folder: Path, left_out: Collection[str]) -> Iterator[Path]:
    """Yield what is below a folder and no folder, links followed, nothing of these names; a folder is entered once."""
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link to a folder above it: a walk without end
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if name not in left_out)
        for name in sorted(names):
            if name not in left_out:
                yield Path(place, name)


def collect(folder: Path, store: Store) -> list[dict[str, Any]]:
    """Put a folder's files into the Store; returns the manifest's rows.

    Raises:
        CaptureError: the folder is empty, or holds something that is no file.
    """
    rows = []
    for path in walk(folder, _LEFT_OUT):
        if not path.is_file():
            raise CaptureError(
                f"{path.relative_to(folder)} in the model's folder is no plain file, or a link that leads nowhere. "
                "Remove it, or name another folder with --model-from."
            )
        ref = store.put_file(path)
        name = path.relative_to(folder).as_posix()
        rows.append({"path": name, "digest": ref.digest, "size": ref.size, "kind": "model"})
    if not rows:
        raise CaptureError(f"The folder {folder} holds no file. Give --model-from the folder with the model's files.")
    return rows
