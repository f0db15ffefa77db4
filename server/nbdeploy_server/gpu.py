"""What a Replica can say about its GPUs: whether torch has them, how busy they are."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterable
from typing import Any

Gauge = tuple[str, str, list[tuple[str, float]]]  # name, help, rows of (labels, value)


def note(lacking: Iterable[str], wanted: int) -> str:
    """Say in words where a model that wants a GPU does not get it, "" where all is as asked.

    Args:
        lacking: devices that weights lived on in the notebook and that are not here ("cuda:0", ...).
        wanted: GPUs that the Replica was given, by --gpu.
    """
    torch: Any = sys.modules.get("torch")
    had = next(iter(sorted(lacking)), "")
    if torch is None or not (had or wanted):
        return ""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not seen:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = "no card or no driver is in reach" if built else "this torch is built for CPUs only"
        asked = f"{wanted} GPU{'s were' if wanted > 1 else ' was'} asked for" if wanted else f"the model was on {had}"
        return f"{asked}, torch sees none ({why}): the model runs on the CPU"
    if seen < wanted:
        return f"{wanted} GPUs were asked for, torch sees {seen}"
    return ""


def gauges(wanted: int = 0) -> list[Gauge]:
    """Return use and memory of this Replica's GPUs; nothing where it has none. May be called from any thread."""
    torch: Any = sys.modules.get("torch")
    # Asked only of torch that has begun to use its GPU: the question itself would take memory on the card.
    started = torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized()
    if not (started or wanted):
        return []
    rows = _nvml_rows()
    if not rows and started:
        free, total = torch.cuda.mem_get_info()
        rows = [(f'gpu="{torch.cuda.current_device()}"', total - free, total, None)]
    used: Gauge = ("nbdeploy_gpu_memory_used_bytes", "Memory in use on the GPU, by all processes.", [])
    size: Gauge = ("nbdeploy_gpu_memory_bytes", "Memory of the GPU.", [])
    busy: Gauge = ("nbdeploy_gpu_use_ratio", "Share of the last moments in which the GPU computed, 0 to 1.", [])
    for label, taken, total, use in rows:
        used[2].append((label, taken))
        size[2].append((label, total))
        if use is not None:
            busy[2].append((label, use))
    return [gauge for gauge in (used, size, busy) if gauge[2]]


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Use(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


@functools.cache
def _nvml() -> Any:
    """Return NVIDIA's management library, which comes with the driver, or None; no package is needed for it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def _nvml_rows() -> list[tuple[str, float, float, float | None]]:
    """Return (label, bytes used, bytes, use) of each GPU that this process may use."""
    library = _nvml()
    if library is None:
        return []
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    rows: list[tuple[str, float, float, float | None]] = []
    for index in _visible(count.value):
        device, memory, use = ctypes.c_void_p(), _Memory(), _Use()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            continue
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
            continue
        known = library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(use)) == 0  # not on parts of a card (MIG)
        rows.append((f'gpu="{index}"', memory.used, memory.total, use.gpu / 100 if known else None))
    return rows


def _visible(count: int) -> list[int]:
    """Return the positions that CUDA_VISIBLE_DEVICES leaves; all where it names cards in another way."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(name.isdigit() for name in names):
        return [int(name) for name in names if int(name) < count]
    return list(range(count))
