"""Why a container cannot be made from its Image, in words."""

from __future__ import annotations

import re

from nbdeploy.engines.kubernetes.finding import Case, Finding, condition, seconds, sentence, times

_PULLS = {"ErrImagePull", "ImagePullBackOff"}
_TRIES = 3  # pulls that failed before a connection counts as broken
_PATIENCE = 20.0  # seconds before it does so after fewer
_UNREACHABLE = (
    r"no such host|connection refused|connection reset|timed out|timeout|deadline exceeded|no route to host|"
    r"network is unreachable|\bEOF\b|\b50[0234]\b"
)
_PASSING = r"failed to sync (secret|configmap) cache|timed out|deadline exceeded|is reserved for"  # a busy node's words


def unmade(case: Case) -> Finding | None:
    """Say why a pod's container waits to be made; None where it does not."""
    reason, message = case.waiting
    if reason in _PULLS:
        return _unpulled(case, message)
    image = case.container.get("image", "")
    if reason == "InvalidImageName":
        words = f"The Image's name {image} is not valid: {sentence(message)} Correct `registry` in the settings."
        return case.found("image-name", words, fatal=True)
    if reason == "ErrImageNeverPull":
        words = (
            f"The node does not have the Image {image}, and something in the cluster forbids it to pull: "
            f"{sentence(message)}"
        )
        return case.found("image-never", words, fatal=True)
    if reason in {"RunContainerError", "StartError"}:
        return unstarted(case, message)
    if reason in {"CreateContainerConfigError", "CreateContainerError"}:
        return _unconfigured(case, message)
    return _unmounted(case) if reason == "ContainerCreating" else None


def unstarted(case: Case, message: str) -> Finding:
    """Say that a container's program could not be started."""
    program = re.search(r'exec: "([^"]+)"', message)
    what = f"its program {program[1]} is not in the Image" if program else sentence(message).rstrip(".")
    words = (
        f"A Replica of {case.name} cannot be started: {what}. The base image needs a Python of the notebook's version "
        "as python3: leave out base_image, or choose another."
    )
    return case.found("start-error", words, fatal=True)


def _unpulled(case: Case, message: str) -> Finding:
    image = case.container.get("image", "")
    event = case.event("Failed")
    if event and "Failed to pull image" in event.get("message", "") and ": " not in message:
        message = event["message"]  # older kubelets say only that they back off
    row, fatal, words = _why(case, re.sub(r'^Back-off pulling image "[^"]*": ErrImagePull: ', "", message), image)
    if fatal is None:
        fatal = _persists(case)
    return case.found(row, words, fatal=fatal)


def _persists(case: Case) -> bool:
    """Whether enough was tried; counted rather than timed where there are events, because clocks differ."""
    failed = [times(e) for e in case.events if e.get("reason") == "Failed" and "Failed to pull" in e.get("message", "")]
    began = seconds(condition(case.pod, "PodScheduled").get("lastTransitionTime")) or case.now
    return sum(failed) >= _TRIES or (case.now - began > _PATIENCE and sum(failed) != 1)


def _why(case: Case, text: str, image: str) -> tuple[str, bool | None, str]:
    """Return row, whether it is fatal (None: once it persists) and words."""
    cannot = f"The cluster's node cannot pull the Image of {case.name} ({image})"
    registry = image.partition("/")[0]
    cause = text.replace("failed to pull and unpack image", "").split(": ")
    last = sentence(": ".join(cause[-2:])).rstrip(".")
    if "no match for platform" in text:
        return (
            "pull-platform",
            True,
            f"{cannot}: it was made for another kind of processor. Set `platform` in the settings.",
        )
    if "no space left" in text:
        return "pull-disk", None, f"{cannot}: the node's disk is full. Ask who runs the cluster to look after it."
    if re.search(r"x509|certificate|HTTP response to HTTPS client", text):
        words = (
            f"{cannot}: the node does not trust the registry {registry} ({last}). The node's container runtime must be "
            "told about it (its certificate, or that it speaks plain HTTP): ask who runs the cluster."
        )
        return "pull-tls", True, words
    if re.search(r"\b429\b|toomanyrequests|too many requests", text, re.IGNORECASE):
        return (
            "pull-rate",
            None,
            f"{cannot}: the registry {registry} allows no more pulls for now. The node tries again.",
        )
    denied = r"\b40[13]\b|unauthorized|denied|forbidden|authorization failed|no basic auth"
    if re.search(denied, text, re.IGNORECASE):
        return "pull-denied", True, f"{cannot}: the registry {registry} refuses it (401 or 403). {_secret_hint(case)}"
    return _absent_or_away(text, cannot, registry, last)


def _absent_or_away(text: str, cannot: str, registry: str, last: str) -> tuple[str, bool | None, str]:
    if re.search(_UNREACHABLE, text):
        words = (
            f"{cannot}: it does not reach the registry {registry} ({last}). It is reached from the notebook; inside "
            "the cluster it may have another name: check `registry` in the settings. The node tries again."
        )
        return "pull-unreachable", None, words
    if re.search(r"not found|manifest unknown|name unknown|NotFound", text, re.IGNORECASE):
        words = (
            f"{cannot}: the registry that the node knows as {registry} does not have it. From inside the cluster that "
            "name may lead elsewhere than from the notebook, or the Image was removed: check `registry` in the "
            "settings, then deploy again."
        )
        return "pull-not-found", True, words
    return "pull-failed", None, f"{cannot}: {sentence(text)}"


def _secret_hint(case: Case) -> str:
    if event := case.event("FailedToRetrieveImagePullSecret"):
        names = re.search(r"\((.+?)\)", event.get("message", ""))
        return (
            f"The pull secret {names[1] if names else ''} is not in the namespace: have it made, or set "
            "image_pull_secret."
        )
    given = [row.get("name", "") for row in (case.pod.get("spec") or {}).get("imagePullSecrets") or ()]
    if given:
        return f"Its pull secret {', '.join(given)} holds no password that this registry takes for this repository."
    return "Set image_pull_secret in the settings to the name of a Secret with a password for it."


def _unconfigured(case: Case, message: str) -> Finding:
    if match := re.search(r'(secret|configmap) "([^"]+)" not found', message):
        place = case.pod["metadata"].get("namespace", "")
        words = (
            f"The {'Secret' if match[1] == 'secret' else 'ConfigMap'} {match[2]} that Replicas of {case.name} take "
            f"values from is not in the namespace {place}. If it is yours (--secret NAME=SECRET/KEY), make it: kubectl "
            f"-n {place} create secret generic {match[2]} --from-literal=KEY=…; else deploy again."
        )
        return case.found("secret-missing", words, fatal=True)
    if match := re.search(r"couldn't find key (\S+) in (Secret|ConfigMap) (?:[^/\s]+/)?(\S+)", message):
        words = (
            f"The {match[2]} {match[3]} has no key {match[1]}, which Replicas of {case.name} take a value from. Add "
            "it, or correct --secret NAME=SECRET/KEY."
        )
        return case.found("secret-missing", words, fatal=True)
    if "run as root" in message or "non-numeric user" in message:
        words = (
            f"The cluster does not start the Image of {case.name}, because it would run as root; nbdeploy's own do "
            "not: something in the cluster changed the pod. Ask who runs the cluster."
        )
        return case.found("runs-as-root", words, fatal=True)
    words = f"The container of {case.name} cannot be made: {sentence(message)}"
    if re.search(_PASSING, message):
        return case.found("config", f"{words} The node tries again.", fatal=False)
    return case.found("config", words, fatal=True)


def _unmounted(case: Case) -> Finding | None:
    event = case.event("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
    if event is None:
        return None
    what = "a volume" if event["reason"] != "FailedCreatePodSandBox" else "the network"
    node = (case.pod.get("spec") or {}).get("nodeName", "")
    words = (
        f"The node {node} cannot set up {what} for {case.name}: {sentence(event.get('message', ''))} It tries again."
    )
    return case.found("mount", words, fatal=False)
