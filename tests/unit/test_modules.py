"""Local modules: the user's files travel, what is installed does not."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nbdeploy.capture import modules
from nbdeploy.errors import CannotTravelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A notebook's folder on sys.path; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    place = tmp_path / "book"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    yield place
    for name in set(sys.modules) - before:
        if str(place) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    """Write modules; `__SLASH__` in a name makes folders."""
    for name, text in files.items():
        path = folder / (name.replace("__SLASH__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def names(*wanted: str) -> list[str]:
    """Return the names of the local modules among these, and of what they import."""
    return [module.name for module in modules.local_modules(wanted)]


def test_files_beside_the_notebook_and_what_they_import(folder: Path) -> None:
    """A module travels with the local modules it imports, anywhere in its text; circles end."""
    write(folder, nb_model="import nb_utils, json, numpy\n", nb_utils="def f():\n    from nb_deep import x\n")
    write(folder, nb_deep="import nb_model\nx = 1\n", nb_other="")
    assert names("nb_model", "json") == ["nb_deep", "nb_model", "nb_utils"]
    (found,) = (one for one in modules.local_modules(["nb_model.sub"]) if one.name == "nb_model")
    assert found.files == {"nb_model.py": folder / "nb_model.py"}
    assert found.bytes == (folder / "nb_model.py").stat().st_size


def test_a_package_is_taken_whole(folder: Path) -> None:
    """Code, data and subpackages, without caches and version control; relative imports need no following."""
    write(
        folder,
        nb_kit__SLASH____init__="from . import a\n",
        nb_kit__SLASH__a="",
        nb_kit__SLASH__sub__SLASH__b="import nb_side\n",
    )
    write(folder, nb_side="")
    (folder / "nb_kit/data").mkdir()
    (folder / "nb_kit/data/x.bin").write_bytes(b"\0")
    for junk in ("__pycache__/a.pyc", ".git/config", "sub/.ipynb_checkpoints/b.py", "data/old.pyc"):
        (folder / "nb_kit" / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / "nb_kit" / junk).write_text("")
    kit, side = modules.local_modules(["nb_kit"])
    assert sorted(kit.files) == ["nb_kit/__init__.py", "nb_kit/a.py", "nb_kit/data/x.bin", "nb_kit/sub/b.py"]
    assert side.name == "nb_side"


def test_links_in_a_package_are_followed_once(folder: Path, tmp_path: Path) -> None:
    """A linked subfolder belongs to the package; a link to a folder above ends, a dead one is left out."""
    write(folder, nb_linked__SLASH____init__="")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.py").write_text("")
    (folder / "nb_linked/far").symlink_to(tmp_path / "elsewhere")
    (folder / "nb_linked/up").symlink_to(folder / "nb_linked")
    (folder / "nb_linked/.#lock").symlink_to("user@host.1")
    (found,) = modules.local_modules(["nb_linked"])
    assert sorted(found.files) == ["nb_linked/__init__.py", "nb_linked/far/c.py"]


def test_a_namespace_package(folder: Path) -> None:
    """A folder without __init__.py is a package too."""
    write(folder, nb_space__SLASH__part="x = 1\n")
    import nb_space.part  # type: ignore[import-not-found] # made above

    assert nb_space.part.x == 1
    (found,) = modules.local_modules(["nb_space"])
    assert list(found.files) == ["nb_space/part.py"]


def test_a_package_of_data_is_refused_with_its_largest_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more than code: the message names the largest file and --file."""
    write(folder, nb_heavy__SLASH____init__="")
    with (folder / "nb_heavy/weights.bin").open("wb") as file:
        file.truncate(modules.MAX_BYTES + 1)  # a sparse file: no real bytes
    with pytest.raises(
        CannotTravelError, match=r"nb_heavy beside the notebook holds 210 MB.*weights\.bin.*--file PATH"
    ):
        modules.local_modules(["nb_heavy"])


def test_what_is_installed_is_never_shipped(folder: Path) -> None:
    """The standard library, built-in modules, site-packages, nbdeploy itself and unknown names stay out."""
    assert (
        names("json", "sys", "numpy", "pytest", "nbdeploy", "nbdeploy_server", "__main__", "nb_unknown", "_ctypes")
        == []
    )


def test_a_module_made_by_hand_has_no_file(folder: Path) -> None:
    """It cannot travel, so it is none of ours: the clean process says that it is missing."""
    import types

    sys.modules["nb_ghost"] = types.ModuleType("nb_ghost")
    try:
        assert names("nb_ghost") == []
    finally:
        del sys.modules["nb_ghost"]


def test_editable_distributions_are_not_shipped_as_loose_code(tmp_path: Path) -> None:
    """The package of an editable install travels as its wheel; a helper beside a notebook in its project as a file."""
    project = tmp_path / "project"
    site = tmp_path / "site"
    write(project, src__SLASH__nb_edit__SLASH____init__="", notebooks__SLASH__nb_beside="import nb_edit\n")
    info = site / "nb_edit-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nb-edit\nVersion: 1.0\n")
    (info / "RECORD").write_text("nb_edit.pth,,\nnb_edit-1.0.dist-info/METADATA,,\nnb_edit-1.0.dist-info/RECORD,,\n")
    (info / "direct_url.json").write_text(f'{{"url": "{project.as_uri()}", "dir_info": {{"editable": true}}}}')
    (site / "nb_edit.pth").write_text(f"{project / 'src'}\n")
    code = (
        f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({str(project / 'notebooks')!r})\n"
        "from nbdeploy.capture.modules import local_modules\n"
        "import nb_beside\nprint([m.name for m in local_modules(['nb_beside'])])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "['nb_beside']\n"


def test_imports_of_a_file(tmp_path: Path) -> None:
    """Top-level names, anywhere in the file; relative imports name the package itself; a broken file names nothing."""
    path = tmp_path / "m.py"
    path.write_text(
        "import a.b, c as d\nfrom e.f import g\nfrom . import h\nfrom .i import j\ndef k():\n    import l\n"
    )
    assert modules.imports(path) == ["a", "c", "e", "l"]
    path.write_text("def broken(:\n")
    assert modules.imports(path) == []
    path.write_bytes(b"\0")
    assert modules.imports(path) == []


def test_a_file_edited_after_its_import_is_refused(folder: Path) -> None:
    """What runs here is not what would travel; a comment, a moved function or a reload is no difference."""
    import importlib

    source = (
        "K = {'a': 1}\nclass C:\n    def m(self): return [i for i in (1, 2)]\n"
        "def f(x, s={1, 2}): return x in {1, 2, 3}\n"
    )
    write(folder, nb_stale=source)
    stale = importlib.import_module("nb_stale")
    found = modules.local_modules(["nb_stale"])
    modules.check_fresh(found)
    write(folder, nb_stale="# a comment\n\n" + source)
    modules.check_fresh(found)
    for edit, name in (("(1, 2)]", "C.m"), ("x in", "f")):
        write(folder, nb_stale=source.replace(edit, {"(1, 2)]": "(1, 3)]", "x in": "x not in"}[edit]))
        with pytest.raises(
            CannotTravelError, match=rf"nb_stale\.py was edited .*: {name} in the file.*reload\(nb_stale\)"
        ):
            modules.check_fresh(found)
    stale.f = lambda x: x  # patched by the notebook: no edit of the file
    write(folder, nb_stale=source)
    modules.check_fresh(found)
    write(folder, nb_stale="def broken(:\n")
    modules.check_fresh(found)
