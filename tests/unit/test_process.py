"""Processes: known by more than a pid, started clean."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import nbdeploy_server
import pytest

from nbdeploy.process import Identity, clean_environment, kernel_path, launch, let_go, resident
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

WAITS = "import signal, sys\nprint(1, flush=True)\nsys.stdin.read()"
DEAF = "import signal, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\nsys.stdin.read()"


def start(program: str) -> subprocess.Popen[bytes]:
    """Start a process and wait until it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs."""
    with start(WAITS) as process:
        yield process
        process.kill()


def test_identity(waiting: subprocess.Popen[bytes]) -> None:
    """A running process is alive under its identity, also after a trip through JSON."""
    identity = Identity.from_json(json.loads(json.dumps(Identity.of(waiting.pid).to_json())))
    assert identity == Identity.of(waiting.pid)
    assert identity.alive()
    assert identity.is_here()
    assert not identity.rebooted()


@pytest.mark.parametrize(
    ("changes", "here", "rebooted"),
    [
        ({"started": 1}, True, False),  # the pid is another process's now
        ({"boot": "before"}, True, True),
        ({"namespace": "pid:[1]"}, False, False),  # another container
        ({"host": "elsewhere", "boot": "theirs"}, False, False),  # a shared home
        ({"pid": 2**22 + 1}, True, False),  # above any pid
    ],
)
def test_others_are_never_touched(
    waiting: subprocess.Popen[bytes],
    changes: dict[str, str | int],
    here: bool,  # noqa: FBT001 - a parameter
    rebooted: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Where one part differs it is not this process: not alive, not signalled."""
    other = dataclasses.replace(Identity.of(waiting.pid), **changes)  # type: ignore[arg-type] # a table of fields
    assert (other.alive(), other.is_here(), other.rebooted()) == (False, here, rebooted)
    assert not other.signal(signal.SIGKILL)
    other.end_group()
    assert other.end()
    assert waiting.poll() is None


def test_a_renamed_host_is_the_same_machine(waiting: subprocess.Popen[bytes]) -> None:
    """A laptop changes its name with the network; the boot id tells that it is still itself."""
    assert dataclasses.replace(Identity.of(waiting.pid), host="other-network").alive()


def test_a_zombie_is_dead(waiting: subprocess.Popen[bytes]) -> None:
    """A process that has ended but was not yet waited for is no living one."""
    identity = Identity.of(waiting.pid)
    identity.signal(signal.SIGKILL)
    wait_until(lambda: not identity.alive())
    assert Path(f"/proc/{waiting.pid}").exists()


@pytest.mark.parametrize(("program", "status"), [(WAITS, -signal.SIGTERM), (DEAF, -signal.SIGKILL)])
def test_end(program: str, status: int) -> None:
    """Asked first, then made to."""
    with start(program) as process:
        assert Identity.of(process.pid).end(0.3)
        assert process.wait(5) == status
        assert Identity.of(process.pid).end()


def test_end_group() -> None:
    """A session goes with its children."""
    program = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'input()'])\n"
        "print(child.pid, flush=True)\nchild.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        child = Identity.of(int(process.stdout.readline()))
        Identity.of(process.pid).end_group()
        wait_until(lambda: not child.alive())


def test_resident() -> None:
    """Memory is in bytes; a process that is gone has none."""
    assert 1 << 20 < resident(os.getpid()) < 1 << 40
    assert resident(2**22 + 1) == 0


def test_clean_environment() -> None:
    """An allow-list: names, prefixes, proxies in either case, and what --env names."""
    allowed = {"PATH": "1", "HF_HOME": "1", "LC_ALL": "1", "CUDA_VISIBLE_DEVICES": "", "https_proxy": "1", "TZ": "1"}
    refused = {"AWS_SECRET": "1", "PYTHONPATH": "1", "NBDEPLOY_KEY": "1", "path": "1"}
    assert clean_environment({**allowed, **refused}) == allowed
    assert clean_environment({**allowed, **refused}, ["AWS_SECRET", "MISSING"]) == {**allowed, "AWS_SECRET": "1"}


def test_kernel_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's path without the notebook's folder, the working directory, and twins; absolute."""
    notebook, working, kept = (tmp_path / name for name in ("notebook", "working", "kept"))
    for folder in (notebook, working, kept):
        folder.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr(sys, "path", ["", str(notebook), str(working), str(kept), str(kept), "../kept/relative"])
    assert kernel_path([notebook]) == [str(kept), str(working / "../kept/relative")]


PROBE = """
import json, os, sys
def main(argument):
    print(json.dumps([argument, sys.path[:1], dict(os.environ), sys.argv, sys.stdin.read(), sys.flags.isolated,
                      os.getcwd(), os.getsid(0) == os.getpid()]), flush=True)
"""


def test_launch(tmp_path: Path) -> None:
    """A clean process gets its order by standard input, so neither ps nor the environment shows it."""
    (tmp_path / "probe_of_launch.py").write_text(PROBE, encoding="utf-8")
    output = tmp_path / "output"
    server = str(Path(nbdeploy_server.__file__).parents[1])
    with output.open("wb") as file:
        process = launch(
            "probe_of_launch:main",
            {"key": "s3cret"},
            path=[str(tmp_path), server],
            environment={"ONLY": "this"},
            folder=tmp_path,
            output=file,
        )
    with process:
        assert process.wait(30) == 0
    argument, path, environ, argv, stdin, isolated, folder, leads = json.loads(output.read_text(encoding="utf-8"))
    assert argument == {"key": "s3cret"}
    assert (path, stdin, isolated, folder, leads) == ([str(tmp_path)], "", 1, str(tmp_path), True)
    assert environ["ONLY"] == "this"
    assert set(environ) <= {"ONLY", "LC_CTYPE"}
    assert "s3cret" not in " ".join(argv)


def test_launch_of_a_process_that_dies_at_once(tmp_path: Path) -> None:
    """Whoever starts it sees its exit status, not a broken pipe."""
    with (tmp_path / "output").open("wb") as file:
        process = launch(
            "m:f", {"x": "y" * (1 << 20)}, path=[], environment={}, folder=tmp_path, output=file, python="/bin/false"
        )
    with process:
        assert process.wait(10) == 1


def test_let_go() -> None:
    """A process that is let go leaves no zombie with its parent."""
    with start("print(1)") as process:
        let_go(process)
        wait_until(lambda: not Path(f"/proc/{process.pid}").exists())


def test_a_user_site_works_in_a_clean_process(tmp_path: Path) -> None:
    """What was installed with `pip install --user`, editable installs (.pth) in it too, is found under -I as well."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    user_site = tmp_path / "base" / "lib" / version / "site-packages"
    project = tmp_path / "project"
    user_site.mkdir(parents=True)
    project.mkdir()
    (project / "edited_by_user.py").write_text("WORD = 'found'\n", encoding="utf-8")
    (user_site / "edited.pth").write_text(f"{project}\n", encoding="utf-8")
    (user_site / "installed_by_user.py").write_text(
        "from pathlib import Path\nimport edited_by_user\n"
        "def main(argument): Path(argument['file']).write_text(edited_by_user.WORD)\n",
        encoding="utf-8",
    )
    code = f"""
import os, subprocess, sys
from pathlib import Path
sys.path.append({str(user_site)!r})
from nbdeploy.process import kernel_path, launch
argument = {{"file": {str(tmp_path / "word")!r}}}
environment = {{"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}}
process = launch("installed_by_user:main", argument, path=kernel_path(), environment=environment,
                 folder=Path({str(tmp_path)!r}), output=subprocess.DEVNULL)
sys.exit(process.wait(60))
"""
    environ = {**os.environ, "PYTHONUSERBASE": str(tmp_path / "base")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=90)
    assert (tmp_path / "word").read_text(encoding="utf-8") == "found"
