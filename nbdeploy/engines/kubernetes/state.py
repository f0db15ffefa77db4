"""What this machine keeps of forwarders: HOME/clusters/ENGINE/ENDPOINT/forwarder.json, and one lock per engine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbdeploy.errors import EngineError
from nbdeploy.private import write_private
from nbdeploy.process import Identity

LOCK_TIMEOUT = 30.0  # seconds; what is done under the lock takes less than one


class State:
    """Files of the forwarders of one engine."""

    def __init__(self, home: Path, engine: str) -> None:
        self._engine = home / "clusters" / engine

    def folder(self, name: str) -> Path:
        """Folder of one Endpoint."""
        return self._engine / name

    def read(self, name: str) -> dict[str, Any]:
        """Return {"port", "identity", "target"}; {} where there never was a forwarder, or its file is damaged."""
        try:
            return dict(json.loads((self.folder(name) / "forwarder.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def port(self, name: str) -> int:
        """Return the port an Endpoint was last reached at, 0 where there was none."""
        port = self.read(name).get("port", 0)
        return port if isinstance(port, int) else 0

    def forwarder(self, name: str) -> Identity | None:
        """Return who forwards, alive or not."""
        try:
            return Identity.from_json(self.read(name)["identity"])
        except (KeyError, TypeError):
            return None

    def write(self, name: str, *, port: int, identity: Identity | None, target: Mapping[str, Any]) -> None:
        """Keep a port, and who listens there for which Service; readable by its owner alone, whole or not at all."""
        data: dict[str, Any] = {"port": port}
        if identity is not None:
            data |= {"identity": identity.to_json(), "target": dict(target)}
        write_private(self.folder(name) / "forwarder.json", json.dumps(data).encode())

    def create(self, name: str) -> Path:
        """Make the folder of an Endpoint, under the lock."""
        self.folder(name).mkdir(mode=0o700, exist_ok=True)
        return self.folder(name)

    def remove(self, name: str) -> None:
        """Remove the folder of an Endpoint."""
        shutil.rmtree(self.folder(name), ignore_errors=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the forwarders of the engine; raises EngineError where another process does not let go."""
        for folder in (self._engine.parent, self._engine):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        limit = time.monotonic() + LOCK_TIMEOUT
        with (self._engine / ".lock").open("w", encoding="ascii") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > limit:
                        held = f"{self._engine / '.lock'} for {LOCK_TIMEOUT:.0f} s"
                        raise EngineError(f"Another process has held {held}. Is it stopped?") from None
                time.sleep(0.01)
            yield
