"""The folder of a local Endpoint: which file is what, who may read it, and the lock on it.

endpoints/NAME/endpoint.json      port, and the number of the Revision that is to be; a higher one never came to serve
endpoints/NAME/key                0600; kept while public, so that a later Revision has the same one
endpoints/NAME/revisions/N.json   each Revision
endpoints/NAME/launch/N.json      0600: interpreter, sys.path, environment and secret values of its Replicas
endpoints/NAME/supervisor.json    Identity and control socket of the supervisor
endpoints/NAME/replicas.json      Identities of its Replicas
endpoints/NAME/logs/              what Replicas print, with rotation
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nbdeploy.errors import EngineError
from nbdeploy.private import write_private
from nbdeploy.process import Identity
from nbdeploy.spec import Revision


@dataclass(frozen=True)
class Launch:
    """How Replicas of a Revision are started: with the interpreter and path of the kernel that deployed it."""

    python: str
    path: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class SupervisorRecord:
    """Who supervises an Endpoint, and where it listens for orders."""

    identity: Identity
    control: str


class Layout:
    """Files of one Endpoint."""

    def __init__(self, home: Path, name: str) -> None:
        self.home = home
        self.name = name
        self.folder = home / "endpoints" / name

    @property
    def store(self) -> Path:
        """Folder of the Store."""
        return self.home / "store"

    @property
    def logs(self) -> Path:
        """Folder of the logs."""
        return self.folder / "logs"

    def exists(self) -> bool:
        """Whether there is such an Endpoint."""
        return (self.folder / "endpoint.json").is_file()

    def create(self) -> None:
        """Make the folder and a key."""
        for part in (self.folder, self.folder / "revisions", self.folder / "launch", self.logs):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.exists():
            self.write("endpoint.json", {"port": 0, "serving": 0})
        if not self.key():
            self._write_text("key", secrets.token_urlsafe(32))

    def serving(self) -> int:
        """Return the number of the Revision that is to be; 0 while the first one is being made."""
        return int(self.read("endpoint.json").get("serving", 0))

    def commit(self, number: int, port: int = 0) -> None:
        """Make a Revision the one that is to be."""
        data = self.read("endpoint.json")
        self.write("endpoint.json", {**data, "serving": number, "port": port or data.get("port", 0)})

    def key(self) -> str:
        """Return the key, or "" where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "key").read_text(encoding="ascii")
        return ""

    def read(self, file: str) -> dict[str, Any]:
        """Read a JSON file; {} if it is not there."""
        try:
            return dict(json.loads((self.folder / file).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def write(self, file: str, data: dict[str, Any]) -> None:
        """Write a JSON file, readable by its owner alone, whole or not at all."""
        self._write_text(file, json.dumps(data))

    def _write_text(self, file: str, text: str) -> None:
        write_private(self.folder / file, text.encode())

    def revisions(self) -> list[Revision]:
        """Return the Revisions that came to serve (or were a stop), oldest first."""
        serving = self.serving()
        return [revision for revision in self.all_revisions() if revision.number <= serving]

    def all_revisions(self) -> list[Revision]:
        """Return all Revisions, the one that is being made included, oldest first."""
        folder = self.folder / "revisions"
        if not folder.is_dir():
            return []
        files = sorted((path for path in folder.glob("*.json") if path.stem.isdigit()), key=lambda path: int(path.stem))
        return [Revision.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in files]

    def revision(self, number: int) -> Revision:
        """Return one Revision."""
        return Revision.from_json(self.read(f"revisions/{number}.json"))

    def add_revision(self, revision: Revision, launch: Launch) -> None:
        """Record a Revision and how its Replicas are started."""
        data = {"python": launch.python, "path": list(launch.path), "environment": launch.environment}
        self.write(f"launch/{revision.number}.json", data)
        self.write(f"revisions/{revision.number}.json", revision.to_json())

    def remove_revision(self, number: int) -> None:
        """Forget a Revision that never served."""
        for part in ("revisions", "launch"):
            (self.folder / part / f"{number}.json").unlink(missing_ok=True)

    def prune(self, kept: int) -> None:
        """Forget all but the newest Revisions."""
        for revision in self.revisions()[:-kept]:
            self.remove_revision(revision.number)

    def launch(self, number: int) -> Launch:
        """Return how Replicas of a Revision are started."""
        data = self.read(f"launch/{number}.json")
        return Launch(data["python"], tuple(data["path"]), dict(data["environment"]))

    def record_replicas(self, identities: list[Identity]) -> None:
        """Remember who the Replicas are: should the supervisor be killed, somebody else has to end them."""
        self.write("replicas.json", {"replicas": [identity.to_json() for identity in identities]})

    def replicas(self) -> list[Identity]:
        """Return who the Replicas are."""
        return [Identity.from_json(row) for row in self.read("replicas.json").get("replicas", ())]

    def supervisor(self) -> SupervisorRecord | None:
        """Return who supervises, or None if nobody was ever started."""
        data = self.read("supervisor.json")
        return SupervisorRecord(Identity.from_json(data["identity"]), data["control"]) if data else None

    def try_lock(self) -> TextIO | None:
        """Hold the Endpoint if nobody does, until the file is closed; None where somebody does or there is no lock."""
        try:
            file = (self.folder / "lock").open("r", encoding="ascii")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if self._take(file.fileno()) and self._same(self.folder / "lock", file.fileno()):
            return file
        file.close()
        return None

    @contextlib.contextmanager
    def locked(self, wait: float = 3600.0) -> Iterator[None]:
        """Hold the Endpoint for one change; a second change waits for the first."""
        path = self.folder / "lock"
        limit = time.monotonic() + wait
        while True:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("w", encoding="ascii") as file:
                if self._take(file.fileno()) and self._same(path, file.fileno()):
                    yield
                    return
            if time.monotonic() > limit:
                raise EngineError(
                    f"Another deploy of {self.name} has gone on for {wait:.0f} s: nbdeploy cancel {self.name}"
                )
            time.sleep(0.05)

    @staticmethod
    def _take(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def _same(path: Path, descriptor: int) -> bool:
        """Whether the locked file is still the one in the folder: a delete may have removed it meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_ino == os.fstat(descriptor).st_ino
        return False
