"""Settings of one Replica: plain data. It comes on standard input, in a container by an environment variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_BODY = 64 * 1024 * 1024  # bytes: a larger body is refused by its Content-Length, before it is read


@dataclass(frozen=True)
class ReplicaSettings:
    """What a Replica must know besides its Bundle.

    Attributes:
        store: folder of the Store.
        bundle: digest of the Bundle.
        unpacked: folder for the Bundle's code and files.
        name: of the Endpoint.
        revision: number of the Revision.
        key_sha256: hex digest of the key; "" means public.
        concurrency: calls at once; 0 means the lane's default.
        target_in_flight: above this, answers ask to reconnect, so that load spreads.
        queue: requests that may wait.
        timeout: seconds per request.
        cors: allowed origins.
        control: descriptor of the socket to the supervisor.
        shared: descriptor of the page of counters shared with the supervisor.
        max_body: bytes.
        gpus: GPUs that this Replica was given (--gpu).
        any_host: answer to any Host name also where there is no key: behind a Service, names are not this machine's.
    """

    store: str
    bundle: str
    unpacked: str
    name: str
    revision: int
    key_sha256: str = ""
    concurrency: int = 0
    target_in_flight: int = 0
    queue: int = 32
    timeout: float = 60.0
    cors: tuple[str, ...] = ()
    control: int = -1
    shared: int = -1
    max_body: int = MAX_BODY
    gpus: int = 0
    any_host: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReplicaSettings:
        """Read settings; an unknown name is an error, because it would be ignored silently."""
        return cls(**{**data, "cors": tuple(data.get("cors", ()))})
