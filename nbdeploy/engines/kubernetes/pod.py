"""The pod template of an Endpoint: the one object whose every change restarts Replicas."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from nbdeploy.engines.kubernetes.workload import (
    CONTAINER,
    PROBES_PORT,
    USERS_PORT,
    Workload,
    label_value,
    labels,
    selector,
)
from nbdeploy.oci.image import USER
from nbdeploy.spec import memory_bytes

_USER, _GROUP = map(int, USER.split(":"))
_MIB, _GIB = 2**20, 2**30
_STARTUP = 1200  # seconds to unpack, load and warm up
_LONGEST_DRAIN = 3  # times `drain` that a Replica takes connections where callers go on to come: listening.LONGEST
_STEPS_DOWN = 10  # seconds from the last answer to the end of the process, beyond drain and timeout
_NODE_LOST = 30  # seconds on a node that is gone until a successor starts elsewhere; Kubernetes' own default is 300
_SPOT = (
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
_VARIANTS = {  # what NVIDIA's node labels call cards that people know by a short name
    "a100": ("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100-80GB-PCIe", "A100-80GB"),
    "h100": ("H100-80GB-HBM3", "H100-PCIe", "H100-NVL", "H100-80GB"),
    "v100": ("V100-SXM2-16GB", "V100-SXM2-32GB", "V100-PCIE-16GB", "V100-PCIE-32GB"),
}


def template(workload: Workload) -> dict[str, Any]:
    """Return the pod template; it depends on nothing that changes only the number of Replicas."""
    spec: dict[str, Any] = {
        "serviceAccountName": selector(workload.name)["app.kubernetes.io/instance"],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "shareProcessNamespace": True,  # the server is not PID 1: its own signals end it, and orphans are reaped
        "terminationGracePeriodSeconds": _LONGEST_DRAIN * workload.drain
        + math.ceil(workload.serving.timeout)
        + _STEPS_DOWN,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _GROUP,
            "fsGroup": _GROUP,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(workload),
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(workload.name)},
                "matchLabelKeys": ["pod-template-hash"],
            }
        ],
        "containers": [_container(workload)],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": _quantity(_disk(workload) + 4 * _GIB)}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(_memory(workload) // 2)}},
        ],
    }
    if workload.settings.node_selector:
        spec["nodeSelector"] = dict(workload.settings.node_selector)
    if affinity := _affinity(workload):
        spec["affinity"] = {"nodeAffinity": affinity}
    return {"metadata": {"labels": labels(workload.name, workload.owner, workload.number)}, "spec": spec}


def _container(workload: Workload) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": workload.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [
            {"name": "http", "containerPort": USERS_PORT, "protocol": "TCP"},
            {"name": "probes", "containerPort": PROBES_PORT, "protocol": "TCP"},
        ],
        "env": _environment(workload),
        "resources": _resources(workload),
        # Each second while it starts, so that a Replica is used as soon as it can be.
        "startupProbe": _probe("/readyz", 1, _STARTUP, 2),
        # A Replica that is only busy (a predict that holds the GIL, a node without a spare core) must stay in the
        # Service: without another one its callers would be refused. One that ends leaves it without this probe.
        "readinessProbe": _probe("/readyz", 5, 6, 5),
        "livenessProbe": _probe("/livez", 20, 3, 5),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # the reason comes with the pod: no right on logs needed
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108 - of the pod
    }


def _probe(path: str, period: int, failures: int, timeout: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "probes"},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    }


def _environment(workload: Workload) -> list[dict[str, Any]]:
    serving = workload.serving
    settings = {
        "name": workload.name,
        "revision": workload.number,
        "key_sha256": workload.key_sha256,
        "concurrency": serving.concurrency,
        "queue": serving.queue,
        "timeout": serving.timeout,
        "cors": list(serving.cors),
        "gpus": workload.resources.gpus,
    }
    plain = {
        "HOME": "/tmp",  # noqa: S108 - the pod's own; the user has no entry in /etc/passwd, and / is read-only
        "USER": "nbdeploy",  # getpass.getuser() fails without an entry in /etc/passwd; torch's compiler asks it
        # The image offers every card; where the NVIDIA runtime is a node's default, a pod without GPUs would see them.
        **({} if workload.resources.gpus else {"NVIDIA_VISIBLE_DEVICES": "void"}),
        **dict(sorted(workload.variables.items())),
        "NBDEPLOY_SETTINGS": json.dumps(settings, sort_keys=True),
        "NBDEPLOY_DRAIN_SECONDS": str(workload.drain),
    }
    kept = {name: (workload.secrets_object, name) for name in workload.secrets} | dict(workload.foreign_secrets)
    rows: list[dict[str, Any]] = [  # the kubelet expands $(NAME), and reads $$ as $
        {"name": name, "value": value.replace("$", "$$")} for name, value in plain.items() if name not in kept
    ]
    for name, (secret, key) in sorted(kept.items()):
        rows.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return rows


def _memory(workload: Workload) -> int:
    return memory_bytes(workload.resources.memory) if workload.resources.memory else workload.memory


def _disk(workload: Workload) -> int:
    return workload.disk + _GIB


def _quantity(size: int) -> str:
    """Return a number of bytes as people read it in messages of the cluster, where that is exact."""
    for unit, factor in (("Gi", _GIB), ("Mi", _MIB)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def _resources(workload: Workload) -> dict[str, Any]:
    memory = workload.resources.memory
    # Kubernetes' own notation is kept where it is one, because messages repeat it.
    size = memory if memory and re.fullmatch(r"\d+([kMGT]|[KMGT]i)?", memory) else _quantity(_memory(workload))
    requests = {
        "cpu": f"{max(1, round(workload.resources.cpus * 1000))}m",
        "memory": size,
        "ephemeral-storage": _quantity(_disk(workload)),
    }
    limits = {"memory": size}  # no limit on the CPU: idle cores may be used
    if workload.resources.gpus:
        limits["nvidia.com/gpu"] = str(workload.resources.gpus)
    return {"requests": requests, "limits": limits}


def _tolerations(workload: Workload) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [dict(row) for row in workload.settings.tolerations]
    if workload.resources.gpus:
        found.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if workload.resources.spot:
        keys = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
        found += [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(row.get("key") in {key, None} for row in workload.settings.tolerations):
            found.append(
                {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _NODE_LOST},
            )
    return found


def _affinity(workload: Workload) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if workload.resources.gpus and workload.resources.gpu_type:
        terms = [
            {"matchExpressions": [{"key": key, "operator": "In", "values": values}]}
            for key, values in _gpu_labels(workload.resources.gpu_type).items()
        ]
        found["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}  # one of them is enough
    if workload.resources.spot:
        found["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 50, "preference": {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}}
            for key, value in _SPOT
        ]
    return found


def _gpu_labels(gpu_type: str) -> dict[str, list[str]]:
    """Return the labels a node with such a GPU may have, by NVIDIA's own label and by that of Google's clusters."""
    given = label_value(gpu_type)
    card = re.sub(r"(?i)^(nvidia-)?(tesla-)?", "", given) or given
    cards = (card, card.upper(), *_VARIANTS.get(card.lower(), ()))
    products = [given, *(f"{maker}-{one}" for one in cards for maker in ("NVIDIA", "Tesla"))]
    google = [given.lower(), *(f"{maker}-{one.lower()}" for one in cards for maker in ("nvidia", "nvidia-tesla"))]
    return {
        "nvidia.com/gpu.product": list(dict.fromkeys(products)),
        "cloud.google.com/gke-accelerator": list(dict.fromkeys(google)),
    }
