"""The nouns that cross module borders, as frozen data without I/O: Resources, Autoscaling, Revision, Status, Phase."""

from __future__ import annotations

import dataclasses
import enum
import re
from dataclasses import dataclass, field
from typing import Any

from nbdeploy_server.signature import Signature

from nbdeploy.errors import UsageError

__all__ = [
    "Autoscaling",
    "Phase",
    "Resources",
    "Revision",
    "Serving",
    "Signature",
    "Status",
    "Target",
    "check_name",
    "label",
    "memory_bytes",
]

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Phase(enum.StrEnum):
    """Where an Endpoint stands; always with a reason beside it."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    IDLE = "idle"
    FAILED = "failed"
    DELETED = "deleted"


def check_name(name: str) -> str:
    """Return an Endpoint's name if it is a DNS label (RFC 1123: 63 of a-z, 0-9 and -, none at the ends)."""
    if not _NAME.fullmatch(name):
        proposal = label(name)
        hint = f" For example: --name {proposal}" if proposal else ""
        raise UsageError(
            f"{name!r} cannot be an Endpoint's name: it stands in URLs, so use up to 63 of a-z, 0-9 and '-', "
            f"with a letter or digit at both ends.{hint}"
        )
    return name


def label(text: str) -> str:
    """Make a DNS label of any text; "" if nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def memory_bytes(size: str) -> int:
    """Read a memory size in Kubernetes' notation ("512Mi", "8Gi", "2G") as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?[bB]?", size.strip())
    if not match:
        raise UsageError(f"{size!r} is no memory size. Write it like 512Mi, 8Gi or 2G.")
    unit = (match[2] or "").replace("K", "k") if match[2] != "Ki" else "Ki"
    return int(float(match[1]) * _UNITS[unit])


@dataclass(frozen=True)
class Resources:
    """What one Replica gets.

    Attributes:
        cpus: CPU cores.
        memory: in Kubernetes' notation, or None for "from the measured load".
        gpus: whole GPUs.
        gpu_type: as the cluster labels it, or None for any.
        spot: prefer spot nodes.
    """

    cpus: float = 1.0
    memory: str | None = None
    gpus: int = 0
    gpu_type: str | None = None
    spot: bool = False

    def __post_init__(self) -> None:
        if self.cpus <= 0:
            raise UsageError(f"--cpu must be above 0, not {self.cpus:g}.")
        if self.gpus < 0:
            raise UsageError(f"--gpu must be 0 or more, not {self.gpus}.")
        if self.memory is not None:
            memory_bytes(self.memory)


@dataclass(frozen=True)
class Autoscaling:
    """How many Replicas there may be, and when.

    Attributes:
        min_replicas: 0 lets the Endpoint scale to zero.
        max_replicas: at most this many.
        target_in_flight: requests in flight per Replica that scaling aims at; None means the concurrency.
        scaling: "fast" or "cortex".
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_in_flight: int | None = None
    scaling: str = "fast"

    def __post_init__(self) -> None:
        if self.min_replicas < 0:
            raise UsageError(f"--min must be 0 or more, not {self.min_replicas}.")
        if self.max_replicas < max(1, self.min_replicas):
            raise UsageError(
                f"--max must be at least 1 and at least --min ({self.min_replicas}), not {self.max_replicas}."
            )
        if self.target_in_flight is not None and self.target_in_flight < 1:
            raise UsageError(f"--target-in-flight must be 1 or more, not {self.target_in_flight}.")
        if self.scaling not in {"fast", "cortex"}:
            raise UsageError(f"--scaling is 'fast' or 'cortex', not {self.scaling!r}.")


@dataclass(frozen=True)
class Serving:
    """How a Replica serves.

    Attributes:
        concurrency: calls at once; 0 means the lane's default.
        queue: requests that may wait per Replica.
        timeout: seconds per request.
        port: fixed local port; 0 means any free one, then kept.
        cors: origins whose pages may call.
        public: no key is asked.
    """

    concurrency: int = 0
    queue: int = 32
    timeout: float = 60.0
    port: int = 0
    cors: tuple[str, ...] = ()
    public: bool = False

    def __post_init__(self) -> None:
        if self.concurrency < 0:
            raise UsageError(f"--concurrency must be 1 or more, not {self.concurrency}.")
        if self.queue < 0:
            raise UsageError(f"--queue must be 0 or more, not {self.queue}.")
        if not self.timeout > 0:
            raise UsageError(f"--timeout must be above 0 seconds, not {self.timeout:g}.")
        if not 0 <= self.port <= 65535:  # noqa: PLR2004 - the range of TCP ports
            raise UsageError(f"--port must be between 1 and 65535, not {self.port}.")


@dataclass(frozen=True)
class Target:
    """What Replicas run on, where that is not the kernel's own environment.

    Attributes:
        platform: as uv calls it, "x86_64-manylinux_2_28".
        index: package index asked first, or None.
    """

    platform: str
    index: str | None = None


@dataclass(frozen=True)
class Revision:
    """Immutable record of one deploy.

    Attributes:
        name: of the Endpoint.
        number: grows by one with each deploy of that name.
        bundle: digest.
        resources, autoscaling, serving: as asked for.
        owner: user who deployed.
        notebook: path of the notebook, or "".
        created: Unix seconds.
        secrets: each "NAME", a variable whose value the Replica gets, or "NAME=SECRET/KEY", where its value is in the
            cluster.
        variables: names of variables passed on (--env).
        stopped: the Endpoint is to have no Replica.
        base_image: of the Image, "" for what the engine's settings say.
    """

    name: str
    number: int
    bundle: str
    resources: Resources = field(default_factory=Resources)
    autoscaling: Autoscaling = field(default_factory=Autoscaling)
    serving: Serving = field(default_factory=Serving)
    owner: str = ""
    notebook: str = ""
    created: float = 0.0
    secrets: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    stopped: bool = False
    base_image: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the Revision as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Revision:
        """Read what `to_json` wrote."""
        serving = {**data["serving"], "cors": tuple(data["serving"]["cors"])}
        parts = {
            "resources": Resources(**data["resources"]),
            "autoscaling": Autoscaling(**data["autoscaling"]),
            "serving": Serving(**serving),
            "secrets": tuple(data["secrets"]),
            "variables": tuple(data["variables"]),
        }
        return cls(**{**data, **parts})

    @property
    def foreign_secrets(self) -> dict[str, tuple[str, str]]:
        """Variables whose values others keep in the cluster: NAME → (SECRET, KEY)."""
        rows = (row.partition("=") for row in self.secrets)
        return {name: (place.rpartition("/")[0], place.rpartition("/")[2]) for name, _, place in rows if place}

    def same_replicas(self, other: Revision) -> bool:
        """Whether going from one Revision to the other needs no new Replica (only numbers of Replicas changed)."""
        kept = dataclasses.replace(
            other, number=self.number, created=self.created, autoscaling=self.autoscaling, stopped=self.stopped
        )
        return kept == self


@dataclass(frozen=True)
class Status:
    """What an Engine knows of an Endpoint.

    Attributes:
        name, engine, url: url is the base, without /predict.
        revision: number of the Revision that serves, 0 if none does.
        phase, reason: the reason is "" only for a plain ready.
        owner, notebook: who deployed it, from where.
        ready, desired: Replicas.
        autoscaling: as asked for.
        in_flight: requests running or queued in all Replicas; None where they were not asked.
        public: no key is asked.
        memory_bytes: resident memory of all Replicas.
        key_file: where the key lies once it was asked for, "" where the Endpoint is public.
    """

    name: str
    engine: str
    url: str = ""
    revision: int = 0
    phase: Phase = Phase.PENDING
    reason: str = ""
    owner: str = ""
    notebook: str = ""
    ready: int = 0
    desired: int = 0
    autoscaling: Autoscaling = field(default_factory=Autoscaling)
    in_flight: int | None = 0
    public: bool = False
    memory_bytes: int = 0
    key_file: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the rows of `nbdeploy status --json` that an Engine knows (interface: Command line)."""
        return {
            "name": self.name,
            "engine": self.engine,
            "revision": self.revision,
            "phase": str(self.phase),
            "reason": self.reason,
            "url": self.url,
            "key_file": self.key_file,
            "owner": self.owner,
            "notebook": self.notebook,
            "replicas": {"ready": self.ready, "desired": self.desired},
            "autoscaling": {
                "min": self.autoscaling.min_replicas,
                "max": self.autoscaling.max_replicas,
                "target_in_flight": self.autoscaling.target_in_flight,
                "in_flight": self.in_flight,
                "decision": "",
                "conditions": [],
            },
            "memory_bytes": self.memory_bytes,
            "cost": {"now_per_hour": 0.0, "max_per_hour": 0.0},
        }
