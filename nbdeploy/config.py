"""Where settings come from, so that a deploy says the same in every notebook of a project.

In rising order: config.toml of the platform's configuration folder; nbdeploy.toml beside the notebook, or else
`[tool.nbdeploy]` of the nearest pyproject.toml at or above it; then variables NBDEPLOY_*. A later source changes the
keys that it names and leaves the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import stat
import sys
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdeploy.errors import ConfigError, StoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

KINDS = ("kubernetes", "local")  # the engines of this package; others come as entry points
HOME_FOLDERS = ("store", "jobs", "endpoints")
_VARIABLES = {"NBDEPLOY_DEFAULT_ENGINE": "default_engine", "NBDEPLOY_REVISIONS_KEPT": "revisions_kept"}
_ELSEWHERE = ("NBDEPLOY_HOME", "NBDEPLOY_KEY")  # read by home() and by the client
# Kubernetes puts these into every pod beside a Service whose name begins with "nbdeploy": they are no settings
_SERVICE_LINK = re.compile(r"NBDEPLOY_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")


@dataclass(frozen=True)
class EngineSettings:
    """One named engine: where Replicas run, and what an engine of this kind needs to know. Only the kind is a must.

    Attributes:
        kind: "local", "kubernetes", or one that an installed package brings.
        context: of the kubeconfig; None means in-cluster, else the current one.
        namespace: of the Endpoints; None means the context's own.
        registry: where Images go, "registry.example.com/team"; a deploy to a cluster needs one.
        base_image: None means the official Python image of the kernel's Python.
        platform: of the nodes, "linux/amd64".
        gateway: "NAME" or "NAMESPACE/NAME" of a Gateway that routes to Endpoints.
        ingress_class: class of Ingresses, where there is no Gateway.
        host: under which Endpoints are reached from outside, at NAME.HOST or where "{name}" stands in it.
        tls_secret: of the Ingress.
        image_pull_secret: with which nodes pull.
        node_selector: added to each pod.
        tolerations: added to each pod.
        torch_index: package index asked first, for CPU or CUDA builds of torch.
    """

    kind: str
    context: str | None = None
    namespace: str | None = None
    registry: str | None = None
    base_image: str | None = None
    platform: str | None = None
    gateway: str | None = None
    ingress_class: str | None = None
    host: str | None = None
    tls_secret: str | None = None
    image_pull_secret: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    torch_index: str | None = None

    def arguments(self, name: str) -> dict[str, Any]:
        """Return what an Engine of this name is made with, as plain data: its name, and what is set."""
        rows = {key: value for key, value in dataclasses.asdict(self).items() if key != "kind" and value}
        return {"name": name, **rows}


@dataclass(frozen=True)
class Settings:
    """All settings of one notebook.

    Attributes:
        default_engine: name of the engine that a deploy without `--engine` uses.
        engines: engines by name; "local" is always among them.
        cost: price of one GPU-hour by type of GPU, in the user's currency.
        revisions_kept: how many Revisions of an Endpoint stay for a rollback, at least 1.
        origins: setting, or "engines.NAME" → the file or variable that set it last, for words.
    """

    default_engine: str = "local"
    engines: Mapping[str, EngineSettings] = field(default_factory=lambda: {"local": EngineSettings("local")})
    cost: Mapping[str, float] = field(default_factory=dict)
    revisions_kept: int = 10
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def where(self, engine: str) -> str:
        """Return the file that the settings of an engine are in, or would be."""
        return self.origins.get(f"engines.{engine}") or str(_user_file())

    @contextlib.contextmanager
    def located(self, engine: str) -> Iterator[None]:
        """Add to a ConfigError about an engine the file in which to mend it."""
        try:
            yield
        except ConfigError as error:
            words = str(error).rstrip()
            if any(file in words for file in {*self.origins.values(), self.where(engine)}):  # it names the very file
                raise
            words += "" if words.endswith(".") else "."
            if f"engines.{engine}" in self.origins:
                raise ConfigError(f"{words} The settings of {engine} are in {self.where(engine)}.") from None
            words += f" The settings of {engine} belong into {self.where(engine)}."
            kind = self.engine(engine).kind
            alike = sorted(name for name, one in self.engines.items() if one.kind == kind and name != engine)
            if alike:
                words += f" There are settings for {' and '.join(alike)}: --engine {alike[0]}"
            raise ConfigError(words) from None

    def engine(self, name: str | None = None) -> EngineSettings:
        """Return the engine of this name: one of the settings, or a kind without settings. None is the default engine.

        Raises UsageError where there is none.
        """
        wanted = name or self.default_engine
        if wanted in self.engines:
            return self.engines[wanted]
        if _is_kind(wanted):
            return EngineSettings(wanted)
        allowed = _allowed(wanted, {*self.engines, *_kinds()})
        raise UsageError(
            f"There is no engine {wanted!r}: {allowed}. Choose one with --engine NAME (in Python engine=…), or with "
            f"default_engine in nbdeploy.toml beside the notebook. A new one is a table [engines.{wanted}] with "
            f'kind = "kubernetes" in {self.where(wanted)}.'
        )


def settings(notebook_folder: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings for a notebook in this folder; None leaves out the files of a project.

    Raises ConfigError, naming the file or variable, the key and what is allowed there.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}  # setting or "engines.NAME" → the last source that set it, for errors
    for source, found in _sources(notebook_folder, environ):
        _check_table(source, found)
        for key, value in found.items():
            origins[key] = source
            if key == "engines":
                origins.update({f"engines.{name}": source for name in value})
                origins.update({f"engines.{name}.{key}": source for name, table in value.items() for key in table})
                engines = values.setdefault("engines", {})
                engines.update({name: {**engines.get(name, {}), **table} for name, table in value.items()})
            elif key == "cost":
                values["cost"] = {**values.get("cost", {}), **{gpu: float(price) for gpu, price in value.items()}}
            else:
                values[key] = value
    tables = {"local": {}, **values.pop("engines", {})}
    engines = {name: _engine(origins.get(f"engines.{name}", ""), name, table) for name, table in tables.items()}
    made = Settings(**values, engines=engines, origins=origins)
    try:
        made.engine()
    except UsageError as error:
        raise ConfigError(f"{origins['default_engine']}: default_engine: {error}") from None
    return made


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of nbdeploy on this machine, made if missing: only its owner can look into it.

    It is $NBDEPLOY_HOME, or else the platform's folder for user data, and holds store/, jobs/ and endpoints/.
    Raises StoreError where the folder cannot be made or used.
    """
    if named := environ.get("NBDEPLOY_HOME", ""):
        try:
            folder = Path(named).expanduser().absolute()
        except RuntimeError as error:
            raise StoreError(f"NBDEPLOY_HOME is {named!r}, and there is no such user; set it to a folder") from error
    else:
        import platformdirs

        folder = platformdirs.user_data_path("nbdeploy", appauthor=False)
    for path in (folder, *(folder / name for name in HOME_FOLDERS)):
        _private_folder(path)
    return folder


def _private_folder(path: Path) -> None:
    hint = "set NBDEPLOY_HOME to a folder of your own"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{path} cannot be used by nbdeploy: a file is in its place; move it, or {hint}") from error
    except OSError as error:
        raise StoreError(f"the folder {path} cannot be made: {error.strerror}; {hint}") from error
    if sys.platform == "win32":
        return  # profiles on Windows are private by inheritance, and modes mean nothing there
    if status.st_uid != os.geteuid():
        raise StoreError(f"the folder {path} belongs to another user (uid {status.st_uid}); {hint}")
    try:
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise StoreError(f"the folder {path} cannot be made private: {error.strerror}; {hint}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreError(f"the folder {path} cannot be written; make it writable (chmod u+rwx), or {hint}")


def _user_file() -> Path:
    import platformdirs

    return platformdirs.user_config_path("nbdeploy", appauthor=False) / "config.toml"


def _sources(notebook_folder: Path | None, environ: Mapping[str, str]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield each source's name and table, the weakest first."""
    user = _user_file()
    if (table := _read(user)) is not None:
        yield str(user), table
    if notebook_folder is not None:
        yield from _project(notebook_folder.absolute())
    yield from _environment(environ)


def _project(folder: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    own = folder / "nbdeploy.toml"
    if (table := _read(own)) is not None:
        yield str(own), table
        return
    for path in (parent / "pyproject.toml" for parent in (folder, *folder.parents)):
        tool = (_read(path) or {}).get("tool", {})
        if isinstance(tool, dict) and "nbdeploy" in tool:
            source = f"{path} [tool.nbdeploy]"
            if not isinstance(tool["nbdeploy"], dict):
                raise ConfigError(f"{source} must be a table of settings, not {tool['nbdeploy']!r}")
            yield source, tool["nbdeploy"]
            return


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a TOML file; None where there is no such file."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; allow reading it, or remove it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _environment(environ: Mapping[str, str]) -> Iterable[tuple[str, dict[str, Any]]]:
    for name in sorted(environ):
        if not name.startswith("NBDEPLOY_") or name in _ELSEWHERE or _SERVICE_LINK.fullmatch(name):
            continue
        if name not in _VARIABLES:
            raise ConfigError(f"environment variable {name} is unknown: {_allowed(name, {*_VARIABLES, *_ELSEWHERE})}")
        value: str | int = environ[name]
        if not value:
            continue  # an empty variable is how a shell says "unset"
        if _VARIABLES[name] == "revisions_kept" and str(value).strip().isdecimal():
            value = int(value)
        yield f"environment variable {name}", {_VARIABLES[name]: value}


def _string(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _prices(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(price, int | float) and not isinstance(price, bool) and math.isfinite(price) and price >= 0
        for price in value.values()
    )


def _tolerations(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and all(isinstance(part, str | int) for part in item.values()) for item in value
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


_TEXT: tuple[Callable[[Any], bool], str] = (_string, 'a text that is not empty, like "abc"')
_SETTING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "default_engine": _TEXT,
    "engines": (_tables, 'tables of engines, like [engines.gpu-cluster] with kind = "kubernetes"'),
    "cost": (_prices, 'prices per GPU-hour by type of GPU, like "nvidia-t4" = 0.35'),
    "revisions_kept": (_count, "a whole number from 1"),
}
_ENGINE: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{item.name: _TEXT for item in dataclasses.fields(EngineSettings)},
    "node_selector": (_strings, 'a table of texts, like { accelerator = "nvidia-t4" }'),
    "tolerations": (_tolerations, 'a list of tables, like [{ key = "gpu", operator = "Exists" }]'),
}


def _check_table(source: str, table: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is unknown or a value that does not fit, in the table or an engine of it."""
    _check_keys(source, "", table, _SETTING)
    for name, engine in table.get("engines", {}).items():
        _check_keys(source, f"engines.{name}.", engine, _ENGINE)
        if "kind" in engine and not _is_kind(engine["kind"]):
            allowed = _allowed(engine["kind"], _kinds())
            raise ConfigError(
                f"{source}: engines.{name}.kind: there is no kind of engine {engine['kind']!r}: {allowed}"
            )


def _check_keys(
    source: str, prefix: str, table: Mapping[str, Any], known: Mapping[str, tuple[Callable[[Any], bool], str]]
) -> None:
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{source}: {prefix}{key} is no setting: {_allowed(key, known)}")
        fits, wanted = known[key]
        if not fits(value):
            raise ConfigError(f"{source}: {prefix}{key} must be {wanted}; it is {value!r}")


def _engine(source: str, name: str, table: Mapping[str, Any]) -> EngineSettings:
    values = dict(table)
    if "kind" not in values:
        if not _is_kind(name):
            raise ConfigError(f"{source}: engines.{name}.kind is missing: one of {', '.join(sorted(_kinds()))}")
        values["kind"] = name
    if name in KINDS and values["kind"] != name:
        raise ConfigError(f'{source}: engines.{name}.kind must be "{name}", for its name says so; rename the engine')
    if values["kind"] == "local" and len(values) > 1:
        others = ", ".join(sorted(values.keys() - {"kind"}))
        raise ConfigError(f"{source}: engines.{name}: a local engine has no settings of its own; remove {others}")
    values["tolerations"] = tuple(values.get("tolerations", ()))
    return EngineSettings(**values)


def _is_kind(name: str) -> bool:
    return name in KINDS or name in _kinds()  # the entry points cost a look at every installed package


def _kinds() -> set[str]:
    return {*KINDS, *(point.name for point in entry_points(group="nbdeploy.engines"))}


def _allowed(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"Allowed: {', '.join(names)}"
