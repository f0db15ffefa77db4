"""Where a Bundle comes from: the versions that wrote it, and what it needs of the process that loads it."""

from __future__ import annotations

import platform
import sys

FORMAT_VERSION = 1


def requires() -> dict[str, str]:
    """Return what this process's objects need of the process that loads them."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "implementation": sys.implementation.name,
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def made_with() -> dict[str, str]:
    """Return the versions that write this Bundle."""
    import cloudpickle
    from nbdeploy_server import __version__

    return {"python": platform.python_version(), "nbdeploy": __version__, "cloudpickle": cloudpickle.__version__}
