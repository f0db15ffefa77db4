"""A call through `connect` of a tiny function against httpx posting JSON to a Starlette app. Goal: at most 1.3 x wall.

    python benchmarks/call.py [--calls 1000] [--rounds 9]

Both sides keep one connection and call one after another, in turns. The Endpoint is a real one, with key, metrics and
Server-Timing; the other app runs under uvicorn with uvloop and httptools, without access log.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from _measure import Cost, clock, middle, ratio, record, show, temporary_home

GOAL = 1.3
START_TIMEOUT = 30.0  # seconds
APP = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def square(request):
    value = (await request.json())["input"]
    return JSONResponse({"output": value * value})

app = Starlette(routes=[Route("/predict", square, methods=["POST"])])
"""


def square(input: float) -> dict[str, float]:  # noqa: A002 - the name in the request
    """Be as small as a model can be."""
    return {"output": input * input}


@contextmanager
def starlette() -> Iterator[str]:
    """Run the plain app; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # by port, not by descriptor: uvicorn takes a passed socket for a Unix one and leaves Nagle's delay on
    command = [sys.executable, "-m", "uvicorn", "plain:app", "--port", str(port), "--loop", "uvloop"]
    command += ["--http", "httptools", "--no-access-log", "--log-level", "warning"]
    command += ["--timeout-keep-alive", "75"]  # the other side's blocks must not cost this one its connection
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plain.py").write_text(APP, encoding="utf-8")
        process = subprocess.Popen([*command, "--app-dir", folder])
        url = f"http://127.0.0.1:{port}/predict"
        try:
            limit = time.monotonic() + START_TIMEOUT
            while time.monotonic() < limit and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    httpx.post(url, json={"input": 1.0}).raise_for_status()
                    break
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait()


def block(call: Callable[[float], object], calls: int) -> Cost:
    """Call one after another; the Cost is that of this process, the caller."""
    with clock() as costs:
        for number in range(calls):
            if call(float(number)) != {"output": float(number) ** 2}:
                raise RuntimeError("not the answer")
    return costs[0]


def main() -> None:
    """Measure in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    os.environ.pop("NBDEPLOY_KEY", None)
    with temporary_home(), starlette() as url, httpx.Client(trust_env=False) as client:
        import nbdeploy

        nbdeploy.deploy(square, name="square", sample={"input": 4.0}, verify=False)
        endpoint = nbdeploy.connect("square")
        sides: dict[str, Callable[[float], object]] = {
            "connect": lambda value: endpoint(input=value),
            "httpx": lambda value: client.post(url, json={"input": value}).json(),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in sides}
        for call in sides.values():
            block(call, 200)
        for number in range(options.rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                costs[name].append(block(sides[name], options.calls))
    wall, cpu = ratio(costs["connect"], costs["httpx"])
    raw = {name: middle([one.wall for one in rows]) / options.calls * 1e6 for name, rows in costs.items()}
    words = f"connect {raw['connect']:.0f} us, httpx and Starlette {raw['httpx']:.0f} us"
    show("connect(...)() / httpx to Starlette, wall", wall, GOAL, words)
    show("connect(...)() / httpx to Starlette, caller's CPU", cpu)
    record("call", {"wall_ratio": wall, "cpu_ratio": cpu, "microseconds": raw}, ["httpx", "uvicorn", "starlette"])


if __name__ == "__main__":
    main()
