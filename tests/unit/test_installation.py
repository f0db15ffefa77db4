"""A room holds exactly the lock: what works there has all its packages in a pod too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy import capture, environment, installation
from nbdeploy.errors import DeployError
from nbdeploy.installation import Room, installed, site
from nbdeploy.process import clean_environment, ends_within, kernel_path, launch
from nbdeploy.store import Store
from tests.server.conftest import cell
from tests.wheelhouse import make_wheel, row, wheelhouse

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["wheelhouse"]

CODE = """
import cloudpickle, {module}
def predict(x: int) -> int:
    return x + len({module}.__name__)
"""


def run(room: Room, code: str) -> str:
    """Run code in a room as a clean process does."""
    lines = f"import sys; sys.path[:] = {list(room.path)} + sys.path\n{code}"
    done = subprocess.run([room.python, "-I", "-c", lines], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def verify(store: Store, digest: str, folder: Path, path: list[str], python: str) -> dict[str, Any]:
    """Run the verification of a Bundle as the worker does, and return its report."""
    result = folder / f"{len(list(folder.iterdir()))}.json"
    with (folder / "log").open("ab") as output:
        process = launch(
            "nbdeploy_server.verify:main",
            {
                "store": str(store.root),
                "bundle": digest,
                "unpacked": str(folder / "unpacked"),
                "result": str(result),
            },
            path=path,
            environment=clean_environment(os.environ),
            folder=folder,
            output=output,
            python=python,
        )
    assert ends_within(process, 120.0), (folder / "log").read_text()
    assert result.exists(), (folder / "log").read_text()
    report: dict[str, Any] = json.loads(result.read_text())
    return report


@pytest.mark.slow
def test_package_missing_from_the_lock_fails_in_the_room(tmp_path: Path) -> None:
    """What works in the kernel's environment by luck fails in the room, and answers there once it is locked."""
    store = Store(tmp_path / "home" / "store")
    namespace = cell(CODE.format(module="networkx"))
    taken = capture.take(capture.Request(predict=namespace["predict"], sample={"x": 1}, folder=tmp_path), store)
    reports = {}
    for name, modules in (("short", ["cloudpickle"]), ("whole", ["cloudpickle", "networkx"])):
        rows = environment.lock(environment.needed(modules))
        digest = store.put_bundle({**taken.manifest, "distributions": rows})
        room = installed(rows, None, tmp_path / "home", on_progress=print)
        folder = tmp_path / name
        folder.mkdir()
        reports[name] = verify(store, digest, folder, list(room.path), str(room.python))
        kernel = verify(store, digest, folder, kernel_path(), sys.executable)
        assert kernel["ok"], kernel
    assert not reports["short"]["ok"]
    assert "networkx" in reports["short"]["reason"]
    assert reports["whole"]["ok"], reports
    assert reports["whole"]["parity"]["equal"]


def test_room_holds_the_lock_and_the_server_alone(tmp_path: Path, wheelhouse: Path) -> None:
    """Neither the kernel's packages nor nbdeploy's own folder can be seen; the room is made once."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"kind = 'fruit'\n"})
    words: list[str] = []
    first = installed([row("apple", "1.0")], None, tmp_path / "home", on_progress=words.append)
    again = installed([row("apple", "1.0")], None, tmp_path / "home", on_progress=words.append)
    assert first == again
    assert words == ["installing 1 packages as locked"]
    assert run(first, "import apple, nbdeploy_server.manifest; print(apple.kind)") == "fruit"
    for absent in ("numpy", "nbdeploy", "pytest"):
        assert "ModuleNotFoundError" in run(first, f"import {absent}")


def test_damaged_room_is_made_again(tmp_path: Path, wheelhouse: Path) -> None:
    """A file that is gone or was changed makes a new room; what running Python writes beside modules does not."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple/__init__.py": b"kind = 'fruit'\n", "apple/core.py": b""})
    words: list[str] = []
    home = tmp_path / "home"

    def made() -> Room:
        return installed([row("apple", "1.0")], None, home, on_progress=words.append)

    room = made()
    module = next(room.folder.rglob("apple/__init__.py"))
    run(room, "import apple.core")
    assert list(module.parent.glob("__pycache__/*"))
    made()
    assert len(words) == 1
    module.unlink()
    assert run(made(), "import apple.core; print(apple.kind)") == "fruit"
    core = module.with_name("core.py")
    core.unlink()
    core.write_text("kind = 0\n")
    assert run(made(), "import apple.core; print(apple.kind)") == "fruit"
    (room.folder / "contents.json").write_text("[[")
    assert run(made(), "import apple.core; print(apple.kind)") == "fruit"
    assert len(words) == 4


def test_two_deploys_at_once_install_once(tmp_path: Path, wheelhouse: Path) -> None:
    """Two processes that want the same room share it: one makes it, the other waits."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"kind = 'fruit'\n"})
    code = (
        "import sys, pathlib\nfrom nbdeploy.installation import installed\n"
        "row = {'name': 'apple', 'version': '1.0', 'origin': None, 'wheel': None}\n"
        "print(installed([row], None, pathlib.Path(sys.argv[1]), on_progress=print).python)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    outputs: list[str] = []

    def start() -> None:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        outputs.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text.count("installing") for text in outputs) == [0, 0, 1]
    assert len({text.splitlines()[-1] for text in outputs}) == 1
    assert len(list((tmp_path / "home" / "environments").glob("[!.]*"))) == 1


def test_failed_install_leaves_nothing(tmp_path: Path, wheelhouse: Path) -> None:
    """A package that cannot be had is named, and no half room stays."""
    with pytest.raises(DeployError, match=r"pear cannot be had for Python"):
        installed([row("pear", "1.0")], None, tmp_path / "home", on_progress=print)
    bad = make_wheel(wheelhouse, "plum", "1.0", {"plum.py": b""})
    bad.write_bytes(bad.read_bytes().replace(b"plum.py", b"plum.xx", 1))
    with pytest.raises(DeployError):
        installed([row("plum", "1.0")], None, tmp_path / "home", on_progress=print)
    assert not list((tmp_path / "home" / "environments").glob("[!.]*"))
    assert not list((tmp_path / "home" / "environments").glob("*.part"))


def test_oldest_unused_rooms_go(tmp_path: Path, wheelhouse: Path) -> None:
    """Rooms that nobody used for long make way for new ones; those in use since stay, however many there are."""
    rooms = []
    for number in range(5):
        make_wheel(wheelhouse, f"apple{number}", "1.0", {f"apple{number}.py": b""})
        rooms.append(installed([row(f"apple{number}", "1.0")], None, tmp_path / "home", on_progress=print).folder)
    assert all(folder.exists() for folder in rooms)
    for age, folder in enumerate(reversed(rooms), 1):
        then = folder.stat().st_mtime - age * installation.IDLE
        os.utime(folder, (then, then))
    installed([row("apple0", "1.0")], None, tmp_path / "home", on_progress=print)
    assert [folder.exists() for folder in rooms] == [True, False, False, True, True]


def test_travelling_wheel_is_left_to_the_bundle(tmp_path: Path, wheelhouse: Path) -> None:
    """A package that travels in the Bundle is not installed, and the lock still accepts its wheel."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"kind = 'fruit'\n"})
    own = make_wheel(tmp_path / "own", "mine", "0.1", {"mine.py": b""}, requires=("apple",))
    rows = [row("apple", "1.0"), row("mine", "0.1", own.name)]
    room = installed(rows, own.parent, tmp_path / "home", on_progress=print)
    assert run(room, "import apple; print(apple.kind)") == "fruit"
    assert "ModuleNotFoundError" in run(room, "import mine")
    assert [path.name for path in own.parent.iterdir()] == [own.name]
    folder = site(
        rows, own.parent, tmp_path / "sites", python="3.11", platform="aarch64-manylinux_2_28", on_progress=print
    ).folder
    assert (folder / "apple.py").exists()
    assert not (folder / "mine.py").exists()
