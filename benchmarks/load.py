"""Load of a Bundle as a Replica does it, imports excluded, against copying the same bytes into fresh memory.

    python benchmarks/load.py [--models gpt2 gpt2-xl] [--rounds 5]

Goals: at most 0.1 x; private memory after the load at most 5 % of the model. Each load runs in a fresh process that has
imported what the skeleton names; it opens the Bundle, checks it (a stamp vouches for the weights, as after a
verification), and loads. The other side reads the blobs' bytes into new anonymous memory of the same process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _gpt2 import SIZES, build
from _measure import Cost, child, clock, middle, private, ratio, record, show, tmpfs

GOAL, MEMORY_GOAL = 0.1, 0.05


def predict(model: Any, tokens: list[int]) -> list[float]:
    """Return the logits of the last token."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].float().tolist()


def make(name: str, folder: Path) -> dict[str, Any]:
    """Write the Bundle, and check it once, as verification does."""
    from nbdeploy_server.bundle import Bundle

    from nbdeploy import capture
    from nbdeploy.store import Store

    store = Store(folder)
    request = capture.Request(predict=predict, model=build(name), has_model=True, sample={"tokens": [1, 2, 3]})
    digest = store.put_bundle(capture.take(request, store).manifest)
    bundle = Bundle.open(folder, digest)
    bundle.check(full=True)
    return {"digest": digest, "bytes": sum(blob.ref.size for blob in bundle.manifest.blobs)}


def copied(folder: Path, digests: list[str]) -> Cost:
    """Read the blobs into fresh memory, and let go of it."""
    from nbdeploy_server.bundle import blob_path

    held = []
    with clock() as costs:
        for digest in digests:
            with blob_path(folder, digest).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                memory = mmap.mmap(-1, size)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    memory.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults: the fastest copy there is
                view, done = memoryview(memory), 0
                while done < size:
                    done += file.readinto(view[done:])
                held.append(view)
    return costs[0]


def load(folder: Path, digest: str, *, copy_first: bool) -> dict[str, Any]:
    """Load once in this process."""
    from nbdeploy_server.bundle import Bundle

    manifest = Bundle.open(folder, digest).manifest
    for name in manifest.globals:
        importlib.import_module(name.partition(":")[0])
    digests = sorted({blob.ref.digest for blob in manifest.blobs if blob.ref.size})
    theirs = copied(folder, digests) if copy_first else None
    before = private()
    with clock() as costs:
        bundle = Bundle.open(folder, digest)
        bundle.check()
        parts = bundle.load()
    after = private()
    theirs = theirs or copied(folder, digests)
    model = parts["model"]
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    return {"ours": vars(costs[0]), "theirs": vars(theirs), "private": after - before, "tied": tied}


def work(argument: dict[str, Any]) -> dict[str, Any]:
    """Do what the parent asked this process for."""
    folder = Path(argument["folder"])
    if argument["do"] == "make":
        return make(argument["model"], folder)
    return load(folder, argument["digest"], copy_first=argument["copy_first"])


def main() -> None:
    """Measure each model and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(work(json.loads(options.child))))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures = {}
    for name in options.models:
        folder = tempfile.mkdtemp(prefix="nbdeploy-bench-", dir=tmpfs())
        try:
            made = child(__file__, {"do": "make", "model": name, "folder": folder})
            order = {"do": "load", "folder": folder, "digest": made["digest"]}
            found = [child(__file__, {**order, "copy_first": number % 2 == 0}) for number in range(options.rounds)]
        finally:
            shutil.rmtree(folder)
        ours = [Cost(**one["ours"]) for one in found]
        theirs = [Cost(**one["theirs"]) for one in found]
        wall, cpu = ratio(ours, theirs)
        extra = max(one["private"] for one in found) / made["bytes"]
        milliseconds = {"load": middle([c.wall for c in ours]) * 1e3, "copy": middle([c.wall for c in theirs]) * 1e3}
        figures[name] = {
            "bytes": made["bytes"],
            "wall_ratio": wall,
            "cpu_ratio": cpu,
            "private_memory": extra,
            "tied": all(one["tied"] for one in found),
            "milliseconds": milliseconds,
        }
        words = f"{made['bytes'] / 1e6:.0f} MB: {milliseconds['load']:.0f} ms, copy {milliseconds['copy']:.0f} ms"
        show(f"{name}: load / copy, wall", wall, GOAL, words)
        show(f"{name}: load / copy, CPU", cpu)
        show(f"{name}: private memory / model", extra, MEMORY_GOAL, f"tied: {figures[name]['tied']}")
    record("load", figures, ["torch", "transformers", "cloudpickle"])


if __name__ == "__main__":
    main()
