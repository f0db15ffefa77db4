"""The key of an Endpoint on this machine: HOME/clusters/ENGINE/ENDPOINT/key, readable by its owner alone."""

from __future__ import annotations

import contextlib
from pathlib import Path

from nbdeploy.engines.kubernetes.client import Client
from nbdeploy.engines.kubernetes.record import Summary
from nbdeploy.engines.kubernetes.roots import read_key
from nbdeploy.errors import EngineError
from nbdeploy.private import write_private


class KeyFiles:
    """The key files of one engine.

    Args:
        folder: HOME/clusters/ENGINE.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def path(self, summary: Summary) -> str:
        """Return where the key of an Endpoint is, or would be; "" for a public one."""
        return "" if summary.public else str(self._folder / summary.name / "key")

    def made(self, client: Client, summary: Summary) -> str:
        """Return the path, and write the file if it is missing and we may read the key."""
        path = self.path(summary)
        if path and not Path(path).exists():
            with contextlib.suppress(EngineError):  # without the right to read the Secret
                self.keep(summary.name, read_key(client, summary.name))
        return path

    def keep(self, name: str, key: str) -> None:
        """Write the key, whole or not at all."""
        folder = self._folder / name
        for one in (folder.parent.parent, folder.parent, folder):
            one.mkdir(mode=0o700, exist_ok=True)
        write_private(folder / "key", key.encode("ascii"))
