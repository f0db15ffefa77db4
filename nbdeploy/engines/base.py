"""The Engine protocol: six methods, synchronous, plain data in and out. A new Engine is one module, one entry point in
the group "nbdeploy.engines", and passing tests/engines.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nbdeploy.bundle import Bundle
from nbdeploy.errors import EndpointNotFoundError, OwnershipError, UsageError
from nbdeploy.spec import Revision, Status, Target

OnProgress = Callable[[str, Mapping[str, Any]], None]
"""Called with words for the user and data: {"bytes", "total", "rate"} for long transfers; {"step", "state"} where the
words belong to a step of its own, such as "pushed", or are a note for the card (state "note")."""


class Engine(Protocol):
    """Where Replicas run. The Engine is the truth on its Endpoints."""

    name: str

    def apply(self, revision: Revision, bundle: Bundle | None, on_progress: OnProgress) -> Status:
        """Make the Endpoint `revision.name` serve this Revision; returns once it does.

        Idempotent. Scale, rollback, stop and start are an apply of a new Revision; one that changes only the number
        of Replicas restarts none. What served before goes on serving until the new Replicas are ready, and for good
        if they never are.

        Args:
            revision: what is to be; its number is above every earlier one.
            bundle: needed unless Replicas of the same Bundle run.
            on_progress: told what happens meanwhile.

        Raises:
            EngineError: with the reason and the Replica's last log lines; UsageError for what this Engine cannot do.
        """

    def status(self, name: str) -> Status:
        """Return what is known of an Endpoint. Raises EndpointNotFoundError."""

    def scrape(self, name: str) -> dict[str, str]:
        """Return the Prometheus text of each Replica by its name; one that does not answer in time is left out.

        Raises EndpointNotFoundError.
        """

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """Yield the lines of all Replicas, oldest first, without their newline; with `follow`, until interrupted."""

    def list(self) -> list[Status]:
        """Return every Endpoint of this Engine."""

    def delete(self, name: str) -> None:
        """Remove an Endpoint: no process and no object of it is left. Raises EndpointNotFoundError."""


@runtime_checkable
class HasCheck(Protocol):
    """An Engine that can tell early what it cannot do."""

    def check(self, revision: Revision) -> None:
        """Raise UsageError or EngineError where this Engine cannot run such a Revision; asked before the capture."""


@runtime_checkable
class HasTarget(Protocol):
    """An Engine whose Replicas run in an environment that is installed from the lock, not in the kernel's."""

    @property
    def target(self) -> Target:
        """For what the lock is installed."""


@runtime_checkable
class HasReach(Protocol):
    """An Engine whose URLs need something to stand on this machine."""

    def reach(self, name: str) -> str:
        """Make the Endpoint reachable from here and return its URL. Raises EndpointNotFoundError, EngineError."""


@runtime_checkable
class HasRemains(Protocol):
    """An Engine whose Endpoints leave something elsewhere when they are deleted."""

    def remains(self, name: str) -> builtins.list[str]:
        """Name what a delete leaves, such as Images in a registry. Raises EndpointNotFoundError."""


@runtime_checkable
class HasKey(Protocol):
    """An Engine that keeps keys."""

    def key(self, name: str) -> str:
        """Return the Endpoint's key, "" where it is public."""


@runtime_checkable
class HasHistory(Protocol):
    """An Engine that keeps Revisions."""

    def revisions(self, name: str) -> list[Revision]:
        """Return the Revisions of an Endpoint, oldest first; the last one is what is to be."""


def check_fixed_number(engine: str, revision: Revision) -> None:
    """Refuse a range of Replicas, and none; raises UsageError. `engine` is its name in words."""
    scaling = revision.autoscaling
    if scaling.min_replicas < 1 or scaling.max_replicas > max(1, scaling.min_replicas):
        raise UsageError(
            f"The {engine} engine runs a fixed number of Replicas in this version: give --min and --max the same "
            f"number, 1 or more (asked for: {scaling.min_replicas} to {scaling.max_replicas})."
        )


def check_owner(engine: Engine, name: str, owner: str, notebook: str) -> None:
    """Refuse to deploy over what another notebook or owner has under this name; raises OwnershipError."""
    try:
        status = engine.status(name)
    except EndpointNotFoundError:
        return
    if (status.owner, status.notebook) != (owner, notebook):
        whose = f"{status.notebook or 'a script'} of {status.owner or 'somebody'}"
        raise OwnershipError(
            f"The name {name!r} belongs to {whose}. Choose another with --name, or take it over with --replace."
        )


def get_engine(kind: str, home: Path, settings: Mapping[str, Any] | None = None) -> Engine:
    """Return the Engine of a kind ("local", "kubernetes", or one that an installed package brings).

    Args:
        kind: as the settings name it.
        home: folder of nbdeploy.
        settings: keyword arguments of the Engine, as `EngineSettings.arguments` gives them.
    """
    if kind == "local" and sys.platform == "win32":
        raise UsageError("The local engine needs Linux or macOS. On Windows use WSL, or another engine.")
    found = {point.name: point for point in entry_points(group="nbdeploy.engines")}
    if kind not in found:
        names = ", ".join(sorted(found))
        raise UsageError(f"There is no engine {kind!r}; there is {names}.")
    engine: Engine = found[kind].load()(home, **(settings or {}))
    return engine
