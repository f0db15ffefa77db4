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
    if not ready:
        return (Phase.FAILED, trouble) if trouble else (Phase.STARTING, "no replica is ready yet")
    under_way = f"revision {summary.under_way} is being rolled out" if summary.under_way else ""
    fewer = (trouble or "the others are starting") if ready < desired else ""
    parts = [under_way, f"{ready} of {desired} replicas are ready: {fewer}" if fewer else ""]
    return Phase.READY, "; ".join(part for part in parts if part)
