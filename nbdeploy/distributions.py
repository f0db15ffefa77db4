"""Installed distributions as their files on the disk tell them; nothing is imported and nothing is fetched."""

from __future__ import annotations

import ast
import csv
import functools
import importlib.machinery
import json
import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SUFFIXES = sorted(importlib.machinery.all_suffixes(), key=len, reverse=True)
NOT_SHIPPED = {
    "__pycache__",
    ".git",
    ".hg",
    ".svn",
    ".ipynb_checkpoints",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
}
_NOT_PACKAGES = {"benchmarks", "build", "dist", "doc", "docs", "example", "examples", "scripts", "test", "tests"}
_EDITABLE_FILES = ("__editable__", "_editable_impl_")


@dataclass(frozen=True)
class Distribution:
    """One installed distribution.

    Attributes:
        name: normalised as in PEP 503 ("scikit-learn").
        version: exact, with its local label ("2.7.1+cu128").
        origin: content of direct_url.json (PEP 610), or None where it came from an index.
        editable: its modules lie in a project folder that may change at any time.
        location: the folder that holds its metadata, mostly site-packages.
        missing: names of its own requirements that are not installed.
    """

    name: str
    version: str
    origin: dict[str, Any] | None
    editable: bool
    location: Path
    missing: tuple[str, ...] = ()

    @property
    def travels(self) -> bool:
        """Whether no index has it, so that it travels as a wheel: an editable, a local folder or file, a checkout."""
        if self.editable:
            return True
        origin = self.origin or {}
        return "vcs_info" in origin or "dir_info" in origin or str(origin.get("url", "")).startswith("file:")


def normalised(name: str) -> str:
    """Return the name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Installed:
    """An installed distribution as its files on the disk tell it; each part is read once, when asked for."""

    def __init__(self, found: metadata.Distribution, name: str, version: str) -> None:
        self.found = found
        self.name = normalised(name)
        self.version = version
        self.base = Path(str(found.locate_file("")))

    @functools.cached_property
    def record(self) -> tuple[str, ...]:
        """Paths of its files, relative to the base, as its RECORD lists them."""
        text = self.found.read_text("RECORD")
        if text is None:
            return tuple(str(path) for path in self.found.files or ())
        lines = text.splitlines()
        if '"' in text:  # a path with a comma; csv takes ten times as long as the usual case
            return tuple(row[0] for row in csv.reader(lines) if row)
        return tuple(line.rsplit(",", 2)[0] for line in lines if line)

    @functools.cached_property
    def is_source_tree(self) -> bool:
        """Whether this is egg-info beside its sources: an editable install of the old kind, or a checkout in use."""
        if self.found.read_text("PKG-INFO") is None or self.found.read_text("installed-files.txt") is not None:
            return False
        return any((self.base / name).is_file() for name in ("pyproject.toml", "setup.py", "setup.cfg")) or any(
            (self.base.parent / name).is_file() for name in ("pyproject.toml", "setup.py")
        )

    @functools.cached_property
    def origin(self) -> dict[str, Any] | None:
        """Its direct_url.json (PEP 610), where it did not come from an index."""
        text = self.found.read_text("direct_url.json")
        if not text or (self.found.read_text("INSTALLER") or "").strip() == "conda":
            return None  # conda leaves the folder of its build machine there, which says nothing here
        try:
            origin = json.loads(text)
        except ValueError:
            return None
        return origin if isinstance(origin, dict) else None

    @functools.cached_property
    def editable(self) -> bool:
        """Whether its code lies in a project's folder."""
        if (self.origin or {}).get("dir_info", {}).get("editable"):
            return True
        return any(path.startswith(_EDITABLE_FILES) for path in self.record) or self.is_source_tree

    @functools.cached_property
    def roots(self) -> dict[str, Path]:
        """Of an editable: dotted import name → its package folder or module file in the project."""
        names = (self.found.read_text("top_level.txt") or "").split()
        if self.is_source_tree:
            return _importable(self.base, self.name, names)
        roots: dict[str, Path] = {}
        for path in (path for path in self.record if "/" not in path):
            file = self.base / path
            if not (path.endswith((".py", ".pth")) and file.is_file()):
                continue
            text = file.read_text("utf-8", errors="replace")
            if path.endswith(".py"):
                roots.update(_mapped(text))
            for line in text.splitlines() if path.endswith(".pth") else ():
                folder = self.base / line.strip()
                if line.strip() and not line.startswith(("import ", "import\t", "#")) and folder.is_dir():
                    roots.update(_importable(folder, self.name, names))
        return roots

    @functools.cached_property
    def tops(self) -> frozenset[str]:
        """Names that `import` finds because of it."""
        if self.editable:
            return frozenset(name.partition(".")[0] for name in self.roots)
        names = set()
        for path in self.record:
            first, inside, _ = path.partition("/")
            if inside and not first.endswith((".dist-info", ".egg-info", ".data", "..")):
                names.add(first)
            elif not inside and first.endswith(tuple(_SUFFIXES)):
                names.add(first.partition(".")[0])
        return frozenset(names or (self.found.read_text("top_level.txt") or "").split())

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """Dotted names of every module and package it has."""
        names = set()
        for path in project_files(self.roots) if self.editable else self.record:
            suffix = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), None)
            if suffix is not None:
                names.add(path.removesuffix(suffix).replace("/", ".").removesuffix(".__init__"))
        return frozenset(names)

    def has_inside(self, package: str) -> bool:
        """Tell whether it has modules inside this package."""
        return any(module.startswith(f"{package}.") for module in self.modules)

    @functools.cached_property
    def requires(self) -> tuple[str, ...]:
        """Lines of Requires-Dist."""
        return tuple(self.found.requires or ())

    def described(self, missing: Iterable[str] = ()) -> Distribution:
        """Return it as plain data."""
        return Distribution(
            self.name, self.version, self.origin, self.editable, self.base, missing=tuple(sorted(set(missing)))
        )


class Index:
    """Every distribution on a search path: by its name, and by the names that it makes importable."""

    def __init__(self, path: Iterable[str]) -> None:
        self.named: dict[str, Installed] = {}
        for found in metadata.distributions(path=list(path)):
            about = found.metadata  # parsed anew at each look, so looked at once
            if "Name" not in about or "Version" not in about:
                continue  # left over from an install that was cut off
            installed = Installed(found, about["Name"], about["Version"])
            known = self.named.setdefault(installed.name, installed)
            if known.is_source_tree and not installed.is_source_tree:
                self.named[installed.name] = installed  # what an installer wrote knows more than leftovers of a build
        self.tops: dict[str, list[Installed]] = {}
        for _, installed in sorted(self.named.items()):
            for top in installed.tops:
                self.tops.setdefault(top, []).append(installed)

    def owners(self, module: str) -> list[Installed]:
        """Return the distributions that provide this module; all parts of a namespace where only that is named."""
        candidates = self.tops.get(module.partition(".")[0], [])
        if len(candidates) < 2:  # noqa: PLR2004 - one owner needs no look at its files
            return candidates
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            found = [one for one in candidates if name in one.modules]
            if found := found or [one for one in candidates if one.has_inside(name)]:
                return found
        return candidates


@functools.lru_cache(maxsize=4)
def _cachedindex_of(path: tuple[str, ...], _stamps: tuple[int, ...]) -> Index:
    return Index(path)


def index_of(path: Sequence[str] | None) -> Index:
    """Return the index of a search path; an install or removal changes its folder's time, and so makes a new one."""
    folders = tuple(dict.fromkeys(os.path.abspath(folder) for folder in (sys.path if path is None else path)))  # noqa: PTH100 - "" means the working folder, as in sys.path
    return _cachedindex_of(folders, tuple(_stamp(folder) for folder in folders))


def _stamp(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 - some entries of sys.path are no paths at all
    except (OSError, ValueError):
        return 0


def _mapped(text: str) -> dict[str, Path]:
    """Read what an editable's finder maps: {"name": "path"} (setuptools) or map_module(name, path) (editables)."""
    pairs: list[tuple[ast.expr | None, ast.expr]] = []
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs.extend(zip(node.keys, node.values, strict=True))
        elif isinstance(node, ast.Call) and len(node.args) == 2:  # noqa: PLR2004 - a name and a path
            pairs.append((node.args[0], node.args[1]))
    roots = {}
    for key, value in pairs:
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
            name, place = key.value, value.value
            if isinstance(name, str) and isinstance(place, str) and (root := _root(Path(place))):
                roots[name] = root
    return roots


def _root(place: Path) -> Path | None:
    if not place.is_absolute():
        return None
    if place.name == "__init__.py":
        return place.parent
    named = (place, *(place.with_name(place.name + suffix) for suffix in _SUFFIXES))
    return next((path for path in named if path.exists()), None)


def _importable(folder: Path, name: str, top_level: Sequence[str]) -> dict[str, Path]:
    """Return the packages and modules of a folder on the path that belong to a project, not its tests and scripts."""
    is_project = any((folder / file).is_file() for file in ("pyproject.toml", "setup.py", "setup.cfg"))
    own = {*top_level, name.replace("-", "_")}
    roots = {}
    for path in sorted(folder.iterdir()):
        top = path.name.partition(".")[0]
        if path.is_dir() and path.name.isidentifier() and path.name not in NOT_SHIPPED:
            if top_level:
                wanted = top in own
            elif is_project:  # the folder of the whole project is on the path, with all that lies in it
                wanted = top in own or ((path / "__init__.py").is_file() and top not in _NOT_PACKAGES)
            else:
                wanted = True
        else:
            is_module = path.is_file() and path.name.endswith(tuple(_SUFFIXES)) and top.isidentifier()
            wanted = is_module and (top in own or not (top_level or is_project))
        if wanted:
            roots[top] = path
    return roots


def project_files(roots: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of an editable: path in a wheel → file; caches and version control are left out."""
    files = {}
    for name, root in sorted(roots.items()):
        place = PurePosixPath(*name.split("."))
        if root.is_file():
            files[str(place.parent / root.name)] = root
            continue
        for folder, inner, leaves in os.walk(root):
            inner[:] = [each for each in inner if each not in NOT_SHIPPED]
            below = Path(folder)
            for leaf in leaves:
                if not leaf.endswith((".pyc", ".pyo")) and (below / leaf).is_file():
                    files[str(place / PurePosixPath(*below.relative_to(root).parts) / leaf)] = below / leaf
    return files
