"""The repository keeps its own promises: file map, public names, cheap import, forbidden words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbdeploy

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "numpy",
    "pandas",
    "transformers",
    "kubernetes",
    "fastapi",
    "jupyter_server",
    "IPython",
    "httpx",
    "sklearn",
}


def tracked() -> list[str]:
    """Return the files of the repository, new ones included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - the git of this checkout
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_file_map_equals_the_tree() -> None:
    """The README's map names every file, alone or by its folder, and nothing else."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## File map")[2]
    named = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    folders = tuple(name for name in named if name.endswith("/"))
    unnamed = [file for file in tracked() if file not in named and not file.startswith(folders)]
    gone = [name for name in named if not (ROOT / name).exists()]
    assert (unnamed, gone) == ([], [])


def test_public_names() -> None:
    """`__all__` holds at most twelve names, and each can be had."""
    assert len(nbdeploy.__all__) <= 12
    assert sorted(nbdeploy.__all__) == nbdeploy.__all__ or set(nbdeploy.__all__)
    for name in nbdeploy.__all__:
        assert getattr(nbdeploy, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_the_sort"):
        nbdeploy.nothing_of_the_sort  # noqa: B018 - reading it is the test


def test_deploy_stays_a_function() -> None:
    """Importing any module of nbdeploy does not hide the function `nbdeploy.deploy`."""
    code = "import nbdeploy.deploying, nbdeploy.endpoint, nbdeploy.worker, nbdeploy; assert callable(nbdeploy.deploy)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_is_cheap() -> None:
    """`import nbdeploy` loads no heavy package; nor does naming its spec types."""
    code = (
        "import sys, json, nbdeploy; nbdeploy.Resources; print(json.dumps([n.partition('.')[0] for n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_forbidden_words() -> None:
    """No module is called utils, helpers, common, core or manager; `deployment` is no noun of ours."""
    names = [Path(file).stem for file in tracked() if file.endswith(".py")]
    assert {"utils", "helpers", "common", "core", "manager", "backend"} & set(names) == set()
    source = [file for file in tracked() if file.startswith(("nbdeploy/", "server/")) and file.endswith(".py")]
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in source}
    # Deployment is a kind of Kubernetes, and `deployments` its name in paths and Roles: only that engine speaks of it.
    ours = {file: text for file, text in texts.items() if not file.startswith("nbdeploy/engines/kubernetes/")}
    assert [file for file, text in ours.items() if re.search(r"\bdeployments?\b", text)] == []
    prose = r"\b[Aa] deployment\b|\b(the|your|our) deployments?\b"
    assert [file for file, text in texts.items() if re.search(prose, text)] == []


def test_size_of_modules() -> None:
    """No module has more than 500 lines."""
    source = [file for file in tracked() if file.startswith(("nbdeploy/", "server/")) and file.endswith(".py")]
    assert [file for file in source if len((ROOT / file).read_text(encoding="utf-8").splitlines()) > 500] == []


def test_no_lock_names_a_host() -> None:
    """The committed versions hold no index address."""
    for file in (ROOT / "requirements").iterdir():
        assert "://" not in file.read_text(encoding="utf-8")
