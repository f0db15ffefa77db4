"""Makes an Image of a Bundle and brings it to the registry."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress
from nbdeploy.engines.kubernetes.settings import PLATFORMS, ClusterSettings
from nbdeploy.errors import ConfigError
from nbdeploy.oci import base as bases
from nbdeploy.oci import image, packages
from nbdeploy.oci.push import Pushed, push
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.registry import Registry
from nbdeploy.spec import Revision


def repository(settings: ClusterSettings, name: str) -> Reference:
    """Return where the Images of an Endpoint go. Raises ConfigError where no registry is configured."""
    if not settings.registry:
        raise ConfigError(
            f"engines.{settings.name}.registry is missing: Images for the cluster need a registry that you may push to "
            f"and the cluster may pull from. In the settings: [engines.{settings.name}] registry = "
            '"registry.example.com/team"'
        )
    return Reference.parse(f"{settings.registry.rstrip('/')}/{name}")


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

        manifest = bundle.manifest
        python = str(manifest.requires["python"])
        say("looking for the base image")
        base = bases.base_of(
            revision.base_image or settings.base_image or bases.default_base(python),
            settings.platform,
            open_registry,
            python=python,
        )
        environment = packages.layers(
            manifest.distributions,
            stack.enter_context(bundle.wheels()),
            bundle.store.root / "environments",
            python=python,
            platform=PLATFORMS[settings.platform],
            gpus=revision.resources.gpus,
            torch_index=settings.torch_index,
            on_progress=say,
        )
        if environment.note:
            say(environment.note, {"state": "note"})
        made = image.build(bundle, base, environment.layers)
        before = Reference.parse(previous) if previous else None
        same = before is not None and (before.host, before.repository) == (to.host, to.repository)
        done = push(made, to, open_registry, previous=before.digest if before and same else "", on_progress=say)
    say(told(done, made.size), {"state": "done"})
    return str(to.pinned(done.digest))


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
