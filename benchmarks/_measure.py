"""What the benchmarks share: costs of fresh processes, a home that leaves nothing behind, and the file of results.

Wall time on a busy machine is noise, so CPU seconds (user + system) stand beside it, the two sides of a ratio take
turns, and the median of several rounds counts.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds of one piece of work."""

    wall: float
    cpu: float


def of_process(command: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a fresh process to its end; its CPU includes the interpreter's start."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen must not wait for it again
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
    return Cost(wall, used.ru_utime + used.ru_stime)


@contextmanager
def clock() -> Iterator[list[Cost]]:
    """Measure the block in this process, its threads included; the Cost is in the list afterwards."""
    costs: list[Cost] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield costs
    costs.append(Cost(time.perf_counter() - wall, time.process_time() - cpu))


def child(script: str, argument: dict[str, Any]) -> dict[str, Any]:
    """Run a script's own `--child` in a fresh process, which prints one JSON line."""
    command = [sys.executable, script, "--child", json.dumps(argument)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(ours: Sequence[Cost], theirs: Sequence[Cost]) -> tuple[float, float]:
    """Return the medians of the rounds' ratios: wall, CPU."""
    pairs = list(zip(ours, theirs, strict=True))
    return middle([a.wall / b.wall for a, b in pairs]), middle([a.cpu / max(b.cpu, 1e-9) for a, b in pairs])


def memory(field: str) -> int:
    """Return a field of this process's /proc/self/status in bytes: VmRSS, VmHWM, RssAnon."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Make VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def private() -> int:
    """Return the bytes that only this process has: anonymous and privately written pages."""
    rows = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, _, rest = line.partition(":")
        rows[name] = int(rest.split()[0]) * 1024
    return max(rows["Private_Dirty"], rows["Anonymous"])


@contextmanager
def temporary_home(folder: str | None = None) -> Iterator[Path]:
    """Give NBDEPLOY_HOME a folder of its own; its Endpoints and files are gone afterwards, also after a failure."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: still leave nothing
    home = Path(tempfile.mkdtemp(prefix="nbdeploy-bench-", dir=folder))
    os.environ["NBDEPLOY_HOME"] = str(home)
    try:
        yield home
    finally:
        try:
            import nbdeploy

            for endpoint in nbdeploy.endpoints():
                endpoint.delete()
        finally:
            os.environ.pop("NBDEPLOY_HOME")
            shutil.rmtree(home, ignore_errors=True)


def tmpfs() -> str | None:
    """Return a folder in memory where there is one, so that the disk is not what is measured."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - mkdtemp makes private folders in it


def sizes(store: Path) -> dict[str, int]:
    """Return the size of each blob in a Store."""
    return {path.name: path.stat().st_size for path in store.glob("blobs/sha256/*/*")}


def show(what: str, value: float, goal: float | None = None, raw: str = "") -> None:
    """Print one ratio, its goal, and the raw numbers it came from."""
    aim = "" if goal is None else f"goal {goal:g}  {'met' if value <= goal else 'MISSED'}"
    print(f"{what:<48} {value:>7.3f}  {aim:<18} {raw}", flush=True)


def record(name: str, figures: dict[str, Any], packages: Sequence[str] = ()) -> None:
    """Append one line to the kept results: date, machine, versions, figures; no host name and no path."""
    row = {
        "date": dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": _machine(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in ("nbdeploy", *packages)},
        "figures": _rounded(figures),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
    }
