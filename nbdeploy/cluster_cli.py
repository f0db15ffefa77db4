"""The commands `nbdeploy cluster …`."""

from __future__ import annotations

import json
import sys

import click

from nbdeploy.errors import ConfigError

_MARKS = {"ok": "✓", "missing": "✗", "note": "·"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cluster() -> None:
    """Look at the cluster that an engine deploys to."""


@cluster.command()
@click.option("--engine", metavar="NAME", help="Engine to look at; default: the one of kind kubernetes.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
def check(engine: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Check all that a deploy to the cluster needs: access, registry, base image, GPUs, quota.

    An upload is begun in the registry and taken back; in the cluster nothing is made. Exit status 1 where something
    needed is missing.
    """
    from nbdeploy.config import settings
    from nbdeploy.engines.kubernetes.checking import rows
    from nbdeploy.engines.kubernetes.settings import ClusterSettings

    known = settings()
    name = _chosen(engine, known.default_engine, {key: one.kind for key, one in known.engines.items()})
    with known.located(name):
        asked = ClusterSettings(**known.engine(name).arguments(name))
    found = []
    for row in rows(asked):
        found.append(row)
        if not as_json:
            click.echo(f"{_MARKS[row.state]} {row.check:13} {row.words}".rstrip())
    if as_json:
        click.echo(json.dumps([row.to_json() for row in found], indent=2, ensure_ascii=False))
    if any(row.state == "missing" for row in found):
        sys.exit(1)


def _chosen(engine: str | None, default: str, kinds: dict[str, str]) -> str:
    """Return the engine to look at: the one asked for, the default if it is a cluster, else the only one."""
    clusters = sorted(name for name, kind in kinds.items() if kind == "kubernetes")
    if engine:
        if kinds.get(engine, engine) != "kubernetes":
            raise ConfigError(f"The engine {engine!r} is no cluster. {_listed(clusters)}")
        return engine
    if default in clusters:
        return default
    if len(clusters) > 1:
        raise ConfigError(
            f"Which cluster? {_listed(clusters)} Say one with --engine NAME, or with default_engine in the settings."
        )
    return clusters[0] if clusters else "kubernetes"


def _listed(clusters: list[str]) -> str:
    return f"There is {', '.join(clusters)}." if clusters else "The settings name none of kind kubernetes."
