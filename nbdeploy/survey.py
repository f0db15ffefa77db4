"""Asks engines what they have: all of them at once, so that a cluster that is down hides no other, nor for long."""

from __future__ import annotations

import difflib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from nbdeploy.config import Settings, home, settings
from nbdeploy.engines.base import Engine, get_engine
from nbdeploy.errors import ConfigError, EndpointNotFoundError, EngineError, NbdeployError, UsageError
from nbdeploy.jobs import running_job
from nbdeploy.spec import Status

ANSWER_SECONDS = 45.0  # for an engine that hangs in spite of its own limits; a cluster under load may take its time

T = TypeVar("T")


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What engines said, by their names, in the order of the settings.

    Attributes:
        found: what each returned.
        missing: the errors of those that have no such Endpoint.
        silent: why the others gave no answer.
    """

    found: Mapping[str, T]
    missing: Mapping[str, EndpointNotFoundError]
    silent: Mapping[str, NbdeployError]


def engine_named(name: str, known: Settings | None = None) -> Engine:
    """Return the engine of a name in the settings. Raises ConfigError naming their file, UsageError for no engine."""
    known = known or settings()
    found = known.engine(name)
    with known.located(name):
        return get_engine(found.kind, home(), found.arguments(name))


def survey(engine: str | None = None) -> tuple[list[tuple[str, Status]], list[tuple[str, NbdeployError]]]:
    """Return what each engine lists, by the engine's name, and why those that did not answer did not."""
    answers = _ask(settings(), engine, lambda one: one.list())
    return [(name, status) for name, rows in answers.found.items() for status in rows], list(answers.silent.items())


def find(name: str, engine: str | None = None) -> tuple[str, Status]:
    """Return the engine that has an Endpoint, and its Status there.

    Raises:
        EndpointNotFoundError: it is on none; says where was looked, and which name is like it.
        EngineError: none has it, but not all answered.
        UsageError: two have it.
    """
    known = settings()
    answers = _ask(known, engine, lambda one: one.status(name))
    found = list(answers.found.items())
    if len(found) > 1:
        where = " and ".join(answers.found)
        first = found[0][0]
        raise UsageError(
            f"{name!r} exists on {where}. Say which: connect({name!r}, engine={first!r}), or in a terminal "
            f"--engine {first}"
        )
    if found:
        return found[0]
    if not answers.silent and running_job(home(), name, engine) is not None:
        raise EndpointNotFoundError(f"{name} is being deployed for the first time: nbdeploy status {name}")
    raise _nowhere(name, engine, known, answers)


def _nowhere(name: str, engine: str | None, known: Settings, answers: Answers[Status]) -> NbdeployError:
    """Return the error that says where was looked."""
    if len(answers.missing) + len(answers.silent) == 1:
        return next(iter([*answers.missing.values(), *answers.silent.values()]))  # says all of it
    looked = " and ".join(_place(one, known) for one in answers.missing)
    there = {status.name: one for one, status in survey(engine)[0]} if not answers.silent else {}
    near = difflib.get_close_matches(name, there, 1)
    hint = f"Did you mean {near[0]!r} (on {there[near[0]]})?" if near else "`nbdeploy ls` lists those there are."
    if not answers.silent:
        return EndpointNotFoundError(
            f"There is no Endpoint {name!r}, neither on {looked.replace(' and ', ' nor on ')}. {hint}"
        )
    reasons = " ".join(f"{one} did not answer: {error}" for one, error in answers.silent.items())
    begin = f"There is no Endpoint {name!r} on {looked}, but not all engines were heard. " if looked else ""
    return EngineError(f"{begin}{reasons}")


def _place(engine: str, known: Settings) -> str:
    found = known.engine(engine)
    if found.kind == "local":
        return "this machine"
    return f"{engine} (namespace {found.namespace})" if found.namespace else engine


def _ask(known: Settings, engine: str | None, question: Callable[[Engine], T]) -> Answers[T]:
    """Put a question to one engine, or to all at once; raises what is no answer of an engine."""
    names = [engine] if engine else list(known.engines)
    came: queue.Queue[tuple[str, T | BaseException]] = queue.Queue()

    def ask(name: str) -> None:
        try:
            came.put((name, question(engine_named(name, known))))
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked
            came.put((name, error))

    for name in names:
        # A daemon, for one that hangs must not keep the process.
        threading.Thread(target=ask, args=(name,), name=f"nbdeploy-ask-{name}", daemon=True).start()
    limit = time.monotonic() + ANSWER_SECONDS
    said: dict[str, T | BaseException] = {}
    while len(said) < len(names):
        try:
            said.update([came.get(timeout=max(0.0, limit - time.monotonic()))])
        except queue.Empty:
            break
    late = EngineError(f"it gave no answer within {ANSWER_SECONDS:.0f} s. Check the VPN and whether the cluster runs.")
    return _sorted_out({name: said.get(name, late) for name in names}, engine)


def _sorted_out(said: Mapping[str, T | BaseException], engine: str | None) -> Answers[T]:
    found: dict[str, T] = {}
    missing: dict[str, EndpointNotFoundError] = {}
    silent: dict[str, NbdeployError] = {}
    for name, one in said.items():
        if not isinstance(one, BaseException):
            found[name] = one
        elif isinstance(one, EndpointNotFoundError):
            missing[name] = one
        elif isinstance(one, EngineError) or (isinstance(one, ConfigError) and not engine):
            silent[name] = one
        elif not isinstance(one, UsageError) or engine or name == "local":
            raise one
        # else: the settings name an engine that this installation lacks; the others are still of use
    return Answers(found, missing, silent)
