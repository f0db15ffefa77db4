"""How much room a cluster has, in words; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_GPU = "nvidia.com/gpu"
_TYPE = "nvidia.com/gpu.product"
_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_COMPUTE = ("pods", "cpu", "memory", "requests.", "limits.", "count/deployments", "services", "configmaps", "secrets")


def quantity(text: str) -> float:
    """Return a Kubernetes quantity, "1500m" or "2Gi", as a number; raises ValueError."""
    for suffix, factor in {**_BINARY, **_UNITS}.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def gpus(nodes: Iterable[Mapping[str, Any]], pods: Iterable[Mapping[str, Any]] | None) -> str:
    """Return GPUs by type as "2 of 4 NVIDIA-A100 free", "" where there is none; without pods only how many."""
    there: Counter[str] = Counter()
    types: dict[str, str] = {}
    for node in nodes:
        count = int(node.get("status", {}).get("allocatable", {}).get(_GPU, "0"))
        if count:
            kind = str(node["metadata"].get("labels", {}).get(_TYPE, "GPU of unknown type"))
            there[kind] += count
            types[str(node["metadata"]["name"])] = kind
    taken: Counter[str] = Counter()
    for pod in pods or ():
        kind = types.get(str(pod["spec"].get("nodeName", "")), "")
        if kind and pod.get("status", {}).get("phase") not in {"Succeeded", "Failed"}:
            containers = pod["spec"].get("containers", ())
            taken[kind] += sum(int(one.get("resources", {}).get("limits", {}).get(_GPU, "0")) for one in containers)
    if pods is None:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(there.items()))
    return ", ".join(f"{count - taken[kind]} of {count} {kind} free" for kind, count in sorted(there.items()))


def quotas(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return each ResourceQuota as "team: pods 3 of 10, …"."""
    words = []
    for quota in found:
        hard, used = _hard_and_used(quota)
        rows = ", ".join(f"{name} {used.get(name, '0')} of {limit}" for name, limit in sorted(hard.items()))
        words.append(f"quota {quota['metadata']['name']}: {rows}")
    return words


def used_up(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Name the resources of which a quota leaves nothing to an Endpoint; those that it never uses are left out."""
    names = []
    for quota in found:
        hard, used = _hard_and_used(quota)
        for name, limit in sorted(hard.items()):
            ours = name.startswith(_COMPUTE) and not name.startswith(("services.", "requests.storage"))
            if ours and _full(limit, used.get(name, "0")) and (quantity(limit) > 0 or _GPU not in name):
                names.append(f"{name} ({used.get(name, '0')} of {limit})")
    return names


def limits(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return each LimitRange on containers or pods as "limits: a Container has at most cpu 2, memory 4Gi"."""
    words = []
    for limit in found:
        for row in limit.get("spec", {}).get("limits", ()):
            parts = [
                f"{title} {', '.join(f'{name} {value}' for name, value in sorted(row[key].items()))}"
                for key, title in (("max", "at most"), ("min", "at least"), ("default", "by default"))
                if row.get(key)
            ]
            if parts and row.get("type") in {"Container", "Pod"}:
                words.append(f"limits {limit['metadata']['name']}: a {row['type']} has {'; '.join(parts)}")
    return words


def _hard_and_used(quota: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    status = quota.get("status", {})
    return status.get("hard") or quota.get("spec", {}).get("hard") or {}, status.get("used") or {}


def _full(limit: str, used: str) -> bool:
    try:
        return quantity(used) >= quantity(limit)
    except ValueError:
        return False
