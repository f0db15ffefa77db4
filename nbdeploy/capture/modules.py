"""Local modules: the user's own files beside the notebook, which travel as files.

By file, not by value: lazy and relative imports, resources and class identity keep working in the Replica.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import site
import sys
import sysconfig
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nbdeploy import environment
from nbdeploy.capture.folder import walk
from nbdeploy.errors import CannotTravelError

MAX_BYTES = 200 * 1024 * 1024  # of one package: more is data that does not belong among code
_LEFT_OUT = {"__pycache__", ".git", ".ipynb_checkpoints", ".mypy_cache", ".pytest_cache", "node_modules", ".venv"}


@dataclass(frozen=True)
class LocalModule:
    """A top-level module of the user.

    Attributes:
        name: as imported.
        files: path in the Bundle's code folder → file on disk.
    """

    name: str
    files: dict[str, Path]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def installed_places() -> tuple[Path, ...]:
    """Return the folders of the standard library and of installed packages."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= set(site.getsitepackages()) | {site.getusersitepackages()}
    paths |= {entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
    paths |= {entry for entry in sys.path if entry.endswith(".zip")}
    return tuple({Path(path).resolve() for path in paths if path})


def origin_of(name: str) -> Path | None:
    """Return the file of a top-level module that is imported, or could be; None for built-in and frozen ones."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        if file:
            return Path(file).resolve()
        places = list(getattr(module, "__path__", ()))  # a namespace package
        return (Path(places[0]).resolve() / "__init__.py") if places else None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    return Path(spec.origin).resolve()


def is_local(name: str, places: tuple[Path, ...]) -> bool:
    """Whether a top-level module is a file of the user, neither installed nor part of an editable distribution."""
    if name in sys.stdlib_module_names or name in {"__main__", "__mp_main__", "nbdeploy", "nbdeploy_server"}:
        return False
    origin = origin_of(name)
    if origin is None:
        return False
    if any(origin.is_relative_to(place) for place in places):
        # site-packages may lie inside a project's folder, but never the other way round
        return False
    return environment.distribution_of(origin) is None  # editable ones travel as wheels


def local_modules(names: Iterable[str]) -> tuple[LocalModule, ...]:
    """Return the local modules among these module names (their first part counts), and those they import in turn.

    Raises:
        CannotTravelError: a package folder holds far more than code.
    """
    places = installed_places()
    found: dict[str, LocalModule] = {}
    todo = sorted({name.partition(".")[0] for name in names})
    while todo:
        name = todo.pop()
        if name in found or not is_local(name, places):
            continue
        module = found[name] = _collect(name)
        for path in module.files.values():
            if path.suffix == ".py":
                todo += imports(path)
    return tuple(found[name] for name in sorted(found))


def _collect(name: str) -> LocalModule:
    origin = origin_of(name)
    if origin is None:
        raise CannotTravelError(f"The module {name!r} has no file that could travel.")
    if origin.name != "__init__.py":
        return LocalModule(name, {origin.name: origin})
    folder = origin.parent
    found = (path for path in walk(folder, _LEFT_OUT) if path.suffix != ".pyc" and path.is_file())
    files = {f"{name}/{path.relative_to(folder).as_posix()}": path for path in found}
    module = LocalModule(name, files)
    if module.bytes > MAX_BYTES:
        largest = max(files.values(), key=lambda path: path.stat().st_size)
        raise CannotTravelError(
            f"The package {name} beside the notebook holds {module.bytes / 1e6:.0f} MB, the largest file is "
            f"{largest.relative_to(folder)}. Move data out of the package and name it with --file PATH."
        )
    return module


def imports(path: Path) -> list[str]:
    """Return the top-level names that a source file imports anywhere in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a template or broken file in the package: nothing imports it either
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return sorted(names)


def check_fresh(modules: Iterable[LocalModule]) -> None:
    """Refuse files that were edited since this notebook imported them: what runs here is not what would travel.

    Functions are compared by their code, so that a touched file, a new comment or a reloaded module is no edit.

    Raises:
        CannotTravelError: naming the file and the function.
    """
    loaded = {
        str(Path(file).resolve()): module
        for module in list(sys.modules.values())
        if (file := getattr(module, "__file__", None)) and isinstance(file, str)
    }
    for module in modules:
        for place, path in module.files.items():
            if path.suffix == ".py" and (live := loaded.get(str(path.resolve()))) is not None:
                name = _edited(live, path)
                if name:
                    raise CannotTravelError(
                        f"{place} was edited after this notebook imported it: {name} in the file is not the one "
                        f"that runs here. Restart the kernel, or run importlib.reload({live.__name__}) and the cells "
                        "that use it."
                    )


def _edited(module: types.ModuleType, path: Path) -> str:
    """Return the name of a function whose code in the file differs from the live one, or ""."""
    try:
        written = _functions(compile(path.read_bytes(), str(path), "exec", dont_inherit=True))
    except (SyntaxError, ValueError, OSError):
        return ""
    for holder in (module, *(item for item in vars(module).values() if isinstance(item, type))):
        if isinstance(holder, type) and holder.__module__ != module.__name__:
            continue
        for item in list(vars(holder).values()):
            function = item.__func__ if isinstance(item, (staticmethod, classmethod)) else item
            if not isinstance(function, types.FunctionType):
                continue
            code = getattr(inspect.unwrap(function), "__code__", function.__code__)
            if Path(code.co_filename).name != path.name:
                continue
            found = written.get(code.co_qualname)
            if found and not any(_same(code, one) for one in found):
                return str(code.co_qualname)
    return ""


def _functions(code: types.CodeType) -> dict[str, list[types.CodeType]]:
    """Return all code of a file by qualified name; a name may be defined several times."""
    found: dict[str, list[types.CodeType]] = {}
    todo = [code]
    while todo:
        for constant in todo.pop().co_consts:
            if isinstance(constant, types.CodeType):
                found.setdefault(constant.co_qualname, []).append(constant)
                todo.append(constant)
    return found


def _same(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two pieces of code do the same, wherever they stand."""
    if (one.co_code, one.co_names, one.co_varnames, len(one.co_consts)) != (
        other.co_code, other.co_names, other.co_varnames, len(other.co_consts),
    ):  # fmt: skip
        return False
    return all(_same_constant(a, b) for a, b in zip(one.co_consts, other.co_consts, strict=True))


def _same_constant(one: object, other: object) -> bool:
    if isinstance(one, types.CodeType) and isinstance(other, types.CodeType):
        return _same(one, other)
    # sets by value, since their order is chance; the rest by its text, since 0.0 equals -0.0 and True equals 1
    return one == other if isinstance(one, frozenset) else repr(one) == repr(other)
