"""Why no pod is made, or no node takes it, in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from nbdeploy.engines.kubernetes.finding import Case, Finding, condition, seconds, sentence

_GPU = "nvidia.com/gpu"
_ASK = "Ask who runs the cluster"
_LESS = {  # what a user changes to ask for less
    "cpu": "--cpu",
    "memory": "--memory",
    _GPU: "--gpu",
    "pods": "--min",
    "ephemeral-storage": "fewer or smaller --file and --model-from files",
}
_SETTLES = 15.0  # seconds in which what was just applied comes to be known everywhere


def refused(message: str, name: str, namespace: str, *, age: float, ending: bool) -> Finding:
    """Say why the API server refuses to make a pod.

    Args:
        message: of the ReplicaSet's condition or event.
        name: of the Endpoint.
        namespace: of the Endpoint.
        age: seconds for which it has been refused.
        ending: old pods of the Endpoint still end, and will give back what they hold.
    """
    reason = re.sub(r'^(Error creating: )?(pods "[^"]*" is forbidden: )?', "", message)
    if "exceeded quota" in reason:
        return Finding("quota", _quota(reason, name, namespace), fatal=not ending)
    if match := re.match(r"failed quota: ([^:]+): must specify (.*)", reason):
        words = (
            f"The quota {match[1]} of the namespace {namespace} wants every container to say how much it needs of: "
            f"{match[2]}. nbdeploy does not say it. {_ASK} for a LimitRange with defaults in {namespace}."
        )
        return Finding("quota-wants", words, fatal=True)
    if match := re.search(
        r"(maximum|minimum) (\S+) usage per (\w+) is (\S+), but (limit|request) is (\S+?)[.,\]]?(?= |$)", reason
    ):
        bound, what, per, value, _, given = match.groups()
        option = _LESS.get(what, f"the {what}")
        words = (
            f"A LimitRange of the namespace {namespace} allows a {per.lower()} "
            f"{'at most' if bound == 'maximum' else 'at least'} {value} of {what}; {name} asks for {given}. Choose "
            f"another {option}, or ask who runs the cluster."
        )
        return Finding("limit-range", words, fatal=True)
    return _forbidden(reason, name, namespace, age)


def _forbidden(reason: str, name: str, namespace: str, age: float) -> Finding:
    if match := re.match(r'violates PodSecurity "([^"]*)": (.*)', reason):
        words = (
            f"The namespace {namespace} enforces Pod Security {match[1]}, and Replicas of {name} do not meet it: "
            f"{sentence(match[2])} Something in the cluster changes them: nbdeploy's own pods are made for "
            f"'restricted'. {_ASK} which webhook that is."
        )
        return Finding("pod-security", words, fatal=True)
    if match := re.search(r'admission webhook "([^"]+)" denied the request:? ?(.*)', reason):
        words = (
            f"The cluster's own rule {match[1]} refuses Replicas of {name}: {sentence(match[2] or 'no reason given')} "
        )
        return Finding("webhook", f"{words}{_ASK} what it asks for.", fatal=True)
    if match := re.search(r'failed calling webhook "([^"]+)"', reason):
        words = (
            f"The cluster asks its webhook {match[1]} before it makes a Replica, and that does not answer: "
            f"{sentence(reason)} {_ASK} to look after it."
        )
        return Finding("webhook", words, fatal=age > _SETTLES)
    if match := re.search(r'serviceaccount "([^"]+)" not found', reason):
        words = (
            f"The ServiceAccount {match[1]} of {name} is gone from the namespace {namespace}: somebody deleted it. "
            "Deploy again: that makes it anew."
        )
        return Finding("service-account", words, fatal=age > _SETTLES)
    words = f"The cluster refuses to make Replicas of {name} in the namespace {namespace}: {sentence(reason)} "
    return Finding("refused", f"{words}{_ASK} for what it asks for.", fatal=age > _SETTLES or "PriorityClass" in reason)


def _quota(reason: str, name: str, namespace: str) -> str:
    match = re.search(r"exceeded quota: (.+?), requested: (.*?), used: (.*?), limited: (.*)", reason)
    if not match:
        return f"A quota of the namespace {namespace} has no room for {name}: {sentence(reason)}"
    asked, used, limit = (
        dict(pair.split("=", 1) for pair in part.split(",") if "=" in pair) for part in match.groups()[1:]
    )
    parts, options = [], []
    for resource, value in asked.items():
        plain = re.sub(r"^(requests|limits)\.", "", resource)
        parts.append(f"{resource}: asked {value}, used {used.get(resource, '?')} of {limit.get(resource, '?')}")
        options.append(_LESS.get(plain, plain))
    return (
        f"The quota {match[1]} of the namespace {namespace} has no room for another Replica of {name} "
        f"({'; '.join(parts)}). Ask for less ({', '.join(dict.fromkeys(options))}), free some (nbdeploy ls tells what "
        "runs), or ask who runs the cluster for more."
    )


def unplaced(case: Case) -> Finding | None:
    """Say why no node takes a pod; None where one did."""
    scheduled = condition(case.pod, "PodScheduled")
    if scheduled.get("status") != "False":
        return None
    message = scheduled.get("message", "")
    waits = max(0.0, case.now - (seconds(case.pod["metadata"].get("creationTimestamp")) or case.now))
    gpus = _GPU if case.asked(_GPU) and f"Insufficient {_GPU}" in message else ""
    if _grows(case):
        kind = "A GPU node" if gpus else "A node"
        return case.found("scale-up", f"{kind} is being added for {case.name} ({waits:.0f} s so far).", fatal=False)
    if gpus and case.holders:
        cause = (
            f"No spare GPU for {case.name}: its old version holds {'it' if len(case.holders) == 1 else 'them'} "
            f"({', '.join(case.holders)}), and ends only when the new one is ready."
        )
        way_out = (
            f"To replace it in place instead, run nbdeploy stop {case.name} and deploy again: it is down for about as "
            "long as its last load took."
        )
        return case.waits("gpu-held", cause, f"It waits until a GPU is free. {way_out}", way_out)
    claim = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if claim:
        cause = f"The volume {claim[1]} that a Replica of {case.name} asks for is not there."
        return case.waits("unschedulable", cause, f"{_ASK}.", f"{_ASK}.")
    why = "; ".join(_reasons(case, message)) or sentence(message)
    more = " The cluster's autoscaler adds no node for it." if case.event("NotTriggerScaleUp") else ""
    meanwhile = "It waits for room; ask for less, or for such a node."
    listed = "kubectl get nodes -L nvidia.com/gpu.product lists the types there are."
    if typed := "not as asked for (--gpu-type" in why:
        meanwhile = f"It waits for such a node, nbdeploy cancel ends that; {listed}"
    way_out = (
        f"Deploy again {'with another --gpu-type' if typed else 'asking for less'}, or ask who runs the cluster for "
        f"such a node. {listed if typed else 'nbdeploy cluster check tells what its nodes have.'}"
    )
    cause = f"No node takes a Replica of {case.name}: {why}.{more}"
    return case.waits("no-gpu" if gpus else "unschedulable", cause, meanwhile, way_out)


def given_up(finding: Finding, waited: float) -> Finding:
    """Return the finding of a node that is not waited for any longer.

    Args:
        finding: one that has a cause.
        waited: seconds.
    """
    minutes = waited >= 120  # noqa: PLR2004 - so that none reads 0 or 1
    span = f"{waited / 60:.0f} minutes" if minutes else f"{waited:.0f} s"
    words = f"Given up after {span} without a node that fits. {finding.cause} {finding.way_out}"
    return dataclasses.replace(finding, words=words, fatal=True)


def _grows(case: Case) -> bool:
    """Whether the newest word of the cluster's autoscaler is that it adds a node."""
    event = case.event("TriggeredScaleUp", "NotTriggerScaleUp", "Nominated")
    return event is not None and event["reason"] != "NotTriggerScaleUp"


def _reasons(case: Case, message: str) -> list[str]:
    match = re.match(r"(\d+)/(\d+) nodes are available: (.*?)(?:\. (?:preemption|no new claims)|\.? ?$)", message)
    if not match:
        return []
    found = []
    for count, reason in re.findall(r"(\d+) (.+?)(?=, \d+ [A-Zn]|$)", match[3]):
        nodes = f"{count} of {match[2]} nodes"
        found.append(f"{nodes} {_reason(case, reason.rstrip('.'))}")
    return found


def _reason(case: Case, reason: str) -> str:
    if reason.startswith("Insufficient "):
        resource = reason.removeprefix("Insufficient ")
        if resource == _GPU:
            asked = case.asked(_GPU)
            return f"have {'no GPU' if asked == '1' else f'fewer than {asked} GPUs'} free (--gpu {asked})"
        option = _LESS.get(resource, "")
        return f"have less {resource} free than the {case.asked(resource)} asked for" + (
            f" ({option})" if option else ""
        )
    if "affinity/selector" in reason:
        return f"are not as asked for ({_wants(case.pod.get('spec') or {})})"
    if "taint" in reason:
        taint = re.search(r"\{(.+?)\}", reason)
        which = f" ({taint[1]})" if taint else ""
        return f"are kept for others by a taint{which}, which tolerations in the settings may allow"
    if "unschedulable" in reason:
        return "are closed to new pods"
    if "Too many pods" in reason:
        return "are full"
    return f"say: {reason}"


def _wants(spec: Mapping[str, Any]) -> str:
    parts = [f"node_selector {key}={value}" for key, value in (spec.get("nodeSelector") or {}).items()]
    affinity = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    for term in (affinity or {}).get("nodeSelectorTerms", [])[:1]:
        parts += [f"--gpu-type {row['values'][0]}" for row in term.get("matchExpressions", []) if row.get("values")]
    return ", ".join(dict.fromkeys(parts)) or "labels"
