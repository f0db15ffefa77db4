"""Starts a Replica in a container: `python3 -I -X faulthandler …/nbdeploy_server/__main__.py`.

`-I` keeps out PYTHON* variables, the user site and the working directory, and with them the folder of this package. By
hand, with the package installed: `python -m nbdeploy_server`. What it serves is told by environment variables.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path


def add_paths(folder: str, environment: str) -> None:
    """Put this package's folder first on sys.path, and an environment's before the interpreter's own packages.

    The standard library stays before the environment, as everywhere: packages that carry an old copy of one of its
    modules must not replace it.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if environment:
        before = list(sys.path)
        site.addsitedir(environment)  # reads .pth files, as packages of several folders and editable installs need
        added = [entry for entry in sys.path if entry not in before]
        own = site.getsitepackages()
        at = next((index for index, entry in enumerate(before) if entry in own), len(before))
        sys.path[:] = [*before[:at], *added, *before[at:]]


if __name__ == "__main__":
    add_paths(str(Path(__file__).absolute().parent.parent), os.environ.get("NBDEPLOY_SITE", ""))
    from nbdeploy_server.container import main

    main(os.environ)
