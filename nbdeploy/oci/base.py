"""The base of an Image: resolved to one platform, pinned by digest, and read no further than its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nbdeploy.errors import RegistryError
from nbdeploy.oci.layers import TAR, Layer
from nbdeploy.oci.notes import Notes
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.registry import Manifest, OpenRegistry, Registry

_INDEXES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_LAYERS = {
    TAR: TAR,
    f"{TAR}+gzip": f"{TAR}+gzip",
    f"{TAR}+zstd": f"{TAR}+zstd",
    "application/vnd.docker.image.rootfs.diff.tar": TAR,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": f"{TAR}+gzip",
}
"""Kinds of layers that a base may have, and what an OCI image calls them."""

MOST = 60  # layers of a base: an image has room for 120 in all, and ours need theirs


@dataclass(frozen=True)
class Base:
    """An image to build on.

    Attributes:
        reference: pinned by its digest.
        config: its whole configuration.
        layers: its layers, which lie in its registry.
    """

    reference: Reference
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]


def default_base(python: str) -> str:
    """Return the official image of a minor version of Python, "3.11"."""
    return f"docker.io/library/python:{python}-slim"


def base_of(
    text: str,
    platform: str,
    open_registry: OpenRegistry,
    *,
    python: str = "",
    notes: Path | None = None,
    fresh: float = 0.0,
) -> Base:
    """Look up a base image.

    Args:
        text: its name, with a tag or digest.
        platform: "linux/amd64" or "linux/arm64".
        open_registry: gives the Registry of a host.
        python: minor version that it must have, as far as its configuration tells; "" is not looked at.
        notes: folder of the notes on registries; a base that was seen costs one small request, not three.
        fresh: seconds for which what its name stands for is believed without asking.

    Raises RegistryError where it is not there, lacks the platform, or has another Python; UsageError for a bad name.
    """
    reference = Reference.parse(text)
    registry = open_registry(reference.host)
    known = Notes(notes, reference.host) if notes is not None else None
    target = _digest(registry, reference, known, fresh) if known is not None else ""
    manifest = _manifest(registry, reference, target or reference.target, known)
    if _is_index(manifest):
        manifest = _manifest(registry, reference, _chosen(manifest.json, reference, platform), known)
    config = _config(registry, reference, manifest.json, known)
    _check(config, reference, platform, python)
    return Base(reference.pinned(manifest.digest), config, _layers(manifest.json, config, reference))


def _digest(registry: Registry, reference: Reference, notes: Notes, fresh: float) -> str:
    """Return what a name stands for, "" where the registry does not say without giving it whole."""
    found = notes.resolved(reference, fresh) if fresh else ""
    if not found:
        found = registry.digest_of(reference.repository, reference.target)
        if found:
            notes.resolve(reference, found)
    return found


def _manifest(registry: Registry, reference: Reference, target: str, notes: Notes | None) -> Manifest:
    data = notes.document(target) if notes is not None else None
    if data is not None:
        return Manifest(data, str(json.loads(data).get("mediaType", "")), target)
    found = registry.manifest(reference.repository, target)
    if found is not None and notes is not None:
        notes.keep(found.digest, found.data)
    if found is None:
        raise RegistryError(
            f"There is no base image {reference}. Set base_image in the engine's settings to an image with Python that "
            "this machine and the cluster can read."
        )
    return found


def _is_index(manifest: Manifest) -> bool:
    return manifest.media_type in _INDEXES or ("manifests" in manifest.json and "layers" not in manifest.json)


def _chosen(index: Mapping[str, Any], reference: Reference, platform: str) -> str:
    """Return the digest of the platform's image in an index."""
    names: dict[str, str] = {}
    for row in index.get("manifests", ()):
        known = row.get("platform", {})
        name = f"{known.get('os')}/{known.get('architecture')}"
        if name != "unknown/unknown":  # attestations
            names.setdefault(name, str(row["digest"]))
    if platform not in names:
        raise RegistryError(
            f"The base image {reference} is not made for {platform}, only for {', '.join(sorted(names)) or 'nothing'}. "
            "Set platform in the engine's settings to that of the cluster's machines, or base_image to another image."
        )
    return names[platform]


def _config(
    registry: Registry, reference: Reference, manifest: Mapping[str, Any], notes: Notes | None
) -> dict[str, Any]:
    try:
        digest = str(manifest["config"]["digest"])
        data = notes.document(digest) if notes is not None else None
        if data is None:
            data = registry.blob(reference.repository, digest)
            if notes is not None:
                notes.keep(digest, data)
        config = json.loads(data)
        config["rootfs"]["diff_ids"]  # an artifact that is no image has none
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(f"{reference} is no image that can be built on. Set base_image to another one.") from error
    return dict(config)


def _check(config: Mapping[str, Any], reference: Reference, platform: str, python: str) -> None:
    found = f"{config.get('os', 'linux')}/{config.get('architecture', '')}"
    if found != platform:
        raise RegistryError(
            f"The base image {reference} is made for {found}, the cluster's machines are {platform}. Set base_image in "
            "the engine's settings to another image, or platform to theirs."
        )
    version = environment_of(config).get("PYTHON_VERSION", "")
    if python and version and version.split(".")[:2] != python.split("."):
        raise RegistryError(
            f"The base image {reference} has Python {version}, this notebook runs {python}: functions travel as "
            f"bytecode of {python}. Set base_image in the engine's settings to an image with Python {python}, such as "
            f"{default_base(python)}."
        )


def environment_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables of an image's configuration."""
    pairs = (str(each).partition("=") for each in (config.get("config") or {}).get("Env") or ())
    return {name: value for name, _, value in pairs}


def _layers(manifest: Mapping[str, Any], config: Mapping[str, Any], reference: Reference) -> tuple[Layer, ...]:
    rows, ids = manifest.get("layers"), config["rootfs"]["diff_ids"]
    if not (_is_list(rows) and _is_list(ids)) or len(rows) != len(ids):
        raise RegistryError(f"{reference} does not describe its layers. Set base_image to another image.")
    unknown = sorted({str(row["mediaType"]) for row in rows} - set(_LAYERS))
    if unknown:
        raise RegistryError(f"{reference} has layers of a kind that cannot be built on ({', '.join(unknown)}).")
    if len(rows) > MOST:
        raise RegistryError(f"{reference} has {len(rows)} layers; nodes take no image made on more than {MOST}.")
    return tuple(
        Layer(_LAYERS[row["mediaType"]], row["digest"], diff, row["size"], f"base {number}", origin=reference)
        for number, (row, diff) in enumerate(zip(rows, ids, strict=True), 1)
    )


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
