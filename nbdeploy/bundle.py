"""Bundles on this machine: the draft that a Capture writes, and what the worker makes of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdeploy_server.bundle import Bundle as Reader
from nbdeploy_server.bundle import Manifest

from nbdeploy.store import Store


@dataclass(frozen=True)
class Bundle:
    """A Bundle in the Store, with the values of secrets that go to its Replicas and nowhere else."""

    store: Store
    digest: str
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def reader(self) -> Reader:
        """Open it; raises BundleInvalid where the manifest does not fit its digest."""
        return Reader.open(self.store.root, self.digest)

    @property
    def manifest(self) -> Manifest:
        """What is in it."""
        return self.reader().manifest

    @contextlib.contextmanager
    def wheels(self) -> Iterator[Path | None]:
        """Give a folder with the wheels that travel, under their names; None where none does."""
        found = [file for file in self.manifest.files if file.kind == "wheel"]
        if not found:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="nbdeploy-wheels-") as folder:
            for file in found:
                Path(folder, file.path).symlink_to(self.store.path(file.ref.digest).resolve())
            yield Path(folder)

    @property
    def unpacked(self) -> Path:
        """Folder for its code and files on this machine."""
        return self.store.root / "unpacked" / self.digest.partition(":")[2]
