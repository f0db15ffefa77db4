"""CPU a Replica spends per request, against plain Starlette + orjson in the same run.

The function is `square`: {"input": 4.0} -> {"output": 16.0}. The Replica is a real one behind its supervisor, with key,
metrics and Server-Timing on; the other runs under uvicorn with uvloop and httptools, without access log. Both get
the same requests on kept connections, in turns; CPU is user + system time of the server process by /proc/PID/stat.

    python benchmarks/serving.py [--requests 20000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _measure import record

TICKS = os.sysconf("SC_CLK_TCK")
BODY = b'{"input": 4.0}'
ANSWER = b'{"output":16.0}'

STARLETTE = """
import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

async def square(request):
    value = orjson.loads(await request.body())["input"]
    return Response(orjson.dumps({"output": value * value}), media_type="application/json")

app = Starlette(routes=[Route("/predict", square, methods=["POST"])])
"""


def square(input: float) -> dict[str, float]:  # noqa: A002 - the name in the request
    """Be as small as a model can be."""
    return {"output": input * input}


def cpu_seconds(pid: int) -> float:
    """Return user + system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def request_bytes(port: int, key: str) -> bytes:
    """Return the request as httpx and browsers would send it."""
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\nUser-Agent: bench\r\n"
        f"{authorization}Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


def hammer(port: int, request: bytes, requests: int, connections: int) -> float:
    """Send so many requests over kept connections, one at a time on each; returns wall seconds."""
    selector = selectors.DefaultSelector()
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    sent = done = 0
    began = time.perf_counter()
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ)
        sock.sendall(request)
        sent += 1
    while done < requests:
        for key, _events in selector.select():
            sock = key.fileobj
            data = sock.recv(65536)  # type: ignore[union-attr] # a socket, registered above
            while not data.endswith(ANSWER):
                more = sock.recv(65536)  # type: ignore[union-attr] # as above
                if not more or b" 200 " not in data[:16]:
                    raise RuntimeError(f"not the answer: {data!r}")
                data += more
            done += 1
            if sent < requests:
                sock.sendall(request)  # type: ignore[union-attr] # as above
                sent += 1
    seconds = time.perf_counter() - began
    for sock in socks:
        sock.close()
    return seconds


@contextmanager
def starlette() -> Iterator[tuple[int, int, str]]:
    """Run the plain server; yields port, process id and key."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plain.py").write_text(STARLETTE, encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", "plain:app", "--port", str(port), "--loop", "uvloop"]
        command += ["--http", "httptools", "--no-access-log", "--log-level", "warning", "--app-dir", folder]
        process = subprocess.Popen(command)
        try:
            limit = time.monotonic() + 20
            while time.monotonic() < limit:
                try:
                    hammer(port, request_bytes(port, ""), 1, 1)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield port, process.pid, ""
        finally:
            process.terminate()
            process.wait()


def child_of(parent: int) -> int:
    """Return the one child process of a process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                return int(entry.name)
    raise RuntimeError(f"{parent} has no child")


@contextmanager
def replica() -> Iterator[tuple[int, int, str]]:
    """Deploy `square` to the local engine; yields port, process id and key."""
    import nbdeploy
    from nbdeploy.engines.local.layout import Layout

    with tempfile.TemporaryDirectory() as folder:
        os.environ["NBDEPLOY_HOME"] = folder
        endpoint = nbdeploy.deploy(square, name="square", sample={"input": 4.0}, on_event=lambda _event: None)
        try:
            layout = Layout(Path(folder), "square")
            record = layout.supervisor()
            if record is None:
                raise RuntimeError("no supervisor")
            yield int(endpoint.url.rpartition(":")[2]), child_of(record.identity.pid), layout.key()
        finally:
            endpoint.delete()


def main() -> None:
    """Measure in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 32])
    options = parser.parse_args()
    figures = {}
    with starlette() as plain, replica() as ours:
        for port, _pid, key in (plain, ours):
            hammer(port, request_bytes(port, key), 2000, 8)
        print(f"{'connections':>11} {'Starlette us':>12} {'nbdeploy us':>12} {'CPU ratio':>10} {'rate ratio':>10}")
        for connections in options.connections:
            spent: dict[int, list[float]] = {plain[1]: [], ours[1]: []}
            walls: dict[int, list[float]] = {plain[1]: [], ours[1]: []}
            for number in range(options.rounds):
                for port, pid, key in (plain, ours) if number % 2 == 0 else (ours, plain):
                    before = cpu_seconds(pid)
                    walls[pid].append(hammer(port, request_bytes(port, key), options.requests, connections))
                    spent[pid].append((cpu_seconds(pid) - before) / options.requests * 1e6)
            theirs, mine = (statistics.median(spent[pid]) for pid in (plain[1], ours[1]))
            ratios = [b / a for a, b in zip(spent[plain[1]], spent[ours[1]], strict=True)]
            rates = [a / b for a, b in zip(walls[plain[1]], walls[ours[1]], strict=True)]
            print(
                f"{connections:>11} {theirs:>12.1f} {mine:>12.1f} {statistics.median(ratios):>10.2f} "
                f"{statistics.median(rates):>10.2f}",
                flush=True,
            )
            figures[f"{connections} connections"] = {
                "cpu_ratio": statistics.median(ratios),
                "rate_ratio": statistics.median(rates),
                "microseconds": {"starlette": theirs, "nbdeploy": mine},
            }
    record("serving", figures, ["uvicorn", "starlette", "fastapi", "orjson"])


if __name__ == "__main__":
    main()
