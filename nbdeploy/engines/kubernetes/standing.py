"""How an Endpoint stands, from what the cluster says of it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbdeploy.engines.kubernetes.record import Summary
from nbdeploy.spec import Phase, Status


def status(
    engine: str, summary: Summary, deployment: Mapping[str, Any] | None, *, url: str = "", trouble: str = ""
) -> Status:
    """Return the Status of an Endpoint.

    Args:
        engine: its name.
        summary: of the Endpoint's record.
        deployment: as the API server has it, or None.
        url: where it is reached.
        trouble: what keeps Replicas from being ready, in words, where that was looked for.
    """
    spec = (deployment or {}).get("spec", {})
    counts = (deployment or {}).get("status", {})
    desired = 0 if summary.stopped else int(spec.get("replicas", 0))
    ready = 0 if summary.stopped else int(counts.get("availableReplicas", 0))
    phase, reason = _phase(summary, deployment, ready, desired, trouble)
    return Status(
        name=summary.name,
        engine=engine,
        url=url,
        revision=summary.serving,
        phase=phase,
        reason=reason,
        owner=summary.owner,
        notebook=summary.notebook,
        ready=ready,
        desired=desired,
        autoscaling=summary.autoscaling,
        in_flight=None,
        public=summary.public,
    )


def _phase(
    summary: Summary, deployment: Mapping[str, Any] | None, ready: int, desired: int, trouble: str
) -> tuple[Phase, str]:
    name = summary.name
    if summary.stopped and summary.serving:
        return Phase.IDLE, f"stopped; nbdeploy start {name}"
    if not summary.serving:
        words = "its first deploy is under way, or was ended half-way; deploy it again, or nbdeploy delete"
        return Phase.PENDING, trouble or f"{words} {name}"
    if deployment is None:
        return Phase.FAILED, f"somebody removed its Deployment; nbdeploy start {name} makes it again"
    under_way = _under_way(summary, deployment)
    if not ready:
        reasons = (trouble or "no replica is ready yet", under_way)
        return Phase.FAILED if trouble else Phase.STARTING, "; ".join(filter(None, reasons))
    fewer = (
        f"{ready} of {desired} replicas are ready: {trouble or 'the others are starting'}" if ready < desired else ""
    )
    return Phase.READY, "; ".join(filter(None, (under_way, fewer)))


def _under_way(summary: Summary, deployment: Mapping[str, Any]) -> str:
    """Say that a Revision is being rolled out, or is so already; who drives it cannot be seen from here."""
    number = summary.under_way
    if not number:
        return ""
    spec, counts = deployment.get("spec", {}), deployment.get("status", {})
    made_of = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
    wanted = spec.get("replicas", 0)
    seen = counts.get("observedGeneration", 0) >= deployment.get("metadata", {}).get("generation", 0)
    there = {counts.get(key, 0) for key in ("replicas", "updatedReplicas", "availableReplicas")} == {wanted}
    answers = seen and there and made_of.get("nbdeploy.dev/revision") == str(number)
    return (
        f"revision {number} {'answers, but its deploy has not ended' if answers else 'is being rolled out'} (if that "
        f"deploy was ended half-way, deploy again, or go back: nbdeploy rollback {summary.name} {summary.serving})"
    )
