"""`%deploy`: reads the line, finds the objects and the sample in the notebook, and calls `deploy()`."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, needs_local_scope, no_var_expand

from nbdeploy.errors import EndpointNotFoundError, NbdeployError, SampleError, UsageError
from nbdeploy.naming import default_name, notebook_path
from nbdeploy.notebook import card, history
from nbdeploy.notebook.options import Options, help_text, parse
from nbdeploy.notebook.progress import Progress, in_notebook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdeploy.spec import Status

__all__ = ["DeployMagics", "load_ipython_extension"]


@magics_class
class DeployMagics(Magics):  # type: ignore[misc]  # IPython ships no types
    """The magic `%deploy`."""

    @needs_local_scope  # type: ignore[untyped-decorator]  # IPython ships no types
    @no_var_expand  # type: ignore[untyped-decorator]  # as above
    @line_cell_magic  # type: ignore[untyped-decorator]  # as above
    def deploy(self, line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> Any:  # noqa: D102 - its docstring is the help, set below
        if cell is not None:
            raise UsageError(
                "%%deploy has two percent signs, which would make the whole cell its text. "
                "Write %deploy MODEL PREDICT with one, on a line of its own."
            )
        if line.strip() in {"-h", "--help"}:
            sys.stdout.write(help_text())
            return None
        return self._deploy(line, parse(line), {**self.shell.user_ns, **(local_ns or {})})

    deploy.__doc__ = help_text()

    def _deploy(self, line: str, options: Options, namespace: dict[str, Any]) -> Any:
        names = tuple(name for name in (options.model, options.predict) if name)
        objects = [history.resolve(name, namespace) for name in names]
        notebook = notebook_path(namespace)
        name = options.name or default_name(options.predict, options.model, notebook)
        arguments = _arguments(options)
        if options.setup:
            arguments["setup"] = history.resolve(options.setup, namespace)
        if options.sample is not None:
            arguments["sample"] = _evaluate(options.sample, namespace)
        else:
            arguments.update(self._last_sample(line, options.predict, namespace))
        # Here, because these imports take a moment: the mistakes above are told at once.
        from nbdeploy import deploy
        from nbdeploy.config import settings
        from nbdeploy.deploying import Context

        folder = str(Path(notebook).parent) if notebook else str(Path.cwd())
        unknown = set(arguments) - set(inspect.signature(deploy).parameters)
        if unknown:
            flags = ", ".join(sorted(f"--{field.replace('_', '-')}" for field in unknown))
            raise UsageError(f"{flags} is not part of this version of nbdeploy: leave it out.")
        progress = Progress(name, options.engine or settings(Path(folder)).default_engine)
        context = Context(notebook=notebook, folder=folder, names=names)
        try:
            endpoint = deploy(*objects, **arguments, name=name, context=context, on_event=progress)
        except BaseException as error:
            progress.fail(str(error) or type(error).__name__)
            raise
        if not options.wait:
            progress.note(f"The deploy goes on in the background; nbdeploy status {name}")
        return endpoint

    def _last_sample(self, line: str, predict: str, namespace: dict[str, Any]) -> dict[str, Any]:
        from nbdeploy.capture.arguments import LastCall

        cells = history.executed(list(self.shell.user_ns.get("In", ())), line)
        call = history.last_call(predict, cells, namespace)
        return {} if call is None else {"sample": LastCall(call.args, call.kwargs)}

    def show(self, endpoint: Any) -> None:
        """Display an Endpoint as a cell's result; nothing where that cell's own deploy has just shown its card."""
        from IPython.display import display

        if Progress.latest == (self.shell.execution_count, endpoint.name):
            return
        try:
            status = endpoint.status()
        except EndpointNotFoundError:
            status = _absent(endpoint)
        except NbdeployError:
            display({"text/plain": repr(endpoint)}, raw=True)
            return
        display({"text/html": card.endpoint_html(status), "text/plain": card.endpoint_text(status)}, raw=True)


def load_ipython_extension(shell: Any) -> None:
    """Register `%deploy`, and in a notebook the card of an Endpoint."""
    magics = DeployMagics(shell)
    shell.register_magics(magics)
    if in_notebook():
        formatter = shell.display_formatter.ipython_display_formatter
        formatter.for_type_by_name("nbdeploy.endpoint", "Endpoint", magics.show)


def _absent(endpoint: Any) -> Status:
    """Return the state of an Endpoint that its engine does not know: not yet, or no more."""
    from nbdeploy.config import home
    from nbdeploy.jobs import running_job
    from nbdeploy.spec import Phase, Status

    under_way = running_job(home(), endpoint.name, endpoint.engine) is not None
    phase = Phase.PENDING if under_way else Phase.DELETED
    reason = f"its deploy is under way: nbdeploy status {endpoint.name}" if under_way else ""
    return Status(name=endpoint.name, engine=endpoint.engine, phase=phase, reason=reason)


def _arguments(options: Options) -> dict[str, Any]:
    """Return the arguments of deploy() that are said on the line, so that its defaults stand in one place."""
    from nbdeploy.spec import Autoscaling, Resources, Serving

    resources = _said(
        cpus=options.cpu,
        memory=options.memory,
        gpus=options.gpu,
        gpu_type=options.gpu_type,
        spot=options.spot or None,
    )
    autoscaling = _said(
        min_replicas=options.min,
        # --min alone asks for a fixed number
        max_replicas=max(1, options.min) if options.max is None and options.min is not None else options.max,
        target_in_flight=options.target_in_flight,
        scaling=options.scaling,
    )
    serving = _said(
        concurrency=options.concurrency,
        queue=options.queue,
        timeout=options.timeout,
        port=options.port,
        cors=options.cors or None,
        public=options.public or None,
    )
    return _said(
        engine=options.engine,
        model_from=options.model_from,
        resources=Resources(**resources),
        autoscaling=Autoscaling(**autoscaling),
        serving=Serving(**serving),
        base_image=options.base_image,
        pass_model=options.pass_model,
        lane=options.lane,
        max_batch=options.max_batch,
        batch=options.batch,
    ) | {
        "secrets": options.secrets,
        "variables": options.variables,
        "pip": options.pip,
        "files": options.files,
        "replace": options.replace,
        "verify": options.verify,
        "wait": options.wait,
        "dry_run": options.dry_run,
    }


def _said(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _evaluate(source: str, namespace: dict[str, Any]) -> Any:
    """Evaluate --sample in the notebook's names."""
    try:
        return eval(compile(source, "<--sample>", "eval"), dict(namespace))  # noqa: S307 - the user's own expression
    except Exception as error:  # an expression of the user may raise anything
        hint = ""
        if isinstance(error, NameError) and error.name:
            near = difflib.get_close_matches(error.name, [n for n in namespace if not n.startswith("_")], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " Run the cell that defines it first."
        raise SampleError(f"--sample {card.clip(source, 80)} raised {type(error).__name__}: {error}.{hint}") from error
