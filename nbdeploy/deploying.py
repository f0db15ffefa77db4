"""`deploy`: the one use case. Capture here, hand the rest to a detached worker, follow its log, return an Endpoint.

(The module is not called `deploy`: importing it would then hide the public function of that name in the package.)
"""

from __future__ import annotations

import getpass
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdeploy import capture, errors
from nbdeploy.capture.arguments import MISSING, name_of
from nbdeploy.capture.taking import secret_environment
from nbdeploy.config import EngineSettings, Settings, home, settings
from nbdeploy.endpoint import Endpoint
from nbdeploy.engines.base import HasCheck, HasTarget, check_owner
from nbdeploy.errors import DeployError, UsageError
from nbdeploy.jobs import Event, Job, Journal, running_job
from nbdeploy.process import kernel_path, launch, let_go
from nbdeploy.spec import Autoscaling, Resources, Revision, Serving, check_name
from nbdeploy.store import Store
from nbdeploy.survey import engine_named

OnEvent = Callable[[Event], None]


default_watch: Callable[[str, str], OnEvent] | None = None
"""Makes an on_event of an Endpoint's name and engine where a caller gives none; set in notebooks, to show progress."""


@dataclass(frozen=True)
class Context:
    """Where a deploy comes from.

    Attributes:
        notebook: path of the notebook, or "".
        folder: where relative paths start; "" means the working directory.
        names: under which the objects were given, e.g. ("clf", "predict_fn").
    """

    notebook: str = ""
    folder: str = ""
    names: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder) if self.folder else Path.cwd()


@dataclass(frozen=True)
class _Options:
    """Everything deploy() was asked for, checked as far as it can be without the objects."""

    name: str
    engine: str
    resources: Resources
    autoscaling: Autoscaling
    serving: Serving
    secrets: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    base_image: str = ""
    replace: bool = False
    verify: bool = True
    dry_run: bool = False
    context: Context = field(default_factory=Context)


def deploy(
    *objects: Any,
    name: str | None = None,
    engine: str | None = None,
    sample: Any = MISSING,
    setup: Callable[..., Any] | None = None,
    model_from: str | None = None,
    resources: Resources | None = None,
    autoscaling: Autoscaling | None = None,
    serving: Serving | None = None,
    secrets: tuple[str, ...] = (),
    variables: tuple[str, ...] = (),
    pip: tuple[str, ...] = (),
    files: tuple[str, ...] = (),
    pass_model: bool | None = None,
    base_image: str | None = None,
    replace: bool = False,
    verify: bool = True,
    wait: bool = True,
    dry_run: bool = False,
    context: Context | None = None,
    on_event: OnEvent | None = None,
) -> Endpoint:
    """Make a predict function, with its model, an Endpoint.

    Args:
        objects: `model, predict_fn`, or `predict_fn` alone.
        name: of the Endpoint; default: made of the function's name.
        engine: "local", "kubernetes", or a named engine of the settings.
        sample: one request: a dict of arguments, a tuple, or the one argument.
        setup: zero-argument function run once in each Replica; its result is the model.
        model_from: a folder, or "hf:ORG/NAME@REV".
        resources: per Replica.
        autoscaling: how many Replicas.
        serving: timeouts, queue, port, public.
        secrets: names of environment variables handed to Replicas as secrets.
        variables: names of environment variables passed on.
        pip: further requirements.
        files: files that travel.
        pass_model: overrides how the model is passed.
        base_image: that the Image stands on, for engines that run containers.
        replace: take over an Endpoint of another notebook or owner.
        verify: prove the Bundle in a clean process first.
        wait: return once it is ready; else at once.
        dry_run: capture, verify and report; deploy nothing.
        context: where the objects come from; filled by the magic.
        on_event: called with each Event of the Job.

    Returns:
        The Endpoint.

    Raises:
        CaptureError, DeployError, UsageError and their kinds: each says what to do next.
    """
    context = context or _here()
    known = settings(context.path)
    options = _Options(
        name=check_name(name) if name is not None else _default_name(_objects(objects)[2], context),
        engine=engine or known.default_engine,
        resources=resources or Resources(),
        autoscaling=autoscaling or Autoscaling(),
        serving=serving or Serving(),
        secrets=secrets,
        variables=variables,
        pip=pip,
        base_image=base_image or "",
        replace=replace,
        verify=verify,
        dry_run=dry_run,
        context=context,
    )
    _check_installed(pip)
    what = {"sample": sample, "setup": setup, "model_from": model_from, "files": files, "pass_model": pass_model}
    request = _request(objects, context, secrets, **what)
    return _carried_out(request, options, known, on_event, wait=wait)


def _carried_out(
    request: capture.Request, options: _Options, known: Settings, on_event: OnEvent | None, *, wait: bool
) -> Endpoint:
    """Begin the Job, follow it if it is to be waited for, and return its Endpoint."""
    if on_event is None and default_watch is not None:
        on_event = default_watch(options.name, options.engine)
    try:
        job = _begin(request, options, known, on_event)
    except errors.NbdeployError as error:
        if on_event is not None:
            on_event(Event(1, time.time(), "job", "failed", str(error), data={"error": type(error).__name__}))
        raise
    endpoint = Endpoint(name=options.name, engine=options.engine, url="")
    if wait and _follow(job, options.name, on_event) and not options.dry_run:
        endpoint.status()  # learns the URL
    return endpoint


def _request(objects: tuple[Any, ...], context: Context, secrets: tuple[str, ...], **what: Any) -> capture.Request:
    model, has_model, predict = _objects(objects)
    return capture.Request(
        predict=predict,
        model=model,
        has_model=has_model,
        variable=context.names[0] if has_model and context.names else "",
        folder=context.path,
        secrets=tuple(row.partition("=")[0] for row in secrets),
        **what,
    )


def _check_installed(pip: tuple[str, ...]) -> None:
    """Refuse a --pip that is not installed here: what the notebook did not run with was never proved."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    for text in pip:
        try:
            requirement = Requirement(text)
            found = version(requirement.name)
        except InvalidRequirement as error:
            raise UsageError(
                f"--pip {text}: this is no requirement ({error}). Write it like scipy or scipy>=1.11."
            ) from None
        except PackageNotFoundError:
            raise UsageError(f"--pip {text}: it is not installed here. Install it first: %pip install {text}") from None
        if not requirement.specifier.contains(found, prereleases=True):
            raise UsageError(f"--pip {text}: version {found} is installed here. Install the wanted one first.")


def _here() -> Context:
    """Return the context of a call from Python: in a kernel, the notebook that it belongs to."""
    from nbdeploy.naming import notebook_path

    notebook = notebook_path({}) if "ipykernel" in sys.modules else ""
    return Context(notebook, str(Path(notebook).parent) if notebook else "")


def _objects(objects: tuple[Any, ...]) -> tuple[Any, bool, Any]:
    if len(objects) == 1:
        return None, False, objects[0]
    if len(objects) == 2:  # noqa: PLR2004 - model and predict
        return objects[0], True, objects[1]
    raise UsageError(f"deploy takes a model and a function, or a function alone, not {len(objects)} objects.")


def _default_name(predict: Any, context: Context) -> str:
    from nbdeploy.naming import default_name

    if not callable(predict):
        raise UsageError(
            f"predict must be a function, but it is a {type(predict).__name__}: deploy(model, predict_fn)."
        )

    function = name_of(predict)
    model = context.names[0] if len(context.names) > 1 else ""
    return check_name(default_name(context.names[-1] if context.names else function, model, context.notebook))


def _begin(request: capture.Request, options: _Options, known: Settings, on_event: OnEvent | None) -> Job:
    """Capture, write the Job, start its worker."""
    found = known.engine(options.engine)
    place = home()
    engine = engine_named(options.engine, known)
    revision = Revision(
        name=options.name,
        number=0,
        bundle="",
        resources=options.resources,
        autoscaling=options.autoscaling,
        serving=options.serving,
        owner=_owner(),
        notebook=options.context.notebook,
        created=time.time(),
        secrets=options.secrets,
        variables=options.variables,
        base_image=options.base_image,
    )
    if isinstance(engine, HasCheck):
        with known.located(options.engine):
            engine.check(revision)
    if not options.replace and not options.dry_run:
        check_owner(engine, options.name, _owner(), options.context.notebook)
    busy = running_job(place, options.name, options.engine)
    if busy is not None:
        raise DeployError(
            f"A deploy of {options.name} is under way. Wait for it, or stop it: nbdeploy cancel {options.name}"
        )
    values = secret_environment(options.secrets, elsewhere=isinstance(engine, HasTarget))
    if on_event is not None:
        on_event(Event(0, time.time(), "captured", "running", "walking through what predict reaches"))
    taken = capture.take(request, Store(place / "store"))
    job = Job.create(place, _spec(options, found, place, request, taken, revision), values)
    journal = Journal(job)
    journal.write("captured", "done", _captured_words(taken), taken.seconds)
    journal.close()
    _start_worker(job, request.folder)
    return job


def _spec(
    options: _Options,
    engine: EngineSettings,
    place: Path,
    request: capture.Request,
    taken: capture.Capture,
    revision: Revision,
) -> dict[str, Any]:
    """Return what the worker has to do, as plain data."""
    return {
        "name": options.name,
        "engine": options.engine,
        "kind": engine.kind,
        "engine_settings": engine.arguments(options.engine),
        "home": str(place),
        "owner": revision.owner,
        "notebook": revision.notebook,
        "folder": str(request.folder),
        "manifest": taken.manifest,
        "modules": list(taken.modules),
        "pip": list(options.pip),
        "receipt": taken.receipt,
        "sample": taken.sample,
        "call": taken.call,
        "runs": taken.runs,
        "captured_seconds": taken.seconds,
        "revision": revision.to_json(),
        "variables": list(options.variables),
        "replace": options.replace,
        "verify": options.verify,
        "dry_run": options.dry_run,
    }


def _captured_words(taken: capture.Capture) -> str:
    receipt = taken.receipt
    parts = [receipt["functions"][0] if receipt["functions"] else taken.manifest["predict"]["name"]]
    others = len(receipt["functions"]) - 1
    if others > 0:
        parts.append(f"{others} helper{'s' if others > 1 else ''}")
    parts += [module["name"] for module in receipt["modules"][:3]]
    if receipt["globals"]:
        parts.append(f"{len(receipt['globals'])} global{'s' if len(receipt['globals']) > 1 else ''}")
    words = ", ".join(parts)
    blobs = receipt["blobs"]
    if blobs["count"]:
        words += f" · model {_size(blobs['bytes'])} in {blobs['count']} blobs ({_size(blobs['new_bytes'])} new)"
    else:
        words += f" · {_size(receipt['skeleton_bytes'])}"
    return words


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def _start_worker(job: Job, folder: Path) -> None:
    with (job.folder / "worker.log").open("ab") as output:
        worker = launch(
            "nbdeploy.worker:main",
            {"job": str(job.folder)},
            path=kernel_path([folder]),
            environment=os.environ,
            folder=job.folder,
            output=output,
        )
    let_go(worker)


def _follow(job: Job, name: str, on_event: OnEvent | None) -> bool:
    """Follow the Job to its end; an interrupt detaches from it, and the result is False then."""
    last: Event | None = None
    try:
        for event in job.follow():
            last = event
            if on_event is not None:
                on_event(event)
    except KeyboardInterrupt:
        words = (
            f"Detached: the deploy goes on in the background. nbdeploy status {name} shows it, nbdeploy cancel {name} "
            "ends it."
        )
        if on_event is not None:
            on_event(Event(last.seq + 1 if last else 1, time.time(), "job", "note", words))
        else:
            print(words, file=sys.stderr)  # noqa: T201 - a script that nobody watches for otherwise
        return False
    if last is not None and last.state in {"failed", "cancelled"}:
        raise _error(last.data)(last.detail)
    return True


def _error(data: Mapping[str, Any]) -> type[errors.NbdeployError]:
    found = getattr(errors, str(data.get("error", "")), DeployError)
    return found if isinstance(found, type) and issubclass(found, errors.NbdeployError) else DeployError


def _owner() -> str:
    """Return who deploys. On JupyterHub all are `jovyan` to the operating system; in a pod a user may have no name."""
    try:
        return os.environ.get("JUPYTERHUB_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"
