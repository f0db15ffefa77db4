"""The sample from the notebook's last call, and names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nbdeploy.errors import UndefinedNameError
from nbdeploy.notebook.history import Call, executed, last_call, nearest, resolve

NAMES: dict[str, Any] = {
    "clf": "the model",
    "X": [[1, 2], [3, 4]],
    "text": "fine",
    "lab": SimpleNamespace(row={"a": 5}),
}


@pytest.mark.parametrize(
    ("cell", "call"),
    [
        ("predict(clf, X[0])", Call(("the model", [1, 2]))),
        ("predict(clf, X[-1][0:1])", Call(("the model", [3]))),
        ("predict(clf, text=text)", Call(("the model",), {"text": "fine"})),
        (
            "predict(lab.row['a'], [1, {'k': (text, -2, None)}], {text})",
            Call((5, [1, {"k": ("fine", -2, None)}], {"fine"})),
        ),
        ("print(predict(1))", Call((1,))),
        ("assert predict(1) == 2", Call((1,))),
        ("y = [predict(1)]\nz = f'{predict(2)}'", Call((2,))),
        ("predict(1); predict(2)", Call((2,))),
        ("for t in X:\n    predict(t) if t else None", None),
        ("predict(1)\npredict(make())", Call((1,))),
        ("predict(1)\npredict(X[i])", Call((1,))),
        ("predict(1)\npredict(gone)", Call((1,))),
        ("predict(1)\npredict(X[9])", Call((1,))),
        ("predict(1)\npredict(*X)", Call((1,))),
        ("predict(1)\npredict(**text)", Call((1,))),
        ("predict(1)\ndef f():\n    return predict(2)", Call((1,))),
        ("predict(1)\nclass A:\n    x = predict(2)", Call((1,))),
        ("predict(1)\n[predict(2) for _ in X]", Call((1,))),
        ("predict(1)\ng = lambda: predict(2)", Call((1,))),
        ("other.predict(1)", None),
        ("%time predict(1)", Call((1,))),
        ("%timeit -n 10 -r3 predict(1)", Call((1,))),
        ("%%time\npredict(1)", Call((1,))),
        ("!ls predict(1)", None),
        ("x = = predict(1)", None),
        ("", None),
    ],
)
def test_which_call_counts(cell: str, call: Call | None) -> None:
    """The last call with arguments that can be looked up without calling anything; not one that is only defined."""
    assert last_call("predict", [cell], NAMES) == call


def test_the_newest_cell_wins() -> None:
    """Cells are searched from the newest; one that is no Python is passed over."""
    assert last_call("predict", ["predict(1)", "predict(2)", "x ===", "%%html\npredict(3)"], NAMES) == Call((2,))


def test_dotted_functions_are_found() -> None:
    """`%deploy lab.predict` takes the calls of lab.predict."""
    assert last_call("lab.predict", ["predict(1)\nlab . predict(2)"], NAMES) == Call((2,))


def test_nothing_is_called() -> None:
    """A subscript or attribute that fails is an argument that cannot be had, not an error."""

    class Broken:
        @property
        def row(self) -> int:
            raise RuntimeError

    assert last_call("predict", ["predict(b.row)"], {"b": Broken()}) is None


def test_what_stands_behind_the_magic_has_not_run() -> None:
    """A call below `%deploy` in its own cell is not the last call."""
    cells = ["predict(0)", "predict(1)\nget_ipython().run_line_magic('deploy', 'clf predict')\npredict(2)"]
    assert last_call("predict", executed(cells, "clf predict"), NAMES) == Call((1,))
    assert executed([], "x") == []


def test_resolve_follows_dots() -> None:
    """Dotted names are looked up attribute by attribute."""
    assert resolve("lab.row", NAMES) == {"a": 5}


def test_unknown_names_offer_the_nearest() -> None:
    """A typing error is told with what was probably meant."""
    with pytest.raises(UndefinedNameError, match=r"no 'clff' in this notebook\. Did you mean 'clf'\? Run the cell"):
        resolve("clff", NAMES)
    with pytest.raises(UndefinedNameError, match=r"'lab' has no attribute 'rwo'\. Did you mean 'row'"):
        resolve("lab.rwo", NAMES)
    assert nearest("TEXT", NAMES) == ("text",)
    assert nearest("_In", {"In": 1, "_i": 2}) == ()
