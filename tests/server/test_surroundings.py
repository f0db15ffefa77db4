"""What a Replica finds in its container: a user, folders, packages, variables of others."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from nbdeploy_server import __main__ as start

from tests.server.containers import ADD, PROGRAM

PACKAGES = sysconfig.get_paths()["purelib"]
BASE = Path(sys.base_prefix) / "bin" / "python3"  # an interpreter without our packages, as a base image has
LOOK = (
    "import os, sys\ndef predict(what: str) -> object:\n"
    "    if what == 'environ':\n        return sorted(os.environ)\n"
    "    return sys.path if what == 'path' else [os.getuid(), os.getcwd()]\n"
)


def test_the_environment_is_cleaned_and_isolated(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """User code sees no variable of nbdeploy, others as they are; PYTHON* variables and the folder change nothing."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "msgspec.py").write_text("raise RuntimeError('the wrong one')", encoding="utf-8")
    extra = {"PYTHONPATH": str(elsewhere), "NBDEPLOY_ANYTHING": "1", "MY_TOKEN": "t"}
    one = begin(bundle(LOOK), environment=extra).ready()
    seen = one.post({"what": "environ"}).json()
    assert "MY_TOKEN" in seen
    assert [name for name in seen if name.startswith("NBDEPLOY")] == []
    assert str(elsewhere) not in one.post({"what": "path"}).json()


def test_an_environment_in_a_folder_is_used(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """NBDEPLOY_SITE brings packages to an interpreter without any, its .pth files included, before the base's own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "packages.pth").write_text(f"{PACKAGES}\n", encoding="utf-8")
    one = begin(bundle(LOOK), python=[BASE], environment={"NBDEPLOY_SITE": str(site)}).ready()
    path = one.post({"what": "path"}).json()
    own = next(index for index, entry in enumerate(path) if entry.startswith(sys.base_prefix) and "site-" in entry)
    library = path.index(sysconfig.get_paths()["stdlib"])
    assert library < path.index(str(site)) < path.index(PACKAGES) < own


def test_paths_are_added_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand where the package is installed, nothing is put twice."""
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    start.add_paths(before[-1], "")
    assert sys.path == before
    start.add_paths(str(tmp_path), "")
    assert sys.path == [str(tmp_path), *before]


@pytest.mark.skipif(os.getuid() != 0, reason="changing the user needs root")
@pytest.mark.skipif(not Path("/usr/bin/python3.11").exists(), reason="needs a Python 3.11 that every user may run")
def test_it_runs_as_a_user_who_owns_nothing(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """As user 10001 on a Store of root's that it can only read, it serves, has a home, and changes nothing there."""
    store, digest = bundle(LOOK)
    server = tmp_path / "server"
    shutil.copytree(PROGRAM.parent, server / "nbdeploy_server", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (store, server):
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (tmp_path, *tmp_path.parents):
        if path == Path("/tmp"):  # noqa: S108 - where pytest keeps its folders
            break
        path.chmod(path.stat().st_mode | 0o011)
    before = sorted(store.rglob("*"))
    program = server / "nbdeploy_server" / "__main__.py"
    if not os.access(PACKAGES, os.X_OK) or not reachable(PACKAGES):
        pytest.skip("the packages lie in a folder that other users may not enter")
    one = begin(
        (store, digest),
        python=["/usr/bin/python3.11"],
        program=program,
        user=10001,
        environment={"NBDEPLOY_SITE": PACKAGES},
    ).ready()
    uid, folder = one.post({"what": "who"}).json()
    assert uid == 10001
    assert folder.endswith("/nbdeploy/files")
    assert {"HOME", "USER"} <= set(one.post({"what": "environ"}).json())
    assert sorted(store.rglob("*")) == before
    assert not list(server.rglob("__pycache__"))
    assert one.end() == 0


def reachable(folder: str) -> bool:
    """Whether every user may enter a folder."""
    return all(path.stat().st_mode & 0o001 for path in (Path(folder), *Path(folder).parents))


def test_a_folder_of_somebody_else_is_refused(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """Code is run out of the folder for unpacked files: where it cannot be made, that is told."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    one = begin(bundle(ADD), environment={"NBDEPLOY_UNPACKED": str(tmp_path / "file" / "below")})
    assert one.process.wait(60) == 3
    assert "NBDEPLOY_UNPACKED" in one.text()
