"""The two wheels: one for users with both packages, one for Replicas alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import uv
from packaging.requirements import Requirement

from nbdeploy.environment import ALWAYS

ROOT = Path(__file__).parents[2]


def build(folder: Path, target: Path) -> zipfile.ZipFile:
    """Build a wheel with the installed hatchling, without network."""
    command = [uv.find_uv_bin(), "build", "--wheel", "--no-build-isolation", "--quiet", "--python", sys.executable]
    subprocess.run([*command, "--out-dir", str(target), str(folder)], check=True, capture_output=True, text=True)
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def names(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements name."""
    return {Requirement(text).name for text in requirements}


@pytest.mark.slow
def test_users_wheel_holds_both_packages(tmp_path: Path) -> None:
    """One wheel brings nbdeploy and nbdeploy_server, the command and the local engine; no test rides along."""
    with build(ROOT, tmp_path) as wheel:
        files = wheel.namelist()
        points = next(wheel.read(name).decode() for name in files if name.endswith("entry_points.txt"))
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nbdeploy", "nbdeploy_server"}
    assert "nbdeploy = nbdeploy.cli:main" in points
    assert "local = nbdeploy.engines.local.engine:LocalEngine" in points
    assert {"nbdeploy/py.typed", "nbdeploy_server/py.typed"} <= set(files)


@pytest.mark.slow
def test_replicas_wheel_is_the_server_alone(tmp_path: Path) -> None:
    """The replica-only wheel holds nbdeploy_server and nothing of nbdeploy."""
    with build(ROOT / "server", tmp_path) as wheel:
        tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nbdeploy_server"}


def test_one_list_of_the_servers_needs() -> None:
    """What a Bundle locks for the server is what the server's wheel requires, and users' wheel requires no less."""
    server = tomllib.loads((ROOT / "server" / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    users = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert names(server) == names(list(ALWAYS))
    assert names(server) <= names(users)


def test_dependencies_have_lower_bounds_only() -> None:
    """An upper bound in the user's own environment breaks other people's installs."""
    users = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {str(one.specifier)[:2] for one in map(Requirement, users)} == {">="}
