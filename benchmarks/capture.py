"""Capture of GPT-2-sized torch models against hashing and writing the same bytes once, in one thread.

    python benchmarks/capture.py [--models gpt2 gpt2-xl] [--rounds 5]

Goals: wall at most 1.3 x; memory on top of the model at most 5 % of it; captured again unchanged, or with another
predict, no weight bytes are written. Both sides write to memory (tmpfs), so that the disk is not what is measured. The
model lives in a fresh process, as in a notebook.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _gpt2 import SIZES, build, regions
from _measure import Cost, child, clock, forget_peak, memory, middle, ratio, record, show, sizes, tmpfs

GOAL, MEMORY_GOAL = 1.3, 0.05
CHUNK = 1 << 20  # bytes hashed, then written: what stays in the processor's cache is the fastest plain way
SMALL = 1 << 20  # blobs below this are skeletons and cell sources, not weights


def predict(model: Any, tokens: list[int]) -> list[float]:
    """Return the logits of the last token."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].float().tolist()


def changed(model: Any, tokens: list[int]) -> list[float]:
    """Do as predict, but otherwise."""
    return [-value for value in predict(model, tokens)]


def plain(views: list[memoryview], folder: Path) -> Cost:
    """Hash and write the bytes once, in one thread."""
    folder.mkdir()
    with clock() as costs:
        for number, view in enumerate(views):
            hasher = hashlib.sha256()
            with (folder / str(number)).open("wb", buffering=0) as file:
                for start in range(0, view.nbytes, CHUNK):
                    chunk = view[start : start + CHUNK]
                    hasher.update(chunk)
                    file.write(chunk)
    shutil.rmtree(folder)
    return costs[0]


def captured(model: Any, function: Any, folder: Path) -> tuple[Cost, int, int]:
    """Capture into a Store; returns the cost, memory on top at the peak, and weight bytes newly written."""
    from nbdeploy import codec
    from nbdeploy.store import Store

    before = sizes(folder)
    forget_peak()
    resident = memory("VmRSS")
    with clock() as costs:
        codec.write(codec.encode({"predict": function, "model": model}), Store(folder))
    extra = memory("VmHWM") - resident
    new = sum(size for name, size in sizes(folder).items() if name not in before and size >= SMALL)
    return costs[0], extra, new


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure one model in this process."""
    from nbdeploy import codec

    model = build(name)
    views = regions(model)
    codec.encode({"predict": len})  # imports are not what is measured
    theirs, ours, extras = [], [], []
    folder = Path(tempfile.mkdtemp(prefix="nbdeploy-bench-", dir=tmpfs()))
    try:
        for number in range(rounds):
            if number % 2 == 0:
                theirs.append(plain(views, folder / "plain"))
            cost, extra, written = captured(model, predict, folder / "store")
            ours.append(cost)
            extras.append(extra)
            if number % 2:
                theirs.append(plain(views, folder / "plain"))
            if number + 1 < rounds:
                shutil.rmtree(folder / "store")
        again, _, again_bytes = captured(model, predict, folder / "store")
        other, _, other_bytes = captured(model, changed, folder / "store")
    finally:
        shutil.rmtree(folder)
    wall, cpu = ratio(ours, theirs)
    size = sum(view.nbytes for view in views)
    return {
        "bytes": size,
        "wall_ratio": wall,
        "cpu_ratio": cpu,
        "extra_memory": max(extras) / size,
        "extra_memory_first": extras[0] / size,
        "written": written / size,
        "unchanged_bytes": again_bytes,
        "changed_predict_bytes": other_bytes,
        "unchanged_wall_ratio": again.wall / middle([one.wall for one in theirs]),
        "changed_predict_wall_ratio": other.wall / middle([one.wall for one in theirs]),
        "seconds": {
            "capture": middle([one.wall for one in ours]),
            "capture_cpu": middle([one.cpu for one in ours]),
            "plain": middle([one.wall for one in theirs]),
            "plain_cpu": middle([one.cpu for one in theirs]),
        },
    }


def main() -> None:
    """Measure each model in a fresh process and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        argument = json.loads(options.child)
        print(json.dumps(measure(argument["model"], argument["rounds"])))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures = {}
    for name in options.models:
        found = figures[name] = child(__file__, {"model": name, "rounds": options.rounds})
        seconds = found["seconds"]
        words = f"{found['bytes'] / 1e6:.0f} MB: {seconds['capture']:.2f} s, plain {seconds['plain']:.2f} s"
        show(f"{name}: capture / hash and write, wall", found["wall_ratio"], GOAL, words)
        words = f"{seconds['capture_cpu']:.2f} s, plain {seconds['plain_cpu']:.2f} s"
        show(f"{name}: capture / hash and write, CPU", found["cpu_ratio"], raw=words)
        show(f"{name}: memory on top / model", found["extra_memory"], MEMORY_GOAL)
        show(f"{name}: weight bytes written / model", found["written"])
        for what in ("unchanged", "changed_predict"):
            wall = f"wall {found[what + '_wall_ratio']:.2f} of plain"
            show(f"{name}: {what}, weight bytes written", found[f"{what}_bytes"], 0, wall)
    record("capture", figures, ["torch", "transformers", "cloudpickle"])


if __name__ == "__main__":
    main()
