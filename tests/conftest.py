"""Fixtures that every test may use: a home of its own, kernels, and a way to wait."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.endpoint import endpoints
from nbdeploy.jobs import all_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

pytest_plugins = ["tests.cluster.plugin"]  # fixtures of the test cluster
DEADLINE = 120.0  # seconds that anything may take on a busy machine


def pytest_configure() -> None:
    """Let tests interrupt the processes they start, also where a shell began this run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """Return the condition's first true value; fail after the deadline."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    pytest.fail(f"waited {seconds:.0f} s in vain for {getattr(condition, '__name__', condition)}")


def leftovers(home: Path) -> list[str]:
    """Name processes that were started for this home and still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            link = (entry / "cwd").readlink()
            state = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if link.is_relative_to(home) and state != "Z":
            found.append(f"{entry.name} in {link}")
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own; at the end every Endpoint is deleted, and no process may be left."""
    folder = tmp_path / "home"
    monkeypatch.setenv("NBDEPLOY_HOME", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield folder
    for job in all_jobs(folder):
        worker = job.worker()
        if worker is not None:
            worker.end()
    for endpoint in endpoints("local"):
        endpoint.delete()
    wait_until(lambda: not leftovers(folder))
    left = sorted((folder / "endpoints").glob("*")) if (folder / "endpoints").is_dir() else []
    assert left == []


@pytest.fixture
def unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that nobody may have (RFC 2606) are not known, at once: a DNS server may be slow, absent, or inventive."""
    resolve = socket.getaddrinfo

    def answer(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith((".invalid", ".test")):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def started(kernel_name: str, cwd: Path, env: Mapping[str, str]) -> tuple[Any, Any]:
    """Start a kernel and return its manager and a client of it, once it answers.

    The manager chooses five free ports and lets them go; the kernel binds them a second later or more. Where somebody
    took one meanwhile, it dies before it answers, and is started anew: three times at most.
    """
    from jupyter_client.manager import KernelManager

    for left in (2, 1, 0):
        manager = KernelManager(kernel_name=kernel_name)
        manager.start_kernel(cwd=str(cwd), env=dict(env))
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=DEADLINE)
        except RuntimeError:
            died = not manager.is_alive()
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            if not (died and left):
                raise
        else:
            return manager, client
    raise AssertionError


class Kernel:
    """A real IPython kernel."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self.client = client

    def run(self, code: str, seconds: float = 300.0) -> Output:
        """Run a cell and return what it gave."""
        output = Output()
        reply = self.client.execute_interactive(
            code, allow_stdin=False, timeout=seconds, output_hook=output.take, stop_on_error=False
        )
        output.status = reply["content"]["status"]
        return output


class Output:
    """What a cell gave: texts, mime bundles, the error."""

    def __init__(self) -> None:
        self.status = ""
        self.stream = ""
        self.bundles: list[dict[str, Any]] = []
        self.error = ""
        self.traceback: list[str] = []

    def take(self, message: dict[str, Any]) -> None:
        """Collect one message."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self.stream += content["text"]
        elif kind in {"display_data", "execute_result", "update_display_data"}:
            self.bundles.append(content["data"])
        elif kind == "error":
            self.error = f"{content['ename']}: {content['evalue']}"
            self.traceback = content["traceback"]

    @property
    def text(self) -> str:
        """Everything as text."""
        shown = [str(bundle.get("text/plain", "")) for bundle in self.bundles]
        return "\n".join([self.stream, *shown, self.error])

    @property
    def html(self) -> str:
        """The last HTML."""
        return next((str(one["text/html"]) for one in reversed(self.bundles) if "text/html" in one), "")


@pytest.fixture
def kernelspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel specification for this interpreter; returns its name."""
    folder = tmp_path / "jupyter" / "kernels" / "nbdeploy-test"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {
        "argv": argv,
        "display_name": "test",
        "language": "python",
        "env": {"IPYTHONDIR": str(tmp_path / "ipython")},
    }
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return "nbdeploy-test"


@pytest.fixture
def start_kernel(home: Path, kernelspec: str, tmp_path: Path) -> Iterator[Callable[..., Kernel]]:
    """Start kernels in a folder of the test's; all are ended with the test."""
    running: list[Kernel] = []

    def start(folder: Path | None = None, **environment: str) -> Kernel:
        folder = folder or tmp_path / "notebooks"
        folder.mkdir(exist_ok=True)
        kernel = Kernel(*started(kernelspec, folder, {**os.environ, **environment}))
        running.append(kernel)
        return kernel

    yield start
    for kernel in running:
        kernel.client.stop_channels()
        if kernel.manager.is_alive():
            kernel.manager.shutdown_kernel(now=True)
        kernel.manager.cleanup_resources()


@pytest.fixture
def kernel(start_kernel: Callable[..., Kernel]) -> Kernel:
    """One kernel."""
    return start_kernel()
