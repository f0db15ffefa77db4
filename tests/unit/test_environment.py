"""What a Capture needs is found in installed metadata, exactly, and what no index has travels as a wheel."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from nbdeploy.distributions import Distribution
from nbdeploy.environment import _foreign, distribution_of, lock, needed, owners, requirements, resolve
from nbdeploy.errors import CaptureError, DeployError
from nbdeploy.wheels import wheel


def uv(*arguments: str | Path) -> str:
    """Run uv without network."""
    from uv import find_uv_bin

    command = [find_uv_bin(), *map(str, arguments), "--offline", "--no-progress"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_venv(folder: Path) -> Path:
    """Make an empty virtual environment; return its site-packages."""
    uv("venv", "--python", sys.executable, folder)
    scheme = {"base": str(folder), "platbase": str(folder)}
    return Path(sysconfig.get_path("purelib", "venv", vars=scheme))


def python_of(site: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return Path(sysconfig.get_path("scripts", "venv", vars={"base": str(site.parents[2])})) / "python"


def run(site: Path, code: str) -> str:
    """Run code in a virtual environment, in a clean process."""
    command: list[str | Path] = [python_of(site), "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def lend(site: Path, *names: str) -> None:
    """Make build backends of this environment importable in another one, with what they require."""
    for one in needed([], also=names):
        tops = {path.parts[0] for path in metadata.distribution(one.name).files or () if path.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(one.location / top)


def fake(
    site: Path, name: str, version: str = "1.0", *, requires: tuple[str, ...] = (), files: tuple[str, ...] = ()
) -> Path:
    """Write an installed distribution as an installer leaves it; return its .dist-info."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        *(f"Requires-Dist: {each}\n" for each in requires),
    ]
    (info / "METADATA").write_text("".join(lines))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("raise RuntimeError('imported')\n")
    listed = [*files, f"{info.name}/METADATA", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f'"{each}",,\n' if "," in each else f"{each},,\n" for each in listed))
    return info


def project(folder: Path, backend: str, *, extra: str = "") -> Path:
    """Write a small project in src layout with a package, data, a command and a test."""
    package = folder / "src" / "spam_eggs"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("from spam_eggs.inner import answer\n")
    (package / "inner.py").write_text(
        "from importlib.resources import files\n"
        "def answer():\n    return (files('spam_eggs') / 'data' / 'answer.txt').read_text()\n"
        "def main():\n    print('command', answer())\n"
    )
    (package / "data" / "answer.txt").write_text("42")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "inner.cpython-311.pyc").write_bytes(b"stale")
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").write_text("")
    name = {"hatchling": "hatchling.build", "setuptools": "setuptools.build_meta"}[backend]
    (folder / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["{backend}"]\nbuild-backend = "{name}"\n'
        '[project]\nname = "Spam.Eggs"\nversion = "1.2+local.3"\n[project.scripts]\nspam = "spam_eggs.inner:main"\n'
        + extra
    )
    return folder


def install(site: Path, *arguments: str | Path) -> None:
    """Install into a virtual environment without looking at requirements."""
    uv("pip", "install", "--no-deps", "--no-build-isolation", "--python", python_of(site), *arguments)


def names(found: tuple[Distribution, ...]) -> list[str]:
    """Return the names of distributions."""
    return [one.name for one in found]


def test_what_is_needed_here_without_imports() -> None:
    """A real environment: roots and their closure, exact versions, server and cloudpickle always, nothing imported."""
    code = (
        "import sys; from nbdeploy.environment import needed; "
        "print(*(f'{d.name}=={d.version}' for d in needed(['sklearn.svm', 'os.path', 'no_such_module']))); "
        "print('sklearn' in sys.modules, 'fastapi' in sys.modules)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    pins, imported = result.stdout.splitlines()
    for name in ("scikit-learn", "joblib", "cloudpickle", "msgspec", "fastapi", "starlette", "pydantic-core"):
        assert f"{name}=={metadata.version(name)}" in pins.split()
    assert "pytest" not in pins
    assert imported == "False False"


def test_closure_follows_markers_and_extras(tmp_path: Path) -> None:
    """Markers decide, extras count only where asked for, cycles end, names are normalised, the unneeded stays out."""
    fake(tmp_path, "Root.Thing", requires=("Mid_Dle[fast]", "gone; python_version < '3'"), files=("root/__init__.py",))
    fake(
        tmp_path, "mid-dle", "2.7.1+cu128", requires=("root-thing", 'quick; extra == "fast"', 'slow; extra == "other"')
    )
    fake(tmp_path, "quick", requires=("not a requirement !!",))
    fake(tmp_path, "slow")
    found = needed(["root.sub"], also=(), path=[str(tmp_path)])
    assert [(one.name, one.version) for one in found] == [
        ("mid-dle", "2.7.1+cu128"),
        ("quick", "1.0"),
        ("root-thing", "1.0"),
    ]
    assert names(needed([], also=("mid.dle[other]",), path=[str(tmp_path)])) == [
        "mid-dle",
        "quick",
        "root-thing",
        "slow",
    ]


def test_what_is_missing_is_told_not_raised(tmp_path: Path) -> None:
    """A hard requirement that is not installed stands in `missing`; an optional one does not; a root is warned of."""
    fake(tmp_path, "a", requires=("hard", 'soft; extra == "x"'), files=("a.py",))
    (tmp_path / "broken-1.dist-info").mkdir()
    assert [(one.name, one.missing) for one in needed(["a"], also=(), path=[str(tmp_path)])] == [("a", ("hard",))]
    with pytest.warns(UserWarning, match="nothing-here is needed but not installed"):
        assert needed([], also=("nothing-here",), path=[str(tmp_path)]) == ()


def test_a_namespace_is_resolved_by_files(tmp_path: Path) -> None:
    """Of distributions that share a top name, the one with the module's file is taken; all where none is named."""
    path = [str(tmp_path)]
    fake(tmp_path, "storage", files=("cloud/one/storage/__init__.py", "cloud/one/storage/blob.py"))
    fake(tmp_path, "query", files=("cloud/one/query.cpython-311-x86_64-linux-gnu.so",) if os.name != "nt" else ())
    fake(tmp_path, "proto", files=("cloud/__init__.py", "cloud/with, comma.txt"))
    assert names(owners("cloud.one.storage.blob.Blob", path=path)) == ["storage"]
    assert names(owners("cloud.one", path=path)) == ["query", "storage"]
    assert names(owners("cloud", path=path)) == ["proto"]
    assert owners("elsewhere", path=path) == ()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the name of the compiled module is Linux's")
def test_a_compiled_module_of_a_namespace_is_found(tmp_path: Path) -> None:
    """A compiled module counts as its import name."""
    compiled = f"cloud/query{sysconfig.get_config_var('EXT_SUFFIX')}"
    fake(tmp_path, "query", files=(compiled,))
    fake(tmp_path, "other", files=("cloud/other.py",))
    assert names(owners("cloud.query", path=[str(tmp_path)])) == ["query"]


def test_an_install_between_two_calls_is_seen(tmp_path: Path) -> None:
    """`%pip install` in the notebook counts at the next call: the cache looks at the folder."""
    assert needed(["late"], also=(), path=[str(tmp_path)]) == ()
    fake(tmp_path, "late", files=("late.py",))
    os.utime(tmp_path, ns=(1, 1))  # clocks of file systems may be too coarse for two writes in a row
    assert names(needed(["late"], also=(), path=[str(tmp_path)])) == ["late"]


def test_origin_decides_what_travels(tmp_path: Path) -> None:
    """Local folders and checkouts travel, index and web archives are pinned, conda's build folders are ignored."""
    origins = {
        "folder": {"url": "file:///x", "dir_info": {}},
        "checkout": {"url": "https://example.com/x.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
        "archive": {"url": "https://example.com/x.whl", "archive_info": {"hashes": {"sha256": "ab"}}},
        "conda": {"url": "file:///build/work", "dir_info": {}},
    }
    for name, origin in origins.items():
        info = fake(tmp_path, name)
        (info / "direct_url.json").write_text(json.dumps(origin))
        (info / "INSTALLER").write_text("conda\n" if name == "conda" else "pip\n")
    found = {one.name: one for one in needed([], also=tuple(origins), path=[str(tmp_path)])}
    assert {name: one.travels for name, one in found.items()} == {
        "folder": True,
        "checkout": True,
        "archive": False,
        "conda": False,
    }
    assert found["conda"].origin is None
    assert found["checkout"].origin == origins["checkout"]
    rows = lock(found.values(), {"folder": "wheels/folder-1.0-py3-none-any.whl", "checkout": "wheels/checkout.whl"})
    assert rows[0] == {"name": "archive", "version": "1.0", "origin": origins["archive"], "wheel": None}
    assert requirements(rows).splitlines() == [
        "archive @ https://example.com/x.whl#sha256=ab",
        "./wheels/checkout.whl",
        "conda==1.0",
        "./wheels/folder-1.0-py3-none-any.whl",
    ]


@pytest.mark.parametrize("backend", ["hatchling", "setuptools"])
def test_an_editable_install_travels(tmp_path: Path, backend: str) -> None:
    """An editable is found by its modules and files; its wheel, made without the backend, works in a fresh venv."""
    pytest.importorskip(backend)
    # without naming the folder, hatchling asks for the package "editables", which tests do without
    extra = '[tool.hatch.build]\ndev-mode-dirs = ["src"]\n' if backend == "hatchling" else ""
    folder = project(tmp_path / "project", backend, extra=extra)
    site = make_venv(tmp_path / "notebook")
    lend(site, backend)
    install(site, "-e", folder)
    path = [str(site)]
    (found,) = needed(["spam_eggs.inner"], also=(), path=path)
    assert (found.name, found.version, found.editable, found.travels) == ("spam-eggs", "1.2+local.3", True, True)
    assert distribution_of(folder / "src" / "spam_eggs" / "inner.py", path=path) == found
    assert distribution_of(folder / "tests" / "__init__.py", path=path) is None

    (folder / "src" / "spam_eggs" / "data" / "answer.txt").write_text("43")  # as it is now, not as it was installed
    made = wheel(found, tmp_path / "wheels")
    assert made.name == "spam_eggs-1.2+local.3-py3-none-any.whl"
    fresh = make_venv(tmp_path / "fresh")
    install(fresh, made)
    assert run(fresh, "import spam_eggs; print(spam_eggs.answer(), spam_eggs.__file__)") == (
        f"43 {fresh / 'spam_eggs' / '__init__.py'}"
    )
    command = python_of(fresh).with_name("spam")
    assert subprocess.run([command], capture_output=True, text=True, check=True).stdout == "command 43\n"
    from_archive = f"import sys; sys.path.insert(0, {str(made)!r}); import spam_eggs; print(spam_eggs.answer())"
    assert run(make_venv(tmp_path / "empty"), from_archive) == "43"


def test_a_project_folder_on_the_path_leaves_its_tests_out(tmp_path: Path) -> None:
    """In a flat layout the project's folder is on the path: its packages travel, its tests and scripts do not."""
    folder = project(
        tmp_path / "project", "hatchling", extra='[tool.hatch.build]\npackages = ["spam_eggs"]\ndev-mode-dirs = ["."]\n'
    )
    (folder / "src" / "spam_eggs").rename(folder / "spam_eggs")
    (folder / "train.py").write_text("")
    site = make_venv(tmp_path / "notebook")
    pytest.importorskip("hatchling")
    lend(site, "hatchling")
    install(site, "-e", folder)
    (found,) = owners("spam_eggs", path=[str(site)])
    with zipfile.ZipFile(wheel(found, tmp_path)) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {
            "spam_eggs",
            "spam_eggs-1.2+local.3.dist-info",
        }
    assert distribution_of(folder / "train.py", path=[str(site)]) is None
    assert owners("train", path=[str(site)]) == ()


def test_a_local_install_travels(tmp_path: Path) -> None:
    """What was installed from a folder is packed from its RECORD, without the installer's marks, and is complete."""
    pytest.importorskip("hatchling")
    site = make_venv(tmp_path / "notebook")
    lend(site, "hatchling")
    install(site, project(tmp_path / "project", "hatchling"))
    (found,) = owners("spam_eggs", path=[str(site)])
    assert (found.editable, found.travels) == (False, True)
    made = wheel(found, tmp_path / "wheels")
    with zipfile.ZipFile(made) as archive:
        info = "spam_eggs-1.2+local.3.dist-info"
        assert sorted(archive.namelist()) == [
            f"{info}/METADATA",
            f"{info}/RECORD",
            f"{info}/WHEEL",
            f"{info}/entry_points.txt",
            "spam_eggs/__init__.py",
            "spam_eggs/data/answer.txt",
            "spam_eggs/inner.py",
        ]
    fresh = make_venv(tmp_path / "fresh")
    install(fresh, made)
    assert run(fresh, "import spam_eggs; print(spam_eggs.answer())") == "42"


def test_a_checkout_in_use_is_an_editable(tmp_path: Path) -> None:
    """egg-info beside its sources is an editable of the old kind; what an installer wrote goes before it."""
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "__init__.py").write_text("VALUE = 7\n")
    info = tmp_path / "old.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: old\nVersion: 3\n")
    (info / "top_level.txt").write_text("old\n")
    (info / "SOURCES.txt").write_text("setup.py\nold/__init__.py\n")
    (found,) = owners("old", path=[str(tmp_path)])
    assert (found.editable, found.version) == (True, "3")
    made = wheel(found, tmp_path / "wheels")
    code = f"import sys; sys.path.insert(0, {str(made)!r}); import old; print(old.VALUE)"
    assert (
        subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout == "7\n"
    )
    fake(tmp_path / "site", "old", "4", files=("old.py",))
    assert owners("old", path=[str(tmp_path), str(tmp_path / "site")])[0].version == "4"


def test_equal_files_make_equal_wheels(tmp_path: Path) -> None:
    """Times and order of files leave no trace in the bytes; RECORD has the true digests."""
    made = []
    for name, files in (("one", ("p/a.py", "p/b.py")), ("two", ("p/b.py", "p/a.py"))):
        info = fake(tmp_path / name, "p", files=files)
        (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {}}')
        (found,) = owners("p", path=[str(tmp_path / name)])
        made.append(wheel(found, tmp_path / name / "wheels"))
        os.utime(tmp_path / name / "p" / "a.py", (1, 1))
        assert wheel(found, tmp_path / name / "wheels").read_bytes() == made[-1].read_bytes()
        assert list(made[-1].parent.iterdir()) == [made[-1]]
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as archive:
        record = archive.read("p-1.0.dist-info/RECORD").decode()
        digest = hashlib.sha256(archive.read("p/a.py")).digest()
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert f"p/a.py,sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},31\n" in record


def test_a_compiled_wheel_is_for_this_python_only(tmp_path: Path) -> None:
    """With a shared library inside, the wheel names this Python and platform, and is no pure one."""
    fake(tmp_path, "fast-c", files=("fast_c/__init__.py", "fast_c/_impl.so"))
    (found,) = owners("fast_c", path=[str(tmp_path)])
    made = wheel(found, tmp_path)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert made.name == f"fast_c-1.0-{python}-{python}-{platform}.whl"
    with zipfile.ZipFile(made) as archive:
        assert b"Root-Is-Purelib: false" in archive.read("fast_c-1.0.dist-info/WHEEL")


def test_scripts_outside_of_site_packages_travel(tmp_path: Path) -> None:
    """A script that no entry point makes, and data of the prefix, are put where a wheel has them."""
    site = make_venv(tmp_path / "venv")
    info = fake(site, "tool", files=("tool.py",))
    prefix = site.parents[2]
    (prefix / "bin").mkdir(exist_ok=True)
    (prefix / "bin" / "toolrun").write_text(f"#!{python_of(site)}\nimport sys; print(sys.prefix)\n")
    (prefix / "share").mkdir()
    (prefix / "share" / "tool.txt").write_text("data")
    with (info / "RECORD").open("a") as record:
        record.write("../../../bin/toolrun,,\n../../../share/tool.txt,,\n")
    made = wheel(owners("tool", path=[str(site)])[0], tmp_path)
    fresh = make_venv(tmp_path / "fresh")
    install(fresh, made)
    other = fresh.parents[2]
    shown = subprocess.run([other / "bin" / "toolrun"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(other)
    assert (other / "share" / "tool.txt").read_text() == "data"


def test_what_cannot_be_packed_is_told(tmp_path: Path) -> None:
    """A removed file, an editable of an unknown kind, a distribution that is gone: said with what to do."""
    fake(tmp_path, "torn", files=("torn.py",))
    (found,) = owners("torn", path=[str(tmp_path)])
    (tmp_path / "torn.py").unlink()
    with pytest.raises(CaptureError, match=r"torn 1.0 cannot be packed.*torn\.py.*install torn again"):
        wheel(found, tmp_path / "wheels")
    assert not list((tmp_path / "wheels").iterdir())
    info = fake(tmp_path, "strange")
    (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    with (info / "RECORD").open("a") as record:
        record.write("__editable__.strange-1.0.pth,,\n")  # listed, but gone
    (strange,) = needed([], also=("strange",), path=[str(tmp_path)])
    with pytest.raises(CaptureError, match="strange is installed as editable in a way"):
        wheel(strange, tmp_path)
    with pytest.raises(CaptureError, match="gone is no longer installed"):
        wheel(Distribution("gone", "1", None, editable=False, location=tmp_path), tmp_path)


def test_wheels_are_locked_by_relative_path(tmp_path: Path) -> None:
    """A lock of travelling wheels needs no network, names them relative to the Bundle's files, with their digests."""
    fake(tmp_path, "mine", "1.0+local.1", files=("mine.py",))
    (found,) = owners("mine", path=[str(tmp_path)])
    made = wheel(found, tmp_path / "files" / "wheels")
    rows = lock([found], {"mine": f"wheels/{made.name}"})
    text = resolve(rows, python="3.11", platform=None, wheels=tmp_path / "files")
    (package,) = tomllib.loads(text)["packages"]
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    assert package["name"] == "mine"
    assert package["archive"] == {"path": f"wheels/{made.name}", "hashes": {"sha256": digest}}
    with pytest.raises(DeployError, match=r"the lock has mine 1\.0\+local\.1, but the notebook runs 2"):
        resolve([{**rows[0], "version": "2"}], python="3.11", platform=None, wheels=tmp_path / "files")


def test_a_wheel_that_is_gone_gives_uvs_reason(tmp_path: Path) -> None:
    """The words of uv come back, in one line."""
    rows = [{"name": "mine", "version": "1", "origin": None, "wheel": "wheels/mine-1-py3-none-any.whl"}]
    with pytest.raises(DeployError, match=r"mine cannot be had for Python 3\.11: Distribution not found") as error:
        resolve(rows, python="3.11", platform=None, wheels=tmp_path)
    assert "\n" not in str(error.value)


def pin(name: str, version: str) -> dict[str, object]:
    """Return a row of a distribution that came from an index."""
    return {"name": name, "version": version, "origin": None, "wheel": None}


@pytest.mark.slow
def test_pins_are_locked_exactly() -> None:
    """Asks the index: exactly the pinned versions come, with digests, for the platform that was asked for."""
    rows = [pin("click", "8.1.7"), pin("msgspec", "0.19.0")]
    for platform in (None, "aarch64-manylinux_2_28"):
        packages = {
            each["name"]: each
            for each in tomllib.loads(resolve(rows, python="3.11", platform=platform, wheels=None))["packages"]
        }
        assert {name: each["version"] for name, each in packages.items()} == {"click": "8.1.7", "msgspec": "0.19.0"}
        assert all(item["hashes"]["sha256"] for item in packages["msgspec"]["wheels"])
    assert any("aarch64" in item["url"] for item in packages["msgspec"]["wheels"])


@pytest.mark.slow
def test_pins_that_no_index_has_are_named() -> None:
    """A local label that the index lacks, and an unknown package, are named with the way out."""
    with pytest.raises(DeployError, match=r"torch cannot be had .*torch 2\.7\.1\+cu128 is a build for.*torch_index"):
        resolve([pin("click", "8.1.7"), pin("torch", "2.7.1+cu128")], python="3.11", platform=None, wheels=None)
    unknown = "nbdeploy-has-no-such-package"
    with pytest.raises(DeployError, match=f"{unknown} cannot be had .*{unknown} is in no index that is asked"):
        resolve([pin(unknown, "1")], python="3.11", platform=None, wheels=None)


def test_our_own_constant_is_complete() -> None:
    """Every package that the server imports when it starts is among those that always travel."""
    server = importlib.util.find_spec("nbdeploy_server")
    assert server is not None
    assert server.origin is not None
    imported: set[str] = set()
    for file in Path(server.origin).parent.rglob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    travels = set(names(needed([])))
    for module in imported - sys.stdlib_module_names - {"nbdeploy_server"}:
        assert travels.intersection(names(owners(module))), f"{module} is imported by the server, and does not travel"


def test_a_platform_is_foreign_by_system_or_processor() -> None:
    """Only another system or processor needs other packages; another libc version of this one does not."""
    here = {"x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}[os.uname().machine]
    own, other = (f"{here}-manylinux_2_28", "x86_64-pc-windows-msvc")
    if sys.platform == "darwin":
        own = f"{here}-apple-darwin"
    assert not _foreign(own)
    assert _foreign(other)
    assert _foreign(own.replace(here, "aarch64" if here == "x86_64" else "x86_64"))
