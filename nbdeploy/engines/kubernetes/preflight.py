"""Early word on the registry and the base image: before anything is captured, and in `nbdeploy cluster check`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from nbdeploy import config, environment
from nbdeploy.engines.kubernetes.publish import base_name, notes_of, repository
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import ConfigError, RegistryError, UsageError
from nbdeploy.oci.base import Base, base_of
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.refusal import RefusedError
from nbdeploy.oci.registry import Registry
from nbdeploy.oci.session import UndecidedError
from nbdeploy.spec import Revision

SECONDS = 5.0  # that a deploy waits here, whatever the network does
_MORE = 0.5  # seconds for answers that come at the last moment to be put into words
_CLOSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
ECR = ".dkr.ecr."  # in the host of every registry of Amazon's: there repositories are made before they are pushed to


@dataclass(frozen=True)
class Place:
    """Where what is looked at was set.

    Attributes:
        settings: of the engine.
        folder: of the notebook, whose settings count; None where there is none.
        base_image: asked for by the deploy itself, or "".
    """

    settings: ClusterSettings
    folder: Path | None = None
    base_image: str = ""

    def named(self, key: str) -> str:
        """Return "engines.cluster.registry in FILE"."""
        return f"engines.{self.settings.name}.{key} in {self.file(key)}"

    def file(self, key: str) -> str:
        """Return the file whose word on a setting counts, else where the engine's settings are or would be."""
        try:
            known = config.settings(self.folder)
        except ConfigError:  # a file broke since the settings were read
            return "the settings"
        return known.origins.get(f"engines.{self.settings.name}.{key}") or known.where(self.settings.name)


def preflight(settings: ClusterSettings, revision: Revision, home: Path) -> None:
    """Return where the registry lets us begin a push of this Endpoint's Image, and its base image is there.

    Three small requests where the base was seen before, at most three more where not; nothing stays in the registry.
    A registry that is there and merely slow is given the benefit of the doubt: the push has more patience.

    Args:
        settings: of the engine.
        revision: name, base image, notebook.
        home: folder of nbdeploy, with the notes on registries.

    Raises:
        ConfigError: a setting cannot be meant so.
        RegistryError: after SECONDS at most; names the setting and its file.
    """
    folder = Path(revision.notebook).absolute().parent if revision.notebook else Path.cwd()
    place = Place(settings, folder, revision.base_image)
    to, base = target(place, revision.name), base_reference(place)
    notes = notes_of(home)
    jobs: dict[str, list[_Check]] = {base.api_host: [lambda registry: base_there(place, registry, notes=notes)]}
    jobs.setdefault(to.api_host, []).append(lambda registry: push_begins(place, to, registry))
    hosts = {base.api_host: base.host, to.api_host: to.host}
    words = {base.api_host: _whose, to.api_host: _registry_setting}
    begun: dict[Future[None], tuple[str, Registry]] = {}
    for api_host, checks in jobs.items():  # of one registry in turn: its login is learnt once
        registry = Registry(hosts[api_host], seconds=SECONDS)
        begun[_begin(functools.partial(_run, registry, checks))] = (api_host, registry)
    done, waiting = wait(begun, SECONDS + _MORE, FIRST_EXCEPTION)
    for one in (one for one in begun if one in done):
        one.result()
    for one, (api_host, registry) in begun.items():
        if one in waiting and not registry.answered:
            said = f"{registry.host} was not reached in {SECONDS:.0f} s: check the network (VPN, DNS, HTTPS_PROXY)"
            raise RegistryError(f"{said}. {words[api_host](place)}")


def target(place: Place, name: str) -> Reference:
    """Return where Images of this name go. Raises ConfigError where the setting is missing or cannot be meant so."""
    try:
        return repository(place.settings, name)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {place.file('registry')})") from error
    except UsageError as error:
        raise ConfigError(f"{place.named('registry')} is {place.settings.registry!r}: {error}") from error


def base_reference(place: Place) -> Reference:
    """Return the name of the base image. Raises ConfigError where it cannot be one."""
    try:
        return Reference.parse(base_name(place.settings, place.base_image, environment.minor()))
    except UsageError as error:
        raise ConfigError(f"{_whose(place)} It names no image: {error}") from error


def push_begins(place: Place, to: Reference, registry: Registry) -> None:
    """Return where the registry lets us begin a push. Raises RegistryError."""
    try:
        registry.check_push(to.repository)
    except UndecidedError:
        raise
    except RegistryError as error:
        made = f" Make it: {unmade(to)}." if unmade(to) and is_absent(error) else ""
        raise _worded(error, f"{made} {_registry_setting(place)}") from error


def base_there(place: Place, registry: Registry, *, notes: Path | None = None) -> Base:
    """Return the base image, for the platform and this Python. Raises RegistryError."""
    reference = base_reference(place)
    try:
        return base_of(
            str(reference), place.settings.platform, lambda _host: registry, python=environment.minor(), notes=notes
        )
    except UndecidedError:
        raise
    except RegistryError as error:
        closed = isinstance(error, RefusedError) and error.status in _CLOSED
        hint = f" Registries say the same of an image that is not there: is {reference} spelt right?" if closed else ""
        raise _worded(error, f"{hint} {_whose(place)}") from error


def is_absent(error: BaseException) -> bool:
    """Tell whether a registry refused since it has no such repository."""
    refused = error if isinstance(error, RefusedError) else error.__cause__
    return isinstance(refused, RefusedError) and refused.status == HTTPStatus.NOT_FOUND


def unmade(to: Reference) -> str:
    """Return the command that makes a repository, "" where a push makes it."""
    return f"aws ecr create-repository --repository-name {to.repository}" if ECR in to.host else ""


_Check = Callable[[Registry], object]


def _run(registry: Registry, checks: list[_Check]) -> None:
    with contextlib.closing(registry):
        for check in checks:
            with contextlib.suppress(UndecidedError):
                check(registry)


def _begin(action: Callable[[], None]) -> Future[None]:
    """Do something in a thread that nobody has to wait for: the look-up of a name cannot be cut short."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised by whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="nbdeploy-preflight", daemon=True).start()
    return future


def _worded(error: RegistryError, more: str) -> RegistryError:
    said = str(error)
    return RegistryError(f"{said}{'' if said.endswith(('.', '?', '!')) else '.'} {more.strip()}")


def _registry_setting(place: Place) -> str:
    return f"The registry is {place.settings.registry!r}: {place.named('registry')}."


def _whose(place: Place) -> str:
    """Say where the base image comes from."""
    settings = place.settings
    if place.base_image:
        return f"The base image is {place.base_image!r}: --base-image of this deploy."
    if settings.base_image:
        return f"The base image is {settings.base_image!r}: {place.named('base_image')}."
    name = base_name(settings, "", environment.minor())
    return f"The base image is {name}, unless {place.named('base_image')} names another, such as a copy of your own."
