"""GPUs of a Replica, and where there are none."""

from __future__ import annotations

import mmap
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from nbdeploy_server import gpu, restore
from nbdeploy_server.metrics import machine_text
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.torch
def test_a_missing_gpu_is_said() -> None:
    """Without a GPU the model runs on the CPU, and one line says so; where none was asked for, nothing is said."""
    torch = pytest.importorskip("torch")
    assert gpu.note(set(), 0) == ""
    if not torch.cuda.is_available():
        assert "the model was on cuda:0, torch sees none" in gpu.note({"cuda:0"}, 0)
        assert "2 GPUs were asked for" in gpu.note(set(), 2)
        assert restore._device("cuda:0") == "cpu"
        assert "cuda:0" in restore.lacking
        assert gpu.gauges() == []
    else:
        assert gpu.note(set(), 1) == ""
        assert "torch sees" in gpu.note(set(), 1000)


@pytest.mark.torch
def test_a_gpu_that_is_missing_is_told_in_the_pod(bundle: Any, begin: Any) -> None:
    """--gpu without a GPU: the log and /readyz say that the CPU is used."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = (
        "import torch\nweights = torch.ones(3)\ndef predict(x: int) -> float:\n    return float(weights.sum()) + x\n"
    )
    one = begin(bundle(source), gpus=1).ready()
    assert one.post({"x": 1}).json() == 4.0
    assert "1 GPU was asked for, torch sees none" in one.text()
    assert "runs on the CPU" in one.probe("/readyz").json()["text"]


@pytest.mark.torch
def test_weights_move_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved in slices of a mapped blob, every byte arrives, also of a last slice that is not full."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(restore, "SLICE", mmap.PAGESIZE)
    data = os.urandom(5 * mmap.PAGESIZE + 64)
    path = tmp_path / "blob"
    path.write_bytes(data)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    moved = restore._moved(memory, device)
    assert bytes(moved.cpu()) == data


@pytest.mark.torch
def test_weights_of_a_gpu_go_straight_to_it(tmp_path: Path) -> None:
    """Weights that lived on a GPU are put there without a second copy in the host's memory."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.zeros(1, device="cuda")
    size = 512 << 20
    path = tmp_path / "blob"
    with path.open("wb") as file:
        file.truncate(size)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    peak = [0.0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], next(iter(text_string_to_metric_families(machine_text()))).samples[0].value)
            time.sleep(0.005)

    before = next(iter(text_string_to_metric_families(machine_text()))).samples[0].value
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        moved = restore.Handle(memory, 0, "cuda:0").storage()
    finally:
        stop.set()
        watcher.join()
    assert (moved.device.type, moved.nbytes()) == ("cuda", size)
    assert peak[0] - before < 3 * restore.SLICE
