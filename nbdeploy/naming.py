"""An Endpoint's name where none is given: the function's, else the model's, else the notebook file's; and that file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from nbdeploy.errors import UsageError
from nbdeploy.spec import label

# A name made of these words only would say nothing in a list of Endpoints.
_WORDS = """
model models clf cls net network nn pipe pipeline m estimator classifier regressor gbm xgb lgbm rf svc svm lr mlp layer
layers trainer predict predictor prediction predictions proba infer inference f fn func function forward call main run
runner handle handler serve service endpoint self obj object x g h p do get make test one all my the a best new final
train trained fitted loaded with from and of to
"""
_GENERIC = frozenset(_WORDS.split())


def default_name(predict_name: str, model_name: str | None, notebook_path: str) -> str:
    """Return the Endpoint's name where none is given: the function's, else the model's, else the notebook file's.

    Raises:
        UsageError: none of them says anything.
    """
    words = [*reversed(predict_name.split(".")), *reversed((model_name or "").split("."))]
    for word in words:
        name = label(word)
        if name and not _generic(name):
            return name
    name = label(PurePath(notebook_path).stem) if notebook_path else ""
    if name:
        return name
    given = " and ".join(repr(n) for n in (model_name, predict_name) if n)
    raise UsageError(f"{given} would say little as an Endpoint's name. Give it one: --name sentiment")


def _generic(name: str) -> bool:
    words = [re.sub(r"\d+$", "", word) for word in name.split("-")]
    return all(word in _GENERIC for word in words if word)


def notebook_path(namespace: Mapping[str, Any]) -> str:
    """Return the absolute path of the notebook, or "" where nobody tells it."""
    for told in (os.environ.get("JPY_SESSION_NAME"), namespace.get("__vsc_ipynb_file__")):
        if isinstance(told, str) and Path(told).suffix:  # a console's session has a name, but no file
            return str(Path(told).absolute())
    return ""
