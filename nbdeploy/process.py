"""Processes: who they are beyond a pid, and how clean ones are started.

A pid alone names nobody: it is reused, and homes may lie on a shared disk or in a container. An Identity holds host,
boot id, pid namespace, pid and start time; a process is the same only if all agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

# What a clean process sees of the environment (design: Isolation), and what any program needs to find home and temp.
ALLOWED = frozenset({"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "HOME", "USER", "LOGNAME", "TMPDIR"})
ALLOWED_PREFIXES = ("CONDA_", "CUDA_", "HF_", "LC_")
ALLOWED_ANY_CASE = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"})


@dataclass(frozen=True)
class Identity:
    """One process on one boot of one machine; `started` is in clock ticks since boot (0 where it cannot be read)."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Read the identity of a running process on this machine."""
        return cls(socket.gethostname(), boot_id(), _namespace(), pid, _started(pid))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """Read what `to_json` wrote."""
        return cls(**{name: data[name] for name in ("host", "boot", "namespace", "pid", "started")})

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def is_here(self) -> bool:
        """Whether the process was started on this host and in this pid namespace, whatever the boot.

        A host may change its name while it runs; an equal boot id is the same machine whatever it is called.
        """
        same_machine = self.host == socket.gethostname() or self.boot == boot_id()
        return same_machine and self.namespace == _namespace()

    def rebooted(self) -> bool:
        """Whether the machine has booted since."""
        return self.is_here() and self.boot != boot_id()

    def alive(self) -> bool:
        """Whether this very process runs; a zombie counts as dead."""
        if not self.is_here() or self.boot != boot_id() or not _exists(self.pid):
            return False
        return not self.started or _started(self.pid) == self.started

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to this very process; False if it is gone."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def end_group(self) -> None:
        """Kill this process, which leads a session of its own, with all that it started in there."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, seconds: float = 5.0) -> bool:
        """Ask the process to stop, then make it; True once it is gone."""
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
            if not self.signal(number):
                return True
            limit = time.monotonic() + patience
            while time.monotonic() < limit:
                if not self.alive():
                    return True
                time.sleep(0.01)
        return not self.alive()


def boot_id() -> str:
    """Return an id of this boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return _sysctl("kern.boottime")


def _sysctl(name: str) -> str:
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid, 0) != "Z"


def _stat(pid: int, field: int) -> str:
    """Return a field of /proc/PID/stat counted from the state (0); "" where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[field]


def _started(pid: int) -> int:
    return int(_stat(pid, 19) or 0)  # field 22 of proc(5), starttime


def resident(pid: int) -> int:
    """Return the private and file-backed resident memory of a process in bytes (0 where unknown)."""
    pages = _stat(pid, 21)  # field 24 of proc(5), rss
    return int(pages or 0) * os.sysconf("SC_PAGE_SIZE")


def kernel_path(without: Iterable[Path] = ()) -> list[str]:
    """Return this process's sys.path, absolute, without the notebook's folder and the working directory."""
    left_out = {str(path.resolve()) for path in (*without, Path.cwd())}
    kept = [str(Path(entry).absolute()) for entry in sys.path if entry]
    return [entry for entry in dict.fromkeys(kept) if str(Path(entry).resolve()) not in left_out]


def user_sites(path: Iterable[str]) -> list[str]:
    """Return the user site folder if it stands on this path: a process under -I has to be told of it."""
    folder = site.getusersitepackages()
    return [folder] if folder in path else []


def clean_environment(environ: Mapping[str, str], extra: Iterable[str] = ()) -> dict[str, str]:
    """Return what a clean process may see of an environment: an allow-list, and the names that --env gave."""
    named = set(extra)
    return {
        name: value
        for name, value in environ.items()
        if name in ALLOWED or name.startswith(ALLOWED_PREFIXES) or name.upper() in ALLOWED_ANY_CASE or name in named
    }


def launch(
    entry: str,
    argument: Mapping[str, Any],
    *,
    path: list[str],
    environment: Mapping[str, str],
    folder: Path,
    output: IO[bytes] | int,
    descriptors: tuple[int, ...] = (),
    python: str = sys.executable,
) -> subprocess.Popen[bytes]:
    """Start a clean process in a session of its own.

    Args:
        entry: "module:function", called with `argument`.
        argument: JSON data; it goes by standard input, so `ps` and the environment show nothing of it.
        path: its sys.path.
        environment: all that it sees.
        folder: its working directory.
        output: where its standard output and error go.
        descriptors: those it inherits.
        python: its interpreter.
    """
    import nbdeploy_server

    program = Path(nbdeploy_server.__file__).with_name("launch.py")
    order = {"path": path, "user_sites": user_sites(path), "entry": entry, "argument": argument}
    process = subprocess.Popen(
        [python, "-I", "-X", "faulthandler", str(program)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=dict(environment),
        pass_fds=descriptors,
        start_new_session=True,
    )
    if process.stdin is None:
        raise RuntimeError("the process has no standard input")
    try:
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
    except BrokenPipeError:
        process.wait()  # it died at once; whoever started it sees the exit status
    return process


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process to end; True once it has. Popen.wait with a timeout notices it up to 50 ms late."""
    ended = threading.Event()

    def reap() -> None:
        process.wait()
        ended.set()

    threading.Thread(target=reap, name=f"reap-{process.pid}", daemon=True).start()
    return ended.wait(seconds)


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Let a process live on by itself; once it ends it is reaped, so that no zombie stays with this one."""
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()
