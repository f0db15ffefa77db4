"""Makes an Image of a Bundle and brings it to the registry."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress
from nbdeploy.engines.kubernetes.settings import PLATFORMS, ClusterSettings
from nbdeploy.errors import ConfigError
from nbdeploy.oci import base as bases
from nbdeploy.oci import image, packages
from nbdeploy.oci.notes import LARGE, Notes
from nbdeploy.oci.push import Pushed, push
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.registry import OpenRegistry, Registry
from nbdeploy.spec import Revision

_FRESH = 600.0  # seconds for which the word of `preflight` on the base counts: it was asked for this very deploy


def repository(settings: ClusterSettings, name: str) -> Reference:
    """Return where the Images of an Endpoint go. Raises ConfigError where no registry is configured."""
    if not settings.registry:
        raise ConfigError(
            f"engines.{settings.name}.registry is missing: Images for the cluster need a registry that you may push to "
            f"and the cluster may pull from. In the settings: [engines.{settings.name}] registry = "
            '"registry.example.com/team"'
        )
    return Reference.parse(f"{settings.registry.rstrip('/')}/{name}")


def base_name(settings: ClusterSettings, wanted: str, python: str) -> str:
    """Return the name of the base image: what the deploy wants, else what is set, else the official one."""
    return wanted or settings.base_image or bases.default_base(python)


def notes_of(home: Path) -> Path:
    """Return the folder of the notes on registries."""
    return home / "registries"


class _Say(Protocol):
    def __call__(self, words: str, data: Mapping[str, Any] | None = None, /) -> None: ...


def publish(
    bundle: Bundle, revision: Revision, settings: ClusterSettings, previous: str, on_progress: OnProgress
) -> str:
    """Return the reference, by digest, of the Bundle's Image in the registry; what is there already is not sent.

    Args:
        bundle: what the Image holds.
        revision: for whom; GPUs decide which notes are told.
        settings: registry, base, platform.
        previous: reference of an Image of this Endpoint, or "".
        on_progress: told of the step "pushed".

    Raises:
        ConfigError: no registry.
        EngineError: a package has no wheel for the platform, or the registry refuses.
    """
    to = repository(settings, revision.name)

    def say(words: str, data: Mapping[str, Any] | None = None) -> None:
        on_progress(words, {"step": "pushed", **(data or {})})

    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_registry(host: str) -> Registry:
            return stack.enter_context(contextlib.closing(Registry(host)))

        wheels = stack.enter_context(bundle.wheels())  # layers may be read from them until they are sent
        made = _image(bundle, wheels, revision, settings, open_registry, say)
        notes = Notes(notes_of(bundle.store.root.parent), to.host)
        large = [layer.digest for layer in made.layers if layer.size >= LARGE]
        elsewhere = {digest: source for digest in large if (source := notes.source(digest)) not in {"", to.repository}}
        before = Reference.parse(previous) if previous else None
        same = before is not None and (before.host, before.repository) == (to.host, to.repository)
        last = before.digest if before and same else ""
        done = push(made, to, open_registry, previous=last, mounts=elsewhere, on_progress=say)
        notes.got(to.repository, large)
    say(told(done, made.size), {"state": "done"})
    return str(to.pinned(done.digest))


def _image(
    bundle: Bundle,
    wheels: Path | None,
    revision: Revision,
    settings: ClusterSettings,
    open_registry: OpenRegistry,
    say: _Say,
) -> image.Image:
    """Return the Image; its base is looked up, its packages are made."""
    manifest = bundle.manifest
    python = str(manifest.requires["python"])
    say("looking for the base image")
    base = bases.base_of(
        base_name(settings, revision.base_image, python),
        settings.platform,
        open_registry,
        python=python,
        notes=notes_of(bundle.store.root.parent),
        fresh=_FRESH,
    )
    environment = packages.layers(
        manifest.distributions,
        wheels,
        bundle.store.root / "environments",
        python=python,
        platform=PLATFORMS[settings.platform],
        gpus=revision.resources.gpus,
        torch_index=settings.torch_index,
        on_progress=say,
    )
    if environment.note:
        say(environment.note, {"state": "note"})
    return image.build(bundle, base, environment.layers)


def told(pushed: Pushed, size: int) -> str:
    """Say what a push took."""
    if not pushed.bytes_sent:
        return f"the registry has all {_amount(size)} of it"
    return f"{_amount(pushed.bytes_sent)} of {_amount(size)}, {pushed.requests} requests"


def _amount(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
