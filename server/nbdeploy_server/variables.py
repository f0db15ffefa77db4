"""What a Replica in a container is told by environment variables, which images and pods can set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from nbdeploy_server.errors import SettingsInvalid
from nbdeploy_server.settings import ReplicaSettings

PREFIX = "NBDEPLOY_"
DRAIN_SECONDS = 10.0  # until every node has heard that a pod is leaving; measured below 2 s, proxies take longer
PORT, PROBES_PORT = 8080, 9090
_BY_IMAGE = {"store", "bundle", "unpacked", "control", "shared", "any_host"}  # not for NBDEPLOY_SETTINGS
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "tuple[str, ...]": (list,)}


@dataclass(frozen=True)
class Order:
    """What one container is to serve, and where.

    Attributes:
        settings: of the Replica.
        site: folder of the environment's packages, "" where they are the interpreter's own.
        host: address to listen on; "" means all.
        port: for users; 0 takes a free one.
        probes_port: for probes and metrics; 0 takes a free one.
        drain_seconds: for which a Replica that is told to end still takes new connections, and for longer where callers
            still come (see listening).
    """

    settings: ReplicaSettings
    site: str
    host: str
    port: int
    probes_port: int
    drain_seconds: float


def read(environ: Mapping[str, str]) -> Order:
    """Return the order that the variables give; raises SettingsInvalid in words."""
    missing = [name for name in ("NBDEPLOY_STORE", "NBDEPLOY_BUNDLE") if not environ.get(name)]
    if missing:
        raise SettingsInvalid(
            f"{' and '.join(missing)} must be set: NBDEPLOY_STORE is the folder of a Store, NBDEPLOY_BUNDLE the digest "
            "(sha256:…) of a Bundle in it; an image that nbdeploy built sets both"
        )
    settings = ReplicaSettings.from_json(
        {
            "name": "model",
            "revision": 1,
            **_settings(environ.get("NBDEPLOY_SETTINGS", "")),
            "store": environ["NBDEPLOY_STORE"],
            "bundle": environ["NBDEPLOY_BUNDLE"],
            "unpacked": environ.get("NBDEPLOY_UNPACKED") or "/tmp/nbdeploy",  # noqa: S108 - checked for its owner
            "any_host": True,
        }
    )
    return Order(
        settings,
        environ.get("NBDEPLOY_SITE", ""),
        environ.get("NBDEPLOY_HOST", ""),
        int(_number(environ, "NBDEPLOY_PORT", PORT, 65535)),
        int(_number(environ, "NBDEPLOY_PROBES_PORT", PROBES_PORT, 65535)),
        _number(environ, "NBDEPLOY_DRAIN_SECONDS", DRAIN_SECONDS, 3600),
    )


def clear(environ: MutableMapping[str, str]) -> None:
    """Take nbdeploy's own variables away, so that user code and its child processes see none of them."""
    for name in [name for name in environ if name.startswith(PREFIX)]:
        del environ[name]


def _number(environ: Mapping[str, str], name: str, default: float, most: float) -> float:
    text = environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise SettingsInvalid(f"{name} is {text!r}; it must be a number from 0 to {most:g}")
    return value


def _settings(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        data = json.loads(text)
    except ValueError as error:
        raise SettingsInvalid(f"NBDEPLOY_SETTINGS is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise SettingsInvalid("NBDEPLOY_SETTINGS must be a JSON object")
    known = {field.name: str(field.type) for field in dataclasses.fields(ReplicaSettings)}
    known = {name: kind for name, kind in known.items() if name not in _BY_IMAGE}
    for name, value in data.items():
        if name not in known:
            raise SettingsInvalid(
                f"NBDEPLOY_SETTINGS has {name!r}, which this server does not know; known: "
                f"{', '.join(known)}; the image may be of another version of nbdeploy"
            )
        if not isinstance(value, _TYPES[known[name]]) or isinstance(value, bool):
            raise SettingsInvalid(f"NBDEPLOY_SETTINGS has {value!r} for {name!r}, which must be a {known[name]}")
    digest = data.get("key_sha256", "")
    if digest and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):  # noqa: PLR2004 - hex digits of sha256
        raise SettingsInvalid("NBDEPLOY_SETTINGS: key_sha256 must be 64 hex digits, or empty for a public Endpoint")
    return data
