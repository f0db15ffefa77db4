"""From Enter to ready: `deploy(...)` of a scikit-learn and a torch model against the parts it cannot do without.

    python benchmarks/enter_to_ready.py [--models sklearn torch] [--rounds 5]

Goal: at most 1.3 x (2 x imports + server start + forwards). The two imports are those of the clean process that checks
and of the Replica; an import is a fresh `python -I` that imports what the model needs. Server start is a Replica of a
trivial function, from its start until it says that it is ready. Forwards are the runs of predict that the card tells,
at the time that one takes in the deploying process. Each deploy runs in a fresh process that has its imports done, as a
notebook has; the parts take turns with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _measure import Cost, child, middle, of_process, record, show, temporary_home

GOAL = 1.3
IMPORTS = {"sklearn": "import numpy, sklearn.svm", "torch": "import torch"}
STEPS = ("captured", "locked", "verified", "starting", "ready")


def sklearn_model() -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """Return a classifier of digits, its predict and a sample."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    pixels, digits = load_digits(return_X_y=True)

    def predict(model: Any, pixels: list[float]) -> int:
        return int(model.predict([pixels])[0])

    return SVC().fit(pixels, digits), predict, {"pixels": pixels[0].tolist()}


def torch_model() -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """Return a network of 50 MB, its predict and a sample."""
    import torch

    def predict(model: Any, values: list[float]) -> list[float]:
        with torch.inference_mode():
            return model(torch.tensor([values]))[0].tolist()

    layers = [torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 2048), torch.nn.ReLU()]
    layers += [torch.nn.Linear(2048, 2048), torch.nn.Linear(2048, 10)]
    return torch.nn.Sequential(*layers).eval(), predict, {"values": [0.5] * 2048}


MODELS = {"sklearn": sklearn_model, "torch": torch_model}


def deployed(name: str) -> dict[str, Any]:
    """Deploy in this process; returns the wall seconds, those of each step, and those of all runs of predict."""
    import nbdeploy

    model, predict, sample = MODELS[name]()
    predict(model, **sample)
    ended: dict[str, float] = {}
    steps: dict[str, float] = {}

    def note(event: Any) -> None:
        if event.state == "done":
            steps[event.step], ended[event.step] = event.seconds, event.time

    with temporary_home():
        began, clock = time.perf_counter(), time.time()
        endpoint = nbdeploy.deploy(model, predict, name=name, sample=sample, on_event=note)
        wall = time.perf_counter() - began
        runs = endpoint.receipt()["runs"]
    times = []
    for _ in range(9):
        began = time.perf_counter()
        predict(model, **sample)
        times.append(time.perf_counter() - began)
    worker = ended["locked"] - steps["locked"] - ended["captured"]
    steps = {step: steps[step] for step in STEPS} | {"worker started": worker}
    steps["other"] = wall - sum(steps.values())
    return {"wall": wall, "steps": steps, "forwards": runs * middle(times), "since": ended["job"] - clock}


@contextlib.contextmanager
def starter() -> Iterator[Callable[[], float]]:
    """Yield a function that starts a Replica of a trivial function; it returns the seconds until it was ready."""
    with temporary_home() as home:
        from nbdeploy_server import channel

        from nbdeploy import capture
        from nbdeploy.process import clean_environment, kernel_path, launch
        from nbdeploy.store import Store

        def trivial(value: float) -> float:
            return value

        store = Store(home / "store")
        digest = store.put_bundle(capture.take(capture.Request(predict=trivial, sample={"value": 1.0}), store).manifest)
        settings = {"store": str(store.root), "bundle": digest, "name": "trivial", "revision": 1}
        log = Path(home / "replica.log")

        def start() -> float:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            page = channel.Page.create()
            more = {"unpacked": str(home / "unpacked"), "control": theirs.fileno(), "shared": page}
            with log.open("ab") as output, ours:
                began = time.perf_counter()
                process = launch(
                    "nbdeploy_server.replica:main",
                    {**settings, **more},
                    path=kernel_path(),
                    environment=clean_environment(os.environ),
                    folder=home,
                    output=output,
                    descriptors=(theirs.fileno(), page),
                )
                theirs.close()
                os.close(page)
                lines = ours.makefile("r", encoding="utf-8")
                ready = any(json.loads(line)["op"] == "ready" for line in lines)
                seconds = time.perf_counter() - began
                process.kill()
                process.wait()
            if not ready:
                raise RuntimeError(log.read_text(encoding="utf-8"))
            return seconds

        yield start


def imported(name: str) -> Cost:
    """Import what the model needs in a fresh process, which ends right after."""
    return of_process([sys.executable, "-I", "-c", f"{IMPORTS[name]}; import os; os._exit(0)"])


def measure(name: str, rounds: int, start: Callable[[], float]) -> dict[str, Any]:
    """Measure one model against its parts, in turns."""
    ours: list[dict[str, Any]] = []
    imports: list[float] = []
    starts: list[float] = []
    imported(name)  # bytecode and page cache
    start()
    child(__file__, {"model": name})
    for _ in range(rounds):
        before = imported(name).wall
        ours.append(child(__file__, {"model": name}))
        imports.append((before + imported(name).wall) / 2)
        starts.append(start())
    rows = zip(ours, imports, starts, strict=True)
    ratios = [one["wall"] / (2 * paid + started + one["forwards"]) for one, paid, started in rows]
    seconds = {
        "deploy": middle([one["wall"] for one in ours]),
        "import": middle(imports),
        "server_start": middle(starts),
        "forwards": middle([one["forwards"] for one in ours]),
    }
    steps = {step: middle([one["steps"][step] for one in ours]) for step in ours[0]["steps"]}
    return {
        "wall_ratio": middle(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": seconds,
        "steps": steps,
    }


def main() -> None:
    """Measure each model and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(deployed(json.loads(options.child)["model"])))
        return
    figures = {}
    with starter() as start:
        for name in options.models:
            found = figures[name] = measure(name, options.rounds, start)
            parts = ", ".join(f"{part} {value:.2f}" for part, value in found["seconds"].items())
            show(f"{name}: Enter to ready / its parts", found["wall_ratio"], GOAL, f"{parts} s")
            print("  " + ", ".join(f"{step} {seconds:.2f}" for step, seconds in found["steps"].items()) + " s")
    record("enter_to_ready", figures, ["scikit-learn", "torch", "uvicorn", "fastapi"])


if __name__ == "__main__":
    main()
