"""nbdeploy: a model and a predict function in a notebook become a production API with one line.

Importing this package is cheap: every public name is loaded at its first use.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nbdeploy_server import __version__ as __version__

if TYPE_CHECKING:
    from nbdeploy.deploying import deploy
    from nbdeploy.endpoint import Endpoint, connect, endpoints
    from nbdeploy.errors import CaptureError, DeployError, NbdeployError, RemoteError
    from nbdeploy.spec import Autoscaling, Resources, Signature, Status

__all__ = [
    "Autoscaling",
    "CaptureError",
    "DeployError",
    "Endpoint",
    "NbdeployError",
    "RemoteError",
    "Resources",
    "Signature",
    "Status",
    "connect",
    "deploy",
    "endpoints",
]

_HOMES = {
    "deploy": "deploying",
    "Endpoint": "endpoint",
    "connect": "endpoint",
    "endpoints": "endpoint",
    "CaptureError": "errors",
    "DeployError": "errors",
    "NbdeployError": "errors",
    "RemoteError": "errors",
    "Autoscaling": "spec",
    "Resources": "spec",
    "Signature": "spec",
    "Status": "spec",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{home}")
    if name == "deploy" and "IPython" in sys.modules:
        from nbdeploy.notebook.progress import Progress, in_notebook

        if in_notebook():
            module.default_watch = Progress  # type: ignore[attr-defined] # the module is known by its name only
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """Register `%deploy`: IPython's hook for `%load_ext nbdeploy`."""
    from nbdeploy.notebook.magic import load_ipython_extension as load

    load(shell)
