"""What the notebook changed in os.environ since its kernel began: such variables decide how imports work."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Set by the kernel itself at its start, for its own output.
_KERNELS_OWN = frozenset(
    {
        "TERM",
        "CLICOLOR",
        "CLICOLOR_FORCE",
        "FORCE_COLOR",
        "NO_COLOR",
        "PAGER",
        "GIT_PAGER",
        "MPLBACKEND",
        "COLUMNS",
        "LINES",
    }
    | {
        "JPY_SESSION_NAME",
        "JPY_PARENT_PID",
        "PYDEVD_USE_FRAME_EVAL",
        "KERNEL_LAUNCH_TIMEOUT",
        "PYTHONHASHSEED",
        "PWD",
        "_",
    }
    | {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"}  # set by scikit-learn at its import, as they will be again
)
# Words of a name: TOKENIZERS_PARALLELISM and KEYBOARD are none.
_SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(KEYS?|TOKENS?)(_|$)|(^|_)(PRIVATE|PWD)(_|$)", re.IGNORECASE
)
_LEAST = 8  # characters: shorter values stand in texts by chance

_AT_IMPORT = dict(os.environ)


@dataclass(frozen=True)
class Variables:
    """Environment variables of the notebook.

    Attributes:
        changed: set or changed since the kernel's start; they travel.
        withheld: names among those that look like secrets; they stay home.
    """

    changed: dict[str, str]
    withheld: tuple[str, ...]


def at_start() -> dict[str, str]:
    """Return the environment this process began with (Linux), else the one at nbdeploy's import."""
    try:
        rows = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return _AT_IMPORT
    return dict(os.fsdecode(row).partition("=")[::2] for row in rows if b"=" in row)


def changed(
    now: Mapping[str, str] = os.environ, start: Mapping[str, str] | None = None, secrets: tuple[str, ...] = ()
) -> Variables:
    """Compare the environment with the one at the kernel's start; `secrets` are handed over otherwise."""
    start = at_start() if start is None else start
    found = {
        name: value
        for name, value in now.items()
        if start.get(name) != value and name not in _KERNELS_OWN and not name.startswith("NBDEPLOY_")
    }
    withheld = tuple(sorted(name for name in found if looks_secret(name) and name not in secrets))
    kept = {name: value for name, value in found.items() if name not in withheld and name not in secrets}
    return Variables(dict(sorted(kept.items())), withheld)


def looks_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret."""
    return bool(_SECRET_NAME.search(name))


def secret_values(environ: Mapping[str, str] = os.environ, named: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the values that must not stand in a Bundle, by the variable's name."""
    return {
        name: value
        for name, value in environ.items()
        if (looks_secret(name) or name in named) and len(value) >= _LEAST and not value.startswith("/")
    }
