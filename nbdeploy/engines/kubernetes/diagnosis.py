"""Why a roll-out does not end, or an Endpoint is not ready: a pure function over objects and events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbdeploy.engines.kubernetes.crashes import ended, lost, restarted
from nbdeploy.engines.kubernetes.finding import Case, Finding, condition, seconds
from nbdeploy.engines.kubernetes.placement import given_up, refused, unplaced
from nbdeploy.engines.kubernetes.pulling import unmade

__all__ = ["Finding", "Snapshot", "complete", "diagnose", "given_up", "newest_pods", "unready"]

Thing = Mapping[str, Any]

_REVISION = "deployment.kubernetes.io/revision"
_HASH = "pod-template-hash"
_GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class Snapshot:
    """One moment of an Endpoint, as the API server gives it: its Deployment, what that made, and their events."""

    deployment: Thing | None
    replicasets: tuple[Thing, ...] = ()
    pods: tuple[Thing, ...] = ()
    events: tuple[Thing, ...] = ()


def complete(snapshot: Snapshot) -> bool:
    """Whether the newest Replicas, all of them and no others, are there and available."""
    deployment = snapshot.deployment
    if deployment is None or not _observed(deployment):
        return False
    status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    counts = {status.get(key, 0) for key in ("replicas", "updatedReplicas", "availableReplicas")}
    return counts == {wanted} and condition(deployment, "Progressing").get("reason") == "NewReplicaSetAvailable"


def newest_pods(snapshot: Snapshot) -> tuple[Thing, ...]:
    """Return the pods of the newest pod template, without those that are ending; () before there is one."""
    newest = _newest(snapshot)
    return tuple(pod for pod in _pods_of(snapshot, newest) if not _ending(pod)) if newest else ()


def diagnose(snapshot: Snapshot, *, now: float, weights: int = 0) -> Finding | None:
    """Say what keeps the newest Replicas from being ready; None where nothing is known to.

    Args:
        snapshot: of the Endpoint.
        now: Unix seconds.
        weights: bytes of the Bundle's weights, for words on memory.
    """
    if snapshot.deployment is None or complete(snapshot):
        return None
    newest = _newest(snapshot)
    found = [_unmade_set(snapshot, now)] if newest is None else [_refused(snapshot, newest, now)]
    holders = _holders(snapshot, newest)
    for pod in _pods_of(snapshot, newest) if newest else ():
        case = _case(snapshot, pod, now, weights, holders)
        found += [lost(case)] if _ending(pod) else [look(case) for look in _looks(case)]
    findings = [finding for finding in found if finding is not None]
    worst = next((f for f in findings if f.fatal), findings[0] if findings else None)
    return worst if worst is not None and worst.fatal else _overdue(snapshot, worst) or worst


def unready(snapshot: Snapshot, *, now: float, weights: int = 0) -> Finding | None:
    """Say why a running Endpoint has fewer Replicas than it should; None where it has all.

    Unlike `diagnose` it looks at Replicas of every Revision, and at why those that start again had ended.
    """
    if snapshot.deployment is None:
        return None
    wanted = snapshot.deployment["spec"].get("replicas", 1)
    if (snapshot.deployment.get("status") or {}).get("availableReplicas", 0) >= wanted:
        return None
    found = diagnose(snapshot, now=now, weights=weights)
    for pod in snapshot.pods if found is None else ():
        if condition(pod, "Ready").get("status") != "True":
            case = _case(snapshot, pod, now, weights, ())
            looks = (lost,) if _ending(pod) else (*_looks(case), restarted)
            found = found or next((finding for look in looks if (finding := look(case))), None)
    return found


def _looks(case: Case) -> tuple[Callable[[Case], Finding | None], ...]:
    # A pod that failed as a whole says so itself; how its container ended is a consequence.
    return (lost,) if case.status.get("phase") == "Failed" else (unplaced, unmade, ended, lost)


def _observed(deployment: Thing) -> bool:
    seen = (deployment.get("status") or {}).get("observedGeneration", 0)
    return int(seen) >= int(deployment["metadata"].get("generation", 0))


def _newest(snapshot: Snapshot) -> Thing | None:
    """Return the ReplicaSet of the Deployment's present template; None until it is made and seen."""
    deployment = snapshot.deployment
    if deployment is None or not _observed(deployment):
        return None
    wanted = (deployment["spec"]["template"].get("metadata") or {}).get("labels") or {}
    alike = [one for one in snapshot.replicasets if wanted.items() <= (one["metadata"].get("labels") or {}).items()]
    number = (deployment["metadata"].get("annotations") or {}).get(_REVISION)
    exact = [one for one in alike if _number(one) == int(number)] if number else alike
    return max(exact, key=_number, default=None)


def _number(replicaset: Thing) -> int:
    return int((replicaset["metadata"].get("annotations") or {}).get(_REVISION, 0))


def _pods_of(snapshot: Snapshot, replicaset: Thing | None) -> tuple[Thing, ...]:
    mark = _mark(replicaset) if replicaset else None
    return tuple(pod for pod in snapshot.pods if _mark(pod) == mark)


def _mark(thing: Thing) -> str | None:
    return (thing["metadata"].get("labels") or {}).get(_HASH)


def _ending(pod: Thing) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _case(snapshot: Snapshot, pod: Thing, now: float, weights: int, holders: tuple[str, ...]) -> Case:
    return Case(_name(snapshot), pod, _events(snapshot, pod), now, weights, holders)


def _name(snapshot: Snapshot) -> str:
    metadata = (snapshot.deployment or {}).get("metadata") or {}
    return str((metadata.get("labels") or {}).get("nbdeploy.dev/endpoint") or metadata.get("name", ""))


def _events(snapshot: Snapshot, thing: Thing) -> tuple[Thing, ...]:
    uid, name = thing["metadata"].get("uid"), thing["metadata"]["name"]

    def concerns(event: Thing) -> bool:
        about = event.get("involvedObject") or {}
        return bool(about.get("uid") == uid if about.get("uid") and uid else about.get("name") == name)

    return tuple(sorted(filter(concerns, snapshot.events), key=_when))


def _when(event: Thing) -> float:
    times = (event.get("lastTimestamp"), (event.get("series") or {}).get("lastObservedTime"), event.get("eventTime"))
    return max(seconds(time) for time in times)


def _holders(snapshot: Snapshot, newest: Thing | None) -> tuple[str, ...]:
    """Return names of older pods of this Endpoint that hold GPUs and are not told to end."""
    mark = _mark(newest) if newest else None
    old = (pod for pod in snapshot.pods if _mark(pod) != mark and not _ending(pod))
    return tuple(pod["metadata"]["name"] for pod in old if pod["spec"].get("nodeName") and _asks_gpu(pod))


def _asks_gpu(pod: Thing) -> bool:
    containers: Iterable[Thing] = pod["spec"].get("containers") or ()
    return any(_GPU in ((one.get("resources") or {}).get("limits") or {}) for one in containers)


def _refused(snapshot: Snapshot, newest: Thing, now: float) -> Finding | None:
    """Say why the newest ReplicaSet cannot make pods."""
    failure = condition(newest, "ReplicaFailure")
    if failure.get("status") != "True":
        return None
    age = max(0.0, now - (seconds(failure.get("lastTransitionTime")) or now))
    namespace = newest["metadata"].get("namespace", "")
    ending = any(_ending(pod) for pod in snapshot.pods)
    return refused(failure.get("message", ""), _name(snapshot), namespace, age=age, ending=ending)


def _unmade_set(snapshot: Snapshot, now: float) -> Finding | None:
    """Say why the Deployment cannot even make its ReplicaSet."""
    progress = condition(snapshot.deployment or {}, "Progressing")
    if progress.get("reason") != "ReplicaSetCreateError":
        return None
    namespace = (snapshot.deployment or {"metadata": {}})["metadata"].get("namespace", "")
    age = max(0.0, now - (seconds(progress.get("lastUpdateTime")) or now))
    return refused(progress.get("message", ""), _name(snapshot), namespace, age=age, ending=False)


def _overdue(snapshot: Snapshot, known: Finding | None) -> Finding | None:
    """Say that the Deployment's own deadline is over, with what was known to be in the way."""
    progress = condition(snapshot.deployment or {}, "Progressing")
    if progress.get("reason") != "ProgressDeadlineExceeded":
        return None
    limit = (snapshot.deployment or {"spec": {}})["spec"].get("progressDeadlineSeconds", 600)
    while_ = f"{limit / 60:.0f} minutes" if limit >= 120 else f"{limit} seconds"  # noqa: PLR2004 - so that none reads 0 or 1
    words = f"The Replicas of {_name(snapshot)} did not all become ready within {while_}."
    if known is not None and known.cause:
        return given_up(known, limit)
    if known is not None:
        return dataclasses.replace(known, words=f"{words} {known.words}", fatal=True)
    return Finding("deadline", f"{words} nbdeploy logs {_name(snapshot)} shows what the last ones printed.", fatal=True)
