"""Writes a golden Bundle of the present format into tests/contract/golden.

Run by hand, once per format and Python minor:

    .venv/bin/python tests/contract/make_golden.py

A Bundle once written is never rewritten: it stands for those that users have.
"""

from __future__ import annotations

import dataclasses
import linecache
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from nbdeploy import capture
from nbdeploy.store import Store

GOLDEN = Path(__file__).parent / "golden"
HELPER = '''"""A module beside the notebook."""

SCALE = 2.0


def scale(value):
    return value * SCALE
'''
CELL = '''
import dataclasses
import functools
import numpy as np
import helper

@dataclasses.dataclass
class Model:
    weights: np.ndarray
    view: np.ndarray
    names: tuple

@functools.lru_cache(maxsize=None)
def label(index):
    return f"class {index}"

def predict(model, x, *, shift: float = 0.5):
    """Score three classes."""
    scores = helper.scale(model.weights[:, :3] @ np.asarray(x)) + shift
    best = int(scores.argmax())
    shared = bool(np.shares_memory(model.weights, model.view))
    return {"scores": scores, "name": model.names[best], "label": label(best), "shared": shared}

weights = np.arange(9000, dtype=np.float64).reshape(3, 3000) / 9000
model = Model(weights, weights[1], ("a", "b", "c"))
sample = {"x": np.array([1.0, -1.0, 0.5])}
'''


def main() -> None:
    """Capture the cell as a notebook would, and keep the Store."""
    target = GOLDEN / f"v1-python{sys.version_info.major}.{sys.version_info.minor}"
    if target.exists():
        sys.exit(f"{target.name} is there already; golden Bundles are never rewritten")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "helper.py").write_text(HELPER, encoding="utf-8")
        sys.path.insert(0, folder)
        digest = _capture(Path(folder), Store(Path(folder) / "store"))
        shutil.copytree(Path(folder) / "store", target)
    (target / "digest").write_text(digest, encoding="ascii")


def _capture(folder: Path, store: Store) -> str:
    name = "/tmp/ipykernel_1/1.py"  # noqa: S108 - what kernels call their cells; nothing is written there
    linecache.cache[name] = (len(CELL), None, CELL.splitlines(keepends=True), name)
    module = sys.modules["__main__"] = types.ModuleType("__main__")  # a kernel's has no __file__
    namespace: dict[str, Any] = module.__dict__
    exec(compile(CELL, name, "exec", dont_inherit=True), namespace)  # noqa: S102 - a cell
    request = capture.Request(
        predict=namespace["predict"],
        model=namespace["model"],
        has_model=True,
        variable="model",
        sample=namespace["sample"],
        folder=folder,
    )
    taken = capture.take(request, store)
    manifest = {**taken.manifest, "variables": {}}
    return store.put_bundle(dataclasses.replace(taken, manifest=manifest).manifest)


if __name__ == "__main__":
    main()
