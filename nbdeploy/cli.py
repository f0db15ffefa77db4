"""The command line. Exit status: 0; 1 for a failure told in words; 2 for bad usage."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from nbdeploy_server import __version__

from nbdeploy.cluster_cli import cluster
from nbdeploy.errors import NbdeployError, UsageError

_NAME = click.argument("name")
_ENGINE = click.option("--engine", metavar="NAME", help="Engine to look at; default: all that are configured.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn nbdeploy's errors into one line and the exit status."""
    try:
        yield
    except NbdeployError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        sys.exit(0)


class _Group(click.Group):
    """A group whose commands tell their errors in words."""

    def invoke(self, ctx: click.Context) -> Any:
        with _told():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nbdeploy")
def main() -> None:
    """Endpoints that notebooks have deployed: look at them, call them, stop them."""


def _endpoint(name: str, engine: str | None) -> Any:
    from nbdeploy.endpoint import connect

    return connect(name, engine=engine)


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


@main.command("ls")
@_ENGINE
@_JSON
def list_endpoints(engine: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """List Endpoints."""
    from nbdeploy import states
    from nbdeploy.config import home
    from nbdeploy.jobs import jobs_of
    from nbdeploy.survey import survey

    found, silent = survey(engine)
    jobs = jobs_of(home())
    rows = [states.row(status, name, jobs.get((status.name, name), [])) for name, status in found]
    if as_json:
        _echo_json(rows)
    elif rows:
        _table(rows)
    for name, error in silent:
        click.echo(f"{name} did not answer: {error}", err=True)
    if silent:
        sys.exit(1)
    if not rows and not as_json:
        click.echo("No Endpoint yet. In a notebook: %load_ext nbdeploy, then %deploy model predict_fn")


def _table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    colours = {"ready": "green", "starting": "yellow", "pending": "yellow", "failed": "red", "idle": "dim"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("NAME", "ENGINE", "PHASE", "REV", "READY", "BUSY", "URL"):
        table.add_column(title, justify="right" if title in {"REV", "READY", "BUSY"} else "left", overflow="fold")
    for row in rows:
        colour = colours.get(row["phase"], "default")
        table.add_row(
            row["name"],
            row["engine"],
            f"[{colour}]{row['phase']}[/]",
            str(row["revision"]),
            f"{row['replicas']['ready']}/{row['replicas']['desired']}",
            "-" if row["autoscaling"]["in_flight"] is None else str(row["autoscaling"]["in_flight"]),
            row["url"],
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a pipe has no width of its own: nothing is cut there
    console.print(table)
    for row in rows:
        if row["reason"]:
            console.print(f"{row['name']}: {row['reason']}", highlight=False, markup=False, soft_wrap=True)
        if row["job"]:
            console.print(
                f"{row['name']}: a deploy is under way ({row['job']['step']})", highlight=False, soft_wrap=True
            )


@main.command()
@_NAME
@_ENGINE
@_JSON
def status(name: str, engine: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Show one Endpoint: phase, reason, Replicas, URL, and the deploy under way."""
    from nbdeploy import states
    from nbdeploy.errors import EndpointNotFoundError
    from nbdeploy.survey import find

    only_a_job = False
    try:
        where, known = find(name, engine)
        row = states.row(known, where)
    except EndpointNotFoundError:
        found = states.of_job(name, engine)
        if found is None:
            raise
        row, only_a_job = found, True
    if as_json:
        _echo_json(row)
        return
    lines = [("phase", f"{row['phase']}{' · ' + row['reason'] if row['reason'] else ''}")]
    if not only_a_job:
        lines += [
            ("url", row["url"]),
            ("revision", str(row["revision"])),
            ("replicas", f"{row['replicas']['ready']} of {row['replicas']['desired']} ready"),
            ("in flight", "" if row["autoscaling"]["in_flight"] is None else str(row["autoscaling"]["in_flight"])),
            ("memory", f"{row['memory_bytes'] / 1e6:.0f} MB" if row["memory_bytes"] else ""),
            ("key", f"nbdeploy key {name}" if row["key_file"] else "none (public)"),
        ]
    lines += [
        ("notebook", row["notebook"]),
        ("deploy", f"{row['job']['step']} (job {row['job']['id']})" if row["job"] else ""),
    ]
    click.echo(f"{row['name']} · {row['engine']}")
    for title, value in lines:
        if value:
            click.echo(f"  {title:10} {value}")


@main.command()
@_NAME
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@_ENGINE
def logs(name: str, follow: bool, engine: str | None) -> None:  # noqa: FBT001 - click passes flags by name
    """Print what the Replicas printed."""
    from nbdeploy.survey import engine_named

    endpoint = _endpoint(name, engine)
    for line in engine_named(endpoint.engine).logs(name, follow=follow):
        click.echo(line)


@main.command()
@_NAME
@click.argument("arguments", metavar="JSON")
@_ENGINE
def call(name: str, arguments: str, engine: str | None) -> None:
    """Call an Endpoint with a JSON object of arguments ("-" reads it from standard input)."""
    from nbdeploy_server.wire import to_json

    text = sys.stdin.read() if arguments == "-" else arguments
    try:
        given = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"The arguments are not valid JSON: {error}. For example: nbdeploy call {name} '{{\"x\": 1}}'"
        ) from None
    if not isinstance(given, dict):
        raise UsageError("The arguments must be a JSON object, one entry per parameter.")
    click.echo(to_json(_endpoint(name, engine)(**given)).decode())


@main.command()
@_NAME
@_ENGINE
@_JSON
def metrics(name: str, engine: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Print metrics, summed over Replicas; --json gives them as data."""
    found = _endpoint(name, engine).metrics()
    if as_json:
        _echo_json(found)
        return
    for metric, value in found.items():
        click.echo(f"{metric} {value:g}")


@main.command()
@_NAME
@_ENGINE
def stop(name: str, engine: str | None) -> None:
    """Take all Replicas away; name, key and URL stay."""
    _endpoint(name, engine).stop()
    click.echo(f"{name} is stopped. nbdeploy start {name} brings it back.")


@main.command()
@_NAME
@_ENGINE
def start(name: str, engine: str | None) -> None:
    """Bring Replicas back after a stop or a restart of the machine."""
    found = _endpoint(name, engine).start()
    click.echo(f"{name} is {found.phase} at {found.url}")


@main.command()
@_NAME
@click.option("--min", "at_least", type=int, metavar="N", help="Fewest Replicas.")
@click.option("--max", "at_most", type=int, metavar="N", help="Most Replicas.")
@_ENGINE
def scale(name: str, at_least: int | None, at_most: int | None, engine: str | None) -> None:
    """Change the number of Replicas; none is restarted."""
    if at_least is None and at_most is None:
        raise UsageError(f"Give --min, --max or both, for example: nbdeploy scale {name} --min 2 --max 2")
    found = _endpoint(name, engine).scale(min_replicas=at_least, max_replicas=at_most)
    click.echo(f"{name}: {found.ready} of {found.desired} Replicas ready")


@main.command()
@_NAME
@_ENGINE
@_JSON
def history(name: str, engine: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """List the Revisions that are kept, oldest first."""
    rows = [revision.to_json() for revision in _endpoint(name, engine).history()]
    if as_json:
        _echo_json(rows)
        return
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        fewest = row["autoscaling"]["min_replicas"]
        size = "stopped" if row["stopped"] else f"{fewest} replica{'' if fewest == 1 else 's'}"
        what = f"{row['bundle'][:19]}  {size:<10}"  # sha256: and 12 digits: equal ones are the same code and model
        click.echo(f"{row['number']:>4}  {when}  {what}  {row['owner']}  {row['notebook']}".rstrip())


@main.command()
@_NAME
@click.argument("revision", type=int, required=False)
@_ENGINE
def rollback(name: str, revision: int | None, engine: str | None) -> None:
    """Serve an earlier REVISION again; default: the newest with other code or settings."""
    from nbdeploy import changes

    endpoint = _endpoint(name, engine)
    before = endpoint.history()
    found = endpoint.rollback(revision)
    after = endpoint.history()[-1]
    brought = changes.told(before[-1], after) or "no change"
    click.echo(f"{name} serves revision {found.revision}, made of an earlier one ({brought}), at {found.url}")


@main.command()
@_NAME
@_ENGINE
def cancel(name: str, engine: str | None) -> None:
    """End the deploy of NAME that is under way; what served before goes on serving."""
    from nbdeploy.config import home
    from nbdeploy.jobs import running_job

    job = running_job(home(), name, engine)
    if job is None:
        click.echo(f"No deploy of {name} is under way.", err=True)
        sys.exit(1)
    job.cancel()
    if any(event.ends and event.state == "done" for event in job.events()):
        click.echo(f"The deploy of {name} was done before it could be cancelled.", err=True)
        sys.exit(1)
    click.echo(f"The deploy of {name} is cancelled.")


@main.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Delete every Endpoint.")
@_ENGINE
def delete(name: str | None, everything: bool, engine: str | None) -> None:  # noqa: FBT001 - click passes flags by name
    """Remove an Endpoint: no process and no file of it is left.

    Its weights stay in the store, where a next deploy finds them.
    """
    from nbdeploy.endpoint import endpoints

    if (name is None) == (not everything):
        raise UsageError("Give a NAME, or --all.")
    found = endpoints(engine) if everything else [_deployed_or_under_way(str(name), engine)]
    for endpoint in found:
        left: list[str] = []
        with contextlib.suppress(NbdeployError):  # its record cannot be read, or only its first deploy is under way
            left = endpoint.remains()
        endpoint.delete()
        click.echo(f"{endpoint.name} is deleted.")
        for image in left:
            click.echo(f"  stays in the registry: {image}")
    if not found:
        click.echo("There is no Endpoint.")


def _deployed_or_under_way(name: str, engine: str | None) -> Any:
    """Return an Endpoint also where only its first deploy is under way."""
    from nbdeploy.config import home
    from nbdeploy.endpoint import Endpoint
    from nbdeploy.errors import EndpointNotFoundError
    from nbdeploy.jobs import running_job

    try:
        return _endpoint(name, engine)
    except EndpointNotFoundError:
        job = running_job(home(), name, engine)
        if job is None:
            raise
        return Endpoint(name=name, engine=job.spec["engine"], url="")


@main.command()
@_NAME
@_ENGINE
def key(name: str, engine: str | None) -> None:
    """Print the key of an Endpoint."""
    from nbdeploy.engines.base import HasKey
    from nbdeploy.survey import engine_named

    endpoint = _endpoint(name, engine)
    found = engine_named(endpoint.engine)
    text = found.key(name) if isinstance(found, HasKey) else ""
    if not text:
        click.echo(f"{name} is public: it has no key.", err=True)
        sys.exit(1)
    click.echo(text)


@main.command("open")
@_NAME
@_ENGINE
def open_docs(name: str, engine: str | None) -> None:
    """Open the Endpoint's documentation page in a browser."""
    import webbrowser

    url = f"{_endpoint(name, engine).url}/docs"
    click.echo(url)
    webbrowser.open(url)


@main.command()
@_JSON
def doctor(as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Check what nbdeploy needs on this machine."""
    rows = [{"check": title, **_checked(check)} for title, check in _CHECKS]
    if as_json:
        _echo_json(rows)
    else:
        for row in rows:
            click.echo(f"{'✓' if row['ok'] else '✗'} {row['check']:12} {row['detail']}")
    if not all(row["ok"] for row in rows):
        sys.exit(1)


def _checked(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": check()}
    except (NbdeployError, OSError, ImportError) as error:
        return {"ok": False, "detail": str(error)}


def _check_python() -> str:
    return f"{sys.version.split()[0]} at {sys.executable}"


def _check_home() -> str:
    from nbdeploy.config import home

    place = home()
    probe = place / f".probe-{time.monotonic_ns()}"
    probe.write_text("", encoding="ascii")
    probe.unlink()
    return str(place)


def _check_settings() -> str:
    from nbdeploy.config import settings

    found = settings()
    return f"default engine {found.default_engine}; engines {', '.join(sorted(found.engines))}"


def _check_engines() -> str:
    from nbdeploy.endpoint import endpoints

    found = endpoints()
    return f"{len(found)} Endpoint{'s' if len(found) != 1 else ''}"


def _check_uv() -> str:
    import uv

    return str(uv.find_uv_bin())


def _check_memory() -> str:
    import os
    import shutil

    from nbdeploy.config import home

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(home()).free / 2**30
    return f"{memory:.1f} GiB memory, {free:.1f} GiB free on the disk of the home, {os.cpu_count()} CPUs"


_CHECKS: list[tuple[str, Callable[[], str]]] = [
    ("python", _check_python),
    ("home", _check_home),
    ("settings", _check_settings),
    ("endpoints", _check_engines),
    ("uv", _check_uv),
    ("machine", _check_memory),
]

main.add_command(cluster)

if __name__ == "__main__":
    main()
