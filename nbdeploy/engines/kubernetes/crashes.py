"""Why a Replica ended, or does not answer its probes, in words."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Any

from nbdeploy.engines.kubernetes.finding import Case, Finding, condition, quoted, sentence
from nbdeploy.engines.kubernetes.pulling import unstarted
from nbdeploy.engines.kubernetes.workload import memory_request
from nbdeploy.errors import UsageError
from nbdeploy.spec import memory_bytes

_LOAD_FAILED = 3  # exit status of the server where the Bundle does not load
_SIGNALED = 128  # a shell's way to tell a signal in an exit status, and Kubernetes' too
_GIB = 2**30
_OWN_WORDS = "nbdeploy: this Replica cannot start: "  # what the server prints last (nbdeploy_server.failure)
_UNREAD = "Error on reading termination message"
_NATIVE = {signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE}
_VERSIONS = r"unpickl|Can't get attribute|cannot be read by|incompatible (?:pickle|version)|InconsistentVersion"
_DISRUPTIONS = {
    "PreemptionByScheduler": "a pod of higher priority took its place",
    "DeletionByTaintManager": "its node went away or was closed (a reclaimed spot node, for example)",
    "EvictionByEvictionAPI": "its node is being emptied",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node ran short of something or shuts down",
}


def ended(case: Case) -> Finding | None:
    """Say why a pod's container ended; None where it did not, or may do better this time."""
    last = _last(case)
    if last is None or case.state.get("ready"):
        return None
    finding = _ended(case, last)
    # The first restart comes at once: that it runs again says nothing where it must end again.
    return finding if finding.fatal or "running" not in (case.state.get("state") or {}) else None


def restarted(case: Case) -> Finding | None:
    """Say why a container that runs again had ended before."""
    last = _last(case)
    return _ended(case, last) if last is not None else None


def _last(case: Case) -> Mapping[str, Any] | None:
    """Return how the container ended last; of two ends alike, the one whose message could be read."""
    ends = [(case.state.get(key) or {}).get("terminated") for key in ("state", "lastState")]
    rows: list[Mapping[str, Any]] = [row for row in ends if row]
    if not rows:
        return None
    return next((row for row in rows if row.get("exitCode") == rows[0].get("exitCode") and _message(row)), rows[0])


def _message(end: Mapping[str, Any]) -> str:
    message = str(end.get("message") or "")
    return "" if message.startswith(_UNREAD) else message


def _ended(case: Case, end: Mapping[str, Any]) -> Finding:
    code, message = int(end.get("exitCode", 0)), _message(end)
    if end.get("reason") == "OOMKilled":
        return case.found("oom", _oom(case), fatal=True)
    if end.get("reason") in {"StartError", "ContainerCannotRun"}:
        return unstarted(case, message)
    if probe := _probed(case, code, message):
        return probe
    told = _told(case, message)
    if _OWN_WORDS in message:  # the server knows better than its last lines do
        reason, *lines = message.rpartition(_OWN_WORDS)[2].strip().splitlines() or [""]
        words = f"A Replica of {case.name} cannot start: {reason}{quoted(chr(10).join(lines))}"
        return case.found(told.row if told else "crash", words, fatal=True)
    if told:
        return told
    how = _how(case, code)
    row = "killed" if code > _SIGNALED else "crash"
    # A first crash without a word may be an accident; one that tells its reason will tell it again.
    fatal = code == _LOAD_FAILED or bool(message and code) or case.waiting[0] == "CrashLoopBackOff"
    if code - _SIGNALED in _NATIVE:
        row, fatal = "native", True
    said = f" Its last lines:{quoted(message)}" if message else f" nbdeploy logs {case.name} shows what it printed."
    return case.found(row, f"{how}{said}", fatal=fatal)


def _how(case: Case, code: int) -> str:
    restarts = int(case.state.get("restartCount") or 0)
    often = f", {restarts + 1} times so far" if restarts else ""
    if code == 0:
        return f"A Replica of {case.name} ended by itself, with status 0{often}."
    if code <= _SIGNALED:
        while_loading = " while it loaded the Bundle" if code == _LOAD_FAILED else ""
        return f"A Replica of {case.name} exited with status {code}{while_loading}{often}."
    try:
        number = signal.Signals(code - _SIGNALED)
    except ValueError:
        return f"A Replica of {case.name} exited with status {code}{often}."
    why = ""
    if number is signal.SIGKILL:
        why = f" (usually: out of memory; it has {_size(case.asked('memory'))}, --memory gives more)"
    elif number in _NATIVE:
        why = (
            ": compiled code of a package does not suit the node's processor or another package. Compare the "
            "versions, or choose other nodes (node_selector)"
        )
    return f"A Replica of {case.name} was killed by {number.name}{why}{often}."


def _told(case: Case, message: str) -> Finding | None:
    """Say what the last lines of a Replica are known to mean."""
    if re.search(r"CUDA out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY", message):
        words = (
            f"The GPU of a Replica of {case.name} has too little memory (this is not --memory): take a larger one "
            f"(--gpu-type), a smaller batch, or weights in half precision.{quoted(message)}"
        )
        return case.found("cuda-memory", words, fatal=True)
    if match := re.search(r"No module named '?([\w.]+)", message):
        top = match[1].partition(".")[0]
        words = (
            f"The module {top} is not in the Image of {case.name}: the notebook had it from somewhere that the deploy "
            f"did not see. Add the package that brings it: --pip {top.replace('_', '-')}.{quoted(message)}"
        )
        return case.found("module", words, fatal=True)
    if re.search(_VERSIONS, message):
        words = (
            f"A Replica of {case.name} cannot read what the notebook stored: the versions of a package differ between "
            "the notebook and the Image. Restart the kernel, so that it runs what is installed, and deploy "
            f"again.{quoted(message)}"
        )
        return case.found("versions", words, fatal=True)
    return None


def _probed(case: Case, code: int, message: str) -> Finding | None:
    """Say that the kubelet ended a container because it did not answer."""
    event = case.event("Killing")
    # The server ends with 0 where it still can; other statuses are its own.
    text = event.get("message", "") if event and (code == 0 or code > _SIGNALED) else ""
    if "startup probe" in text:
        probe = case.container.get("startupProbe") or {}
        limit = int(probe.get("periodSeconds", 10)) * int(probe.get("failureThreshold", 3))
        words = (
            f"A Replica of {case.name} was not ready within {limit} s of its start, so the cluster ended it. nbdeploy "
            f"logs {case.name} shows how far it came.{quoted(message)}"
        )
        return case.found("startup", words, fatal=True)
    if "liveness probe" in text:
        words = (
            f"A Replica of {case.name} answered nothing for about a minute, so the cluster restarted it: it hung, or "
            f"its node was overloaded. nbdeploy logs {case.name} shows what it did.{quoted(message)}"
        )
        return case.found("liveness", words, fatal=case.waiting[0] == "CrashLoopBackOff")
    return None


def _oom(case: Case) -> str:
    asked = case.asked("memory")
    weights = f" Its weights alone are {_size(str(case.weights))}." if case.weights else ""
    need = max(2 * _bytes(asked), memory_request(case.weights, int(case.asked("nvidia.com/gpu") or 0)))
    more = f"{-(-need // _GIB)}Gi"
    return (
        f"A Replica of {case.name} used more than its {_size(asked)} of memory and was killed (OOMKilled).{weights} "
        f"Give it more: --memory {more}"
    )


def _bytes(quantity: str) -> int:
    try:
        return memory_bytes(quantity)
    except UsageError:
        return 0


def _size(quantity: str) -> str:
    size = _bytes(quantity)
    if not size:
        return quantity or "unlimited memory"
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"


def lost(case: Case) -> Finding | None:
    """Say that a pod was taken away, or its node was; the Deployment makes another one by itself."""
    disruption = condition(case.pod, "DisruptionTarget")
    if disruption.get("status") == "True":
        why = _DISRUPTIONS.get(disruption.get("reason", ""), sentence(disruption.get("message", "")).rstrip("."))
        return case.found("disrupted", f"A Replica of {case.name} is being replaced: {why}.", fatal=False)
    if case.event("Preempted"):
        why = _DISRUPTIONS["PreemptionByScheduler"]
        return case.found("disrupted", f"A Replica of {case.name} is being replaced: {why}.", fatal=False)
    if case.status.get("reason") == "Evicted":
        why = sentence(case.status.get("message", ""))
        words = f"A node put a Replica of {case.name} out: {why} Another one is started."
        if "ephemeral" in words:
            words += " It wrote more to disk than it may: keep files in /tmp small."
        return case.found("evicted", words, fatal=False)
    if case.status.get("phase") == "Failed" and not case.status.get("containerStatuses"):
        why = sentence(case.status.get("message", ""))
        words = f"A node did not admit a Replica of {case.name}: {why} It is tried again."
        return case.found("rejected", words, fatal=False)
    if case.event("NodeNotReady") and condition(case.pod, "Ready").get("status") == "False":
        node = (case.pod.get("spec") or {}).get("nodeName", "")
        words = f"The node {node} of a Replica of {case.name} does not answer; another Replica starts elsewhere soon."
        return case.found("node-lost", words, fatal=False)
    return None
