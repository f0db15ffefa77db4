"""Which installed distributions a Capture needs, exactly as they are installed here, and how they get elsewhere.

Everything is read from installed metadata: no network, and no module is imported, for that runs code and takes seconds.
What no index has (editable installs, local folders, checkouts) travels as a wheel made of the installed files.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbdeploy.distributions import Distribution, Installed, index_of, normalised
from nbdeploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from packaging.requirements import Requirement

# The hard requirements of nbdeploy_server: a Replica needs them whatever the notebook imports.
SERVER_NEEDS = (
    "msgspec",
    "orjson",
    "pydantic",
    "fastapi",
    "fastapi-offline",
    "httptools",
    "uvicorn",
    "uvloop; sys_platform != 'win32'",
)
ALWAYS = ("cloudpickle", *SERVER_NEEDS)


def needed(
    modules: Iterable[str], also: Iterable[str] = ALWAYS, *, path: Sequence[str] | None = None
) -> tuple[Distribution, ...]:
    """Return the distributions that provide these modules and all that they require, sorted by name.

    Args:
        modules: import names, dotted or not; those of the standard library, and those that belong to no
            distribution, add nothing (see `owners`).
        also: requirements added in any case, as in a requirements file. Those not installed are warned of.
        path: search path of the installed distributions; None is sys.path.
    """
    index = index_of(path)
    extras: dict[str, set[str]] = {}
    todo: list[tuple[str, frozenset[str]]] = []
    for text in also:
        requirement = _requirement(text)
        if requirement is None or not _applies(requirement, frozenset()):
            continue
        if normalised(requirement.name) not in index.named:
            warnings.warn(
                f"{requirement.name} is needed but not installed: pip install {requirement.name}", stacklevel=2
            )
        todo.append((normalised(requirement.name), frozenset(requirement.extras)))
    for module in modules:
        if module.partition(".")[0] not in sys.stdlib_module_names:
            todo.extend((one.name, frozenset()) for one in index.owners(module))
    missing: dict[str, set[str]] = {}
    while todo:
        name, wanted = todo.pop()
        wanted = frozenset(map(normalised, wanted))
        installed = index.named.get(name)
        if installed is None or (name in extras and wanted <= extras[name]):
            continue
        extras.setdefault(name, set()).update(wanted)
        for requirement in _requirements(installed, frozenset(extras[name])):
            other = normalised(requirement.name)
            todo.append((other, frozenset(requirement.extras)))
            if other not in index.named:
                missing.setdefault(name, set()).add(other)
    return tuple(index.named[name].described(missing.get(name, ())) for name in sorted(extras))


def owners(module: str, *, path: Sequence[str] | None = None) -> tuple[Distribution, ...]:
    """Return the distributions that provide a module: none for a local one, several for a shared namespace."""
    return tuple(one.described() for one in index_of(path).owners(module))


def distribution_of(module_file: Path, *, path: Sequence[str] | None = None) -> Distribution | None:
    """Return the editable distribution that this file is a part of, so that it travels in its wheel; else None."""
    file = module_file.resolve()
    held = [
        (len(root.resolve().parts), one)
        for one in index_of(path).named.values()
        if one.editable
        for root in one.roots.values()
        if file.is_relative_to(root.resolve())
    ]
    return max(held, key=lambda pair: pair[0])[1].described() if held else None


@functools.lru_cache(maxsize=4096)
def _requirement(text: str) -> Requirement | None:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(text)
    except InvalidRequirement:
        return None  # metadata of old packages; pip ignores it too


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _requirements(installed: Installed, extras: frozenset[str]) -> Iterator[Requirement]:
    for text in installed.requires:
        if not extras and "extra ==" in text and " or " not in text:
            continue  # most lines of big packages: not worth parsing
        requirement = _requirement(text)
        if requirement is not None and _applies(requirement, extras):
            yield requirement


def lock(distributions: Iterable[Distribution], wheels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the manifest's rows; `wheels` maps the names of those that travel to the Bundle's path of their wheel."""
    wheels = wheels or {}
    return [
        {"name": each.name, "version": each.version, "origin": each.origin, "wheel": wheels.get(each.name)}
        for each in distributions
    ]


def targeted(rows: Sequence[Mapping[str, Any]], *, gpus: int, torch_index: str | None) -> list[Mapping[str, Any]]:
    """Return the rows that a Replica needs: without CUDA's where it has no GPU and an index for torch is named."""
    return list(rows) if gpus or not torch_index else list(without_cuda(rows))


def without_cuda(rows: Sequence[Mapping[str, Any]], *, path: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    """Return the rows for machines without GPUs: builds for CUDA become plain versions, and their libraries stay here.

    CUDA libraries that something else than torch requires are kept. To be resolved with an index of CPU wheels.
    """
    index = index_of(path)
    named = {str(row["name"]): row for row in rows}
    todo = [name for name in named if name != "torch" and not is_cuda(name)]
    wanted: set[str] = set()
    while todo:
        name = todo.pop()
        installed = index.named.get(name)
        if name in wanted or installed is None:
            continue
        wanted.add(name)
        needs = (normalised(requirement.name) for requirement in _requirements(installed, frozenset()))
        todo.extend(other for other in needs if is_cuda(other))
    kept = [row for name, row in named.items() if not is_cuda(name) or name in wanted]
    return [row if row["wheel"] else {**row, "version": re.sub(r"\+cu\d+$", "", str(row["version"]))} for row in kept]


def is_cuda(name: str) -> bool:
    """Tell whether a distribution of this normalised name holds parts of CUDA that only a GPU needs."""
    return name.startswith(("nvidia-", "cuda-")) or name in {"triton", "pytorch-triton"}


def requirements(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a requirements file of exact pins; wheels are named by their path relative to the Bundle's files."""
    return "".join(f"{_pin(row)}\n" for row in sorted(rows, key=lambda row: str(row["name"])))


def _pin(row: Mapping[str, Any]) -> str:
    if row["wheel"]:
        return f"./{row['wheel']}"
    url = str((row["origin"] or {}).get("url", ""))
    if urlsplit(url).scheme in {"http", "https"} and "archive_info" in row["origin"]:
        hashes = row["origin"]["archive_info"].get("hashes", {})
        return f"{row['name']} @ {url}" + (f"#sha256={hashes['sha256']}" if "sha256" in hashes else "")
    return f"{row['name']}=={row['version']}"


def resolve(
    rows: Sequence[Mapping[str, Any]],
    *,
    python: str,
    platform: str | None,
    wheels: Path | None,
    find_links: Sequence[str | Path] | None = None,
    index: str | None = None,
) -> str:
    """Return a pylock.toml (PEP 751) of exactly these rows, made by uv, which asks the user's package indexes.

    For a platform of another system or processor the rows stay pinned, and what only that platform needs is added.

    Args:
        rows: the manifest's rows (see `lock`).
        python: version of Python there, "3.11".
        platform: name of the platform as uv has it ("x86_64-manylinux_2_28"); None is this one.
        wheels: the folder that the rows' wheel paths are relative to; the lock's paths are relative to it too.
        find_links: folders or pages with further wheels.
        index: address of an index looked at first, such as PyTorch's for a CUDA version.

    Raises DeployError with uv's reason, and the packages that cannot be had.
    """
    import uv

    command = [uv.find_uv_bin(), "pip", "compile", "-", "--format", "pylock.toml", "--no-header", "--no-progress"]
    command += ["--color", "never", "--only-binary", ":all:", "--no-python-downloads"]
    command += ["--python", sys.executable, "--python-version", patched(python)]
    foreign = platform is not None and _foreign(platform)
    if not foreign:
        command.append("--no-deps")  # the rows are complete, and pins that disagree with each other are the user's own
    if platform is not None:
        command += ["--python-platform", platform]
    for place in find_links or ():
        command += ["--find-links", str(place)]
    if index is not None:  # versions are exact, so the first index that merely knows the name must not win
        command += ["--index", index, "--index-strategy", "unsafe-best-match"]
    with tempfile.TemporaryDirectory(prefix="nbdeploy-lock-") as empty:
        # in a folder without pyproject.toml, whose settings would change the answer; those of the user stay in force
        result = subprocess.run(
            command, input=requirements(rows), capture_output=True, text=True, check=False, cwd=wheels or empty
        )
    if result.returncode != 0:
        raise DeployError(_refusal(rows, result.stderr, python, platform))
    _check_pins(rows, result.stdout, relabelled=index is not None)
    return result.stdout


def minor() -> str:
    """Return the minor version of this Python, "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def patched(python: str) -> str:
    """Return this Python's full version for its own minor: uv reads "3.11" as 3.11.0, which some packages refuse."""
    here = sys.version.split()[0]
    return here if here.startswith(f"{python}.") else python


def _foreign(name: str) -> bool:
    """Tell whether a platform of uv's names has another system or processor than this one."""
    systems = {"linux": "linux", "darwin": "apple|macos", "win32": "windows"}
    machines = {"x86_64": "x86_64|amd64", "aarch64": "aarch64|arm64"}
    here = os.uname().machine.lower() if hasattr(os, "uname") else os.environ.get("PROCESSOR_ARCHITECTURE", "").lower()
    if not re.search(systems.get(sys.platform, sys.platform), name):
        return True
    named = next((pattern for pattern in machines.values() if re.search(pattern, name)), None)
    return named is not None and re.search(named, here) is None


def _refusal(rows: Sequence[Mapping[str, Any]], output: str, python: str, platform: str | None) -> str:
    reason = re.sub(r"\s+", " ", output.replace("error:", " ").replace("cause:", " ")).strip()
    named = {
        str(row["name"]): row
        for row in rows
        if re.search(rf"(?<![\w.-]){re.escape(str(row['name']))}(==| was not found)", reason)
        or (row["wheel"] and str(row["wheel"]) in reason)
    }
    hints = []
    for name, row in sorted(named.items()):
        if "+" in str(row["version"]) and not row["wheel"]:
            hints.append(
                f"{name} {row['version']} is a build for one kind of machine that the usual index lacks: name its "
                f"index (torch_index in the engine's settings), or install the plain {name}"
            )
        elif f"{name} was not found" in reason:
            hints.append(
                f"{name} is in no index that is asked: name its index with UV_INDEX, or install it from a folder"
            )
    where = f"Python {python}" + (f" on {platform}" if platform else "")
    subject = f"{', '.join(sorted(named))} cannot be had" if named else "the environment cannot be locked"
    return ". ".join([f"{subject} for {where}: {reason.rstrip('.')}", *hints])


def _check_pins(rows: Sequence[Mapping[str, Any]], text: str, *, relabelled: bool) -> None:
    """Raise DeployError where the lock has other versions than the notebook; only another index may change a label."""
    locked = {package["name"]: str(package.get("version", "")) for package in tomllib.loads(text).get("packages", ())}
    for row in rows:
        name, wanted = str(row["name"]), str(row["version"])
        got = locked.get(name)
        if got is None:
            raise DeployError(f"the lock lacks {name} {wanted}, which the notebook uses; install it again and deploy")
        if got and _canonical(got, public=relabelled) != _canonical(wanted, public=relabelled):
            raise DeployError(
                f"the lock has {name} {got}, but the notebook runs {wanted}; install {got} here, or name its index"
            )


def _canonical(version: str, *, public: bool) -> str:
    from packaging.version import InvalidVersion, Version

    try:
        parsed = Version(version)
    except InvalidVersion:
        return version
    return parsed.public if public else str(parsed)
