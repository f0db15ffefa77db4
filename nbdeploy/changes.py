"""What changes from one Revision to another: which one a rollback means, what scaling asks for, in words; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nbdeploy_server.bundle import Manifest

from nbdeploy.errors import UsageError
from nbdeploy.spec import Autoscaling, Revision

_SETTINGS = {  # fields of a Revision, besides its Bundle, that make its Replicas what they are
    "resources": "resources",
    "serving": "serving options",
    "secrets": "secrets",
    "variables": "variables",
    "base_image": "base image",
}


def earlier(history: Sequence[Revision], number: int | None = None) -> Revision:
    """Return the Revision that a rollback serves again.

    Args:
        history: Revisions, oldest first; the last one is what is to be.
        number: of the Revision; None means the newest with another Bundle or other settings. A scale, stop or start
            alone is nothing to go back from.

    Raises UsageError where there is none.
    """
    current, name = history[-1], history[-1].name
    if number is not None:
        found = next((one for one in history if one.number == number), None)
        if found is None:
            kept = ", ".join(str(one.number) for one in history)
            raise UsageError(f"{name} has no Revision {number}; kept are {kept}.")
        return found
    for one in reversed(history):
        if one.bundle != current.bundle or _settings(one, current):
            return one
    if len(history) == 1:
        raise UsageError(f"{name} has no earlier Revision to go back to.")
    raise UsageError(
        f"{name} has no earlier Revision with other code or settings: the {len(history)} that are kept differ in the "
        f"number of Replicas alone, which nbdeploy scale {name} changes."
    )


def scaled(last: Revision, least: int | None, most: int | None) -> Revision:
    """Return the Revision with other numbers of Replicas; None leaves one as it is, as far as the other allows."""
    before = last.autoscaling
    fewest = before.min_replicas if least is None else least
    top = before.max_replicas if most is None else most
    if most is None and least is not None:
        # A fixed number stays a fixed number; a range grows only as far as it must.
        fixed = before.min_replicas == before.max_replicas
        top = max(1, fewest) if fixed else max(top, fewest)
    return dataclasses.replace(last, autoscaling=dataclasses.replace(before, min_replicas=fewest, max_replicas=top))


def told(before: Revision, after: Revision) -> str:
    """Say what another Revision brings: "other code or model, 2 replicas instead of 1"; "" for nothing."""
    parts = ["other code, model or packages"] if before.bundle != after.bundle else []
    parts += [f"other {words}" for words in _settings(before, after)]
    if before.stopped != after.stopped:
        parts.append("stopped" if after.stopped else "started")
    now, then = _replicas(after.autoscaling), _replicas(before.autoscaling)
    if now != then:
        parts.append(f"{now} replica{'' if now == '1' else 's'} instead of {then}")
    return ", ".join(parts)


def content(earlier: Manifest | None, later: Manifest, blobs: Mapping[str, Any]) -> str:
    """Say what is new in a Bundle; cells and files tell of code, because pickle bytes never repeat.

    Args:
        earlier: what served before; None where nothing did, or where it is not here any more.
        later: what serves now.
        blobs: of the receipt: {"new", "count", "new_bytes"}.
    """
    if earlier is None:
        return "first revision"
    parts = []
    if dict(earlier.cells) != dict(later.cells):
        parts.append("code changed")
    if earlier.files != later.files:
        parts.append("files changed")
    if [one.ref for one in earlier.blobs] != [one.ref for one in later.blobs]:
        size = blobs["new_bytes"] / 1e6
        parts.append(f"weights changed: {blobs['new']} of {blobs['count']} blobs new, {size:.1f} MB")
    if earlier.distributions != later.distributions:
        parts.append("packages changed")
    return ", ".join(parts) or "neither code nor weights"


def _settings(one: Revision, other: Revision) -> list[str]:
    """Name the settings in which two Revisions differ."""
    return [words for field, words in _SETTINGS.items() if getattr(one, field) != getattr(other, field)]


def _replicas(scaling: Autoscaling) -> str:
    least, most = scaling.min_replicas, scaling.max_replicas
    return str(least) if most in {least, 1} and least else f"{least} to {most}"
