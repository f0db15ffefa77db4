"""Objects and events in `recorded/` come from a real cluster (Kubernetes 1.34, containerd 1.6), made small."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbdeploy_server.failure import last_words

from nbdeploy.engines.kubernetes.diagnosis import Snapshot, complete, diagnose, given_up, newest_pods, unready
from nbdeploy.engines.kubernetes.finding import seconds

RECORDED = Path(__file__).with_name("recorded")
PULL = (
    'Back-off pulling image "I": ErrImagePull: failed to pull and unpack image "I": failed to resolve reference "I": '
)

Data = dict[str, Any]


def recorded(name: str) -> Data:
    """Return a record with its Deployment's deadline not yet over."""
    data: Data = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    conditions = data["deployment"]["status"]["conditions"]
    data["deployment"]["status"]["conditions"] = [row for row in conditions if row["type"] != "Progressing"]
    return data


def snapshot(data: Data) -> Snapshot:
    """Return a record as what the diagnosis takes."""
    lists = {key: tuple(data[key]) for key in ("replicasets", "pods", "events")}
    return Snapshot(data["deployment"], **lists)


def later(data: Data) -> float:
    """Return the second after the last event."""
    return max(seconds(event.get("lastTimestamp")) for event in data["events"]) + 1


def found(data: Data, **more: Any) -> tuple[str, bool, str]:
    """Return row, fatal and words of the diagnosis, which must find something."""
    finding = diagnose(snapshot(data), now=later(data), **more)
    assert finding is not None
    return finding.row, finding.fatal, finding.words


@pytest.mark.parametrize(
    ("record", "row", "fatal", "told"),
    [
        ("quota-gpu", "quota", True, ["quota team", "asked 2, used 0 of 1", "--gpu"]),
        ("quota-mem", "quota", True, ["pods: asked 1, used 2 of 2", "nbdeploy ls"]),
        ("quota-nocpu", "quota-wants", True, ["requests.cpu", "LimitRange"]),
        ("limitrange", "limit-range", True, ["at most 64Mi of memory", "asks for 128Mi", "--memory"]),
        ("pod-security", "pod-security", True, ["restricted:latest", "runAsNonRoot"]),
        ("sa", "service-account", True, ["ServiceAccount absent", "Deploy again"]),
        ("priority", "refused", True, ["no PriorityClass with name absent"]),
        ("no-gpu", "no-gpu", False, ["2 of 2 nodes have fewer than 9 GPUs free", "--gpu 9"]),
        ("hugecpu", "unschedulable", False, ["less cpu free than the 999 asked for", "--cpu"]),
        ("selector", "unschedulable", False, ["node_selector gpu=h100"]),
        ("pvc", "unschedulable", False, ["volume absent"]),
        ("img-notfound", "pull-not-found", True, ["127.0.0.1:5000/absent:1", "does not have it", "`registry`"]),
        ("img-refused", "pull-unreachable", True, ["127.0.0.1:5999", "connection refused"]),
        ("img-nohost", "pull-unreachable", True, ["registry.invalid", "no such host"]),
        ("img-name", "image-name", True, ["127.0.0.1:5000/Base:1", "must be lowercase"]),
        ("img-never", "image-never", True, ["forbids it to pull"]),
        ("crash", "crash", True, ["exited with status 3", "Traceback: no module named torch"]),
        ("exit7", "crash", True, ["exited with status 7", "4 times", "worker: unexpected state"]),
        ("module", "module", True, ["sklearn", "--pip sklearn"]),
        ("noexec", "start-error", True, ["/no/such/program", "base_image"]),
        ("oom", "oom", True, ["64 MiB", "OOMKilled", "--memory 1Gi"]),
        ("startup", "startup", True, ["within 5 s", "nbdeploy logs"]),
        ("liveness", "liveness", True, ["answered nothing", "nbdeploy logs"]),
        ("config-env", "secret-missing", True, ["Secret absent", "--secret", "create secret generic absent"]),
        ("config-key", "secret-missing", True, ["has no key absent"]),
        ("nonroot", "runs-as-root", True, ["run as root"]),
        ("mount", "mount", False, ["node node1", 'configmap "absent" not found']),
        ("evicted", "evicted", False, ["total limit of containers 10Mi", "Another one is started"]),
    ],
)
def test_recorded_failure(record: str, row: str, fatal: bool, told: list[str]) -> None:  # noqa: FBT001 - a table
    """Each failure of a real cluster is told by cause, object and next step, and ends a deploy only where it must."""
    data = recorded(record)
    assert not complete(snapshot(data))
    got_row, got_fatal, words = found(data)
    assert (got_row, got_fatal) == (row, fatal), words
    assert [part for part in told if part not in words] == [], words
    assert "  " not in words.split("\n")[0]
    assert words.split("\n")[0].endswith((".", ":", "Gi", "s."))


@pytest.mark.parametrize(
    ("message", "fatal"),
    [
        ("failed to sync secret cache: timed out waiting for the condition", False),
        ("context deadline exceeded", False),
        ('failed to reserve container name: name "server_pod" is reserved for "1f"', False),
        ("a value that no node takes", True),
    ],
)
def test_what_a_busy_node_says(message: str, fatal: bool) -> None:  # noqa: FBT001 - a table
    """A container that a node could not make for now is told, and waited for: the node tries again."""
    data = recorded("config-env")
    data["pods"][0]["status"]["containerStatuses"][0]["state"]["waiting"]["message"] = message
    row, got, words = found(data)
    assert (row, got) == ("config", fatal)
    assert message in words
    assert ("tries again" in words) == (not fatal)


@pytest.mark.parametrize(
    ("text", "row", "fatal", "told"),
    [
        ("pulling from host r.test failed with status code [manifests 1]: 401 Unauthorized", "pull-denied", True, ""),
        ("pulling from host r.test failed with status code [manifests 1]: 403 Forbidden", "pull-denied", True, ""),
        ("pull access denied, repository does not exist", "pull-denied", True, "image_pull_secret"),
        (
            'failed to do request: Head "https://r.test/v2/": x509: certificate signed by unknown authority',
            "pull-tls",
            True,
            "x509",
        ),
        ('Head "https://r.test/v2/": http: server gave HTTP response to HTTPS client', "pull-tls", True, "plain HTTP"),
        ("no match for platform in manifest: not found", "pull-platform", True, "`platform`"),
        ("write /var/lib/x: no space left on device", "pull-disk", None, "disk is full"),
        ("unexpected status code 429 Too Many Requests", "pull-rate", None, "tries again"),
        ('Head "https://r.test/v2/": dial tcp 10.0.0.1:443: i/o timeout', "pull-unreachable", None, "i/o timeout"),
        ("manifest unknown", "pull-not-found", True, "deploy again"),
        ("something new", "pull-failed", None, "something new"),
    ],
)
def test_pull_by_text(text: str, row: str, fatal: bool | None, told: str) -> None:  # noqa: FBT001 - a table
    """What a registry says decides; what may pass is fatal only after some tries (None)."""
    data = recorded("img-notfound")
    data["pods"][0]["status"]["containerStatuses"][0]["state"]["waiting"]["message"] = PULL + text
    failed = [event for event in data["events"] if "Failed to pull" in event["message"]]
    for tries in (1, 3):
        for event in failed:
            event["count"] = tries
        got_row, got_fatal, words = found(data)
        assert got_row == row
        assert got_fatal is (tries == 3 if fatal is None else fatal)
        assert told in words


def test_pull_secret_that_is_absent() -> None:
    """A registry that refuses, and a pull secret that is not there, are told together."""
    data = recorded("img-notfound")
    pod = data["pods"][0]
    pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"] = PULL + "401 Unauthorized"
    message = "Unable to retrieve some image pull secrets (nosecret); attempting to pull the image may not succeed."
    about = {"kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    data["events"].append({"reason": "FailedToRetrieveImagePullSecret", "message": message, "involvedObject": about})
    assert "pull secret nosecret is not in the namespace" in found(data)[2]


def test_old_kubelets_that_only_back_off() -> None:
    """Where the container's status says only that it backs off, the event tells the cause."""
    data = recorded("img-notfound")
    waiting = data["pods"][0]["status"]["containerStatuses"][0]["state"]["waiting"]
    waiting["message"] = 'Back-off pulling image "127.0.0.1:5000/absent:1"'
    data["events"] = [e for e in data["events"] if "Failed to pull" in e["message"] or e["reason"] != "Failed"]
    assert found(data)[:2] == ("pull-not-found", True)


def _end(data: Data, **terminated: Any) -> Data:
    status = data["pods"][0]["status"]["containerStatuses"][0]
    status.update(restartCount=0, state={"terminated": {"reason": "Error", **terminated}}, lastState={})
    return data


@pytest.mark.parametrize(
    ("terminated", "row", "fatal", "told"),
    [
        ({"exitCode": 7}, "crash", False, "exited with status 7"),
        ({"exitCode": 7, "message": "why\n"}, "crash", True, "\n    why"),
        ({"exitCode": 3}, "crash", True, "while it loaded the Bundle"),
        ({"exitCode": 0, "reason": "Completed"}, "crash", False, "ended by itself"),
        ({"exitCode": 137}, "killed", False, "was killed by SIGKILL (usually: out of memory"),
        ({"exitCode": 139}, "native", True, "SIGSEGV"),
        ({"exitCode": 132}, "native", True, "SIGILL"),
        ({"exitCode": 250}, "killed", False, "exited with status 250"),
        (
            {"exitCode": 3, "message": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"},
            "cuda-memory",
            True,
            "--gpu-type",
        ),
        (
            {"exitCode": 3, "message": "AttributeError: Can't get attribute 'Tree' on <module 'sklearn'>"},
            "versions",
            True,
            "versions of a package differ",
        ),
    ],
)
def test_first_end(terminated: Data, row: str, fatal: bool, told: str) -> None:  # noqa: FBT001 - a table
    """The first end of a Replica is told by its status and its last lines; it is fatal where those will come again."""
    got_row, got_fatal, words = found(_end(recorded("exit7"), **terminated))
    assert (got_row, got_fatal) == (row, fatal), words
    assert told in words


def test_the_servers_own_words_come_first() -> None:
    """What the server says of a failed load is the reason, without what was printed before it."""
    error = ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    message = f"Downloading\nTraceback (most recent call last):\n  noise\n{last_words(error)}\n"
    row, fatal, words = found(_end(recorded("exit7"), exitCode=3, message=message))
    assert (row, fatal) == ("module", True)
    assert words.startswith("A Replica of exit7 cannot start: ModuleNotFoundError: No module named 'sklearn'")
    assert "noise" not in words


def test_a_restart_does_not_hide_a_failed_load() -> None:
    """A container that runs again at once, before anybody saw it end, is known by how it ended last."""
    data = recorded("module")
    status = data["pods"][0]["status"]["containerStatuses"][0]
    status.update(lastState=status["state"], state={"running": {}}, ready=False)
    assert found(data)[:2] == ("module", True)
    status["ready"] = True
    assert diagnose(snapshot(data), now=later(data)) is None


def test_unreadable_message_is_passed_over() -> None:
    """A kubelet that could not read the last lines says so in their place; those of the end before are told."""
    data = recorded("module")
    status = data["pods"][0]["status"]["containerStatuses"][0]
    unread = {**status["state"]["terminated"], "message": "Error on reading termination message from logs: lstat: no"}
    status["lastState"] = status["state"]
    status["state"] = {"terminated": unread}
    assert found(data)[0] == "module"


def test_memory_words_know_the_weights() -> None:
    """An OOM kill names the weights, and what is suggested holds them."""
    assert "weights alone are 3.0 GiB" in found(recorded("oom"), weights=3 * 2**30)[2]
    assert "--memory 7Gi" in found(recorded("oom"), weights=3 * 2**30)[2]


def test_a_gpu_type_that_no_node_has() -> None:
    """A --gpu-type in other letters than the cluster's: the words tell where its own are listed."""
    data = recorded("selector")
    expressions = [{"key": "nvidia.com/gpu.product", "operator": "In", "values": ["nonsense", "NVIDIA-nonsense"]}]
    terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    for pod in data["pods"]:
        pod["spec"] = {**pod["spec"], "nodeSelector": {}, "affinity": affinity}
    _, fatal, words = found(data)
    assert not fatal
    assert "not as asked for (--gpu-type nonsense)" in words
    assert "kubectl get nodes -L nvidia.com/gpu.product" in words


def test_a_wait_that_is_given_up() -> None:
    """After all patience the words say for how long it was waited, why no node fits and what to do; not "it waits"."""
    data = recorded("no-gpu")
    finding = diagnose(snapshot(data), now=later(data))
    assert finding is not None
    assert "It waits" in finding.words
    after = given_up(finding, 300.0)
    assert after.fatal
    assert after.words.startswith("Given up after 5 minutes without a node that fits. No node takes a Replica of ")
    assert "--gpu" in after.words
    assert "Deploy again asking for less, or ask who runs the cluster for such a node." in after.words
    assert "waits" not in after.words


def test_growing_cluster() -> None:
    """While a node is being added that is told; when the autoscaler gives up, that is."""
    data = recorded("no-gpu")
    pod = data["pods"][0]["metadata"]
    about = {"kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
    data["events"].append(
        {"reason": "TriggeredScaleUp", "lastTimestamp": "2031-01-01T00:00:00Z", "involvedObject": about}
    )
    row, fatal, words = found(data)
    assert (row, fatal) == ("scale-up", False)
    assert "A GPU node is being added" in words
    data["events"].append(
        {"reason": "NotTriggerScaleUp", "lastTimestamp": "2031-01-01T00:01:00Z", "involvedObject": about}
    )
    assert "autoscaler adds no node" in found(data)[2]


def test_own_old_version_holds_the_gpu() -> None:
    """Where an older Replica of the same Endpoint holds the GPU, that and the way out are told."""
    data = recorded("no-gpu")
    old = copy.deepcopy(data["pods"][0])
    old["metadata"].update(name="old-1", uid="old")
    old["metadata"]["labels"]["pod-template-hash"] = "before"
    old["spec"]["nodeName"] = "node1"
    data["pods"].append(old)
    row, fatal, words = found(data)
    assert (row, fatal) == ("gpu-held", False)
    assert "old-1" in words
    assert "nbdeploy stop" in words
    old["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert found(data)[0] == "no-gpu"


@pytest.mark.parametrize(
    ("message", "row", "told"),
    [
        ('admission webhook "policy.test" denied the request: no latest tags', "webhook", "no latest tags"),
        (
            'Internal error: failed calling webhook "policy.test": Post: connection refused',
            "webhook",
            "does not answer",
        ),
    ],
)
def test_webhooks(message: str, row: str, told: str) -> None:
    """A webhook that refuses, or does not answer, is named."""
    data = recorded("sa")
    data["replicasets"][0]["status"]["conditions"][0]["message"] = message
    got_row, fatal, words = found(data)
    assert (got_row, fatal) == (row, True)
    assert "policy.test" in words
    assert told in words


def test_quota_that_ending_replicas_give_back() -> None:
    """While old pods still end, a quota that is used up is waited for."""
    data = recorded("quota-mem")
    data["pods"][0]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert found(data)[:2] == ("quota", False)


@pytest.mark.parametrize(
    "reason", ["PreemptionByScheduler", "DeletionByTaintManager", "EvictionByEvictionAPI", "DeletionByPodGC"]
)
def test_disruptions(reason: str) -> None:
    """A Replica that the cluster takes away is told, and replaced without failing the deploy."""
    data = recorded("mount")
    pod = data["pods"][0]
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": reason})
    row, fatal, words = found(data)
    assert (row, fatal) == ("disrupted", False)
    assert "is being replaced" in words


def test_lost_node() -> None:
    """A node that does not answer any more is told by its name."""
    data = recorded("readiness")
    pod = data["pods"][0]["metadata"]
    about = {"kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
    data["events"].append({"reason": "NodeNotReady", "message": "Node is not ready", "involvedObject": about})
    assert found(data)[:2] == ("node-lost", False)


def test_deadline_tells_what_was_in_the_way() -> None:
    """When the Deployment's own deadline is over, it ends the roll-out in the words of what was known."""
    data = json.loads((RECORDED / "no-gpu.json").read_text(encoding="utf-8"))
    row, fatal, words = found(data)
    assert (row, fatal) == ("no-gpu", True)
    assert "Given up after 20 s" in words
    assert found(json.loads((RECORDED / "readiness.json").read_text(encoding="utf-8")))[0] == "deadline"


def _not_observed(data: Data) -> None:
    data["deployment"]["metadata"]["generation"] += 1


def _not_seen(data: Data) -> None:
    data["deployment"]["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "99"


@pytest.mark.parametrize("change", [_not_observed, _not_seen])
def test_only_the_newest_replicas_count(change: Callable[[Data], None]) -> None:
    """Before the new ReplicaSet is made and seen, failures of old Replicas say nothing about the roll-out."""
    data = recorded("crash")
    change(data)
    assert diagnose(snapshot(data), now=later(data)) is None
    assert newest_pods(snapshot(data)) == ()


def test_old_pods_are_silent() -> None:
    """Crashes of older Replicas are not told beside the newest; the status of the Endpoint tells them."""
    data = recorded("crash")
    assert [pod["metadata"]["name"] for pod in newest_pods(snapshot(data))] == [data["pods"][0]["metadata"]["name"]]
    data["pods"][0]["metadata"]["labels"]["pod-template-hash"] = "before"
    assert diagnose(snapshot(data), now=later(data)) is None
    reason = unready(snapshot(data), now=later(data))
    assert reason is not None
    assert "exited with status 3" in reason.words


def test_complete() -> None:
    """Complete is what `kubectl rollout status` calls so: observed, all new, all available."""
    data = json.loads((RECORDED / "readiness.json").read_text(encoding="utf-8"))
    deployment = data["deployment"]
    generation = deployment["metadata"]["generation"]
    done = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
    deployment["status"] = {
        "observedGeneration": generation,
        "replicas": 1,
        "updatedReplicas": 1,
        "availableReplicas": 1,
        "conditions": [done],
    }
    assert complete(snapshot(data))
    assert diagnose(snapshot(data), now=0) is None
    assert unready(snapshot(data), now=0) is None
    for change in (
        {"observedGeneration": generation - 1},
        {"replicas": 2},
        {"updatedReplicas": 0},
        {"availableReplicas": 0},
        {"conditions": [{**done, "reason": "ReplicaSetUpdated"}]},
    ):
        changed = {**deployment, "status": {**deployment["status"], **change}}
        assert not complete(Snapshot(changed)), change
    assert not complete(Snapshot(None))
    stopped = {**deployment, "spec": {**deployment["spec"], "replicas": 0}}
    assert not complete(Snapshot(stopped))
    assert complete(Snapshot({**stopped, "status": {"observedGeneration": generation, "conditions": [done]}}))
