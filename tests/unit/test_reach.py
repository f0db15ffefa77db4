"""What predict reaches, and mistakes that show before anything is pickled."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

import builtins
import functools
import linecache
import subprocess
import sys
import types
from typing import Any

import pytest

from nbdeploy.capture import reach
from nbdeploy.errors import CannotTravelError, UndefinedNameError


def cell(source: str, **names: Any) -> dict[str, Any]:
    """Run a source as a notebook's cell, with these variables in the notebook; returns the notebook's names."""
    namespace: dict[str, Any] = {"__name__": "__main__", **names}
    filename = f"/ipykernel_1/{abs(hash(source))}.py"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 - a cell of the test
    return namespace


def walk(source: str, name: str = "predict", **names: Any) -> reach.Reach:
    """Walk from a function of a cell."""
    return reach.walk(cell(source, **names)[name])


def test_functions_and_globals_in_the_order_met() -> None:
    """Predict first, then its helpers; globals by name, kind and size; modules and classes are no globals."""
    found = walk(
        "import json\nLABELS = ['a', 'b']\nclass Box: pass\n"
        "def clean(t): return json.dumps(t) + LABELS[0]\n"
        "def predict(t): return [clean(t), Box(), len(LABELS)]"
    )
    assert found.functions == ("predict", "clean")
    assert [(g.name, g.kind) for g in found.globals] == [("LABELS", "list")]
    assert found.globals[0].bytes > 0


def test_an_undefined_name_offers_the_nearest() -> None:
    """The function, the line, its text, and names that may have been meant."""
    with pytest.raises(UndefinedNameError) as caught:
        walk("def predict(text):\n    return vectorise(text)", vectorize=len, vectors=1)
    assert str(caught.value) == (
        "predict uses 'vectorise' (line 2: return vectorise(text)), which is not defined in this notebook. "
        "Did you mean 'vectorize' or 'vectors'? Run the cell that defines it, or pass it as an argument."
    )
    with pytest.raises(UndefinedNameError, match=r"predict uses 'zzqx' \(line 1: .*notebook\. Run the cell"):
        walk("def predict(x): return zzqx")


@pytest.mark.parametrize(
    "source",
    [
        "def predict(x): return [y for y in range(x) if missing(y)]",
        "def predict(x):\n    def inner(): return missing\n    return inner()",
        "def predict(x):\n    class A:\n        k = missing\n    return A.k",
        "def predict(x): return (lambda: missing)()",
        "def helper(): return missing\nclass M:\n    def run(self): return helper()\nm = M()\ndef predict(x): return m.run()",
        "def helper(): return missing\ndef predict(x, f=helper): return f()",
        "def helper(): return missing\ntable = {'a': [helper], 'b': helper}\ndef predict(x): return table['b']()",
        "class Base:\n    def run(self): return missing\nclass M(Base): pass\ndef predict(x): return M().run()",
        "class M:\n    @property\n    def p(self): return missing\ndef predict(x): return M().p",
        "class M:\n    @staticmethod\n    def p(): return missing\ndef predict(x): return M.p()",
    ],
)
def test_undefined_names_wherever_they_hide(source: str) -> None:
    """Comprehensions, nested functions and classes, methods, defaults, base classes and containers are looked into."""
    with pytest.raises(UndefinedNameError, match="uses 'missing'"):
        walk(source)


@pytest.mark.parametrize(
    "source",
    [
        "def load():\n    global net\n    net = 1\ndef predict(x):\n    load()\n    return net",
        "def predict(x):\n    class A:\n        k = 1\n        j = k + 1\n    return A.j",
        "def predict(x): return [i for i in range(x)], {k: v for k, v in x.items()}, print, __name__",
        "def predict(x):\n    try:\n        pass\n    except Exception as error:\n        return error",
        "def predict(x):\n    import json as j\n    return j",
        "list = [1]\nmax = min\ndef predict(x): return list, max",
        "def predict(n): return 1 if n < 1 else predict(n - 1)",
        "import functools\ndef deco(f):\n    @functools.wraps(f)\n    def inner(*a): return f(*a)\n    return inner\n@deco\ndef predict(x): return x",
    ],
)
def test_names_that_are_defined_after_all(source: str) -> None:
    """What a function in reach makes by `global`, class bodies, comprehensions and shadowed builtins are no mistakes."""
    assert "predict" in walk(source).functions


def test_a_global_that_predict_writes_is_reached_too() -> None:
    """`global COUNT; COUNT += 1` uses what the notebook has."""
    found = walk("COUNT = 5\ndef predict(x):\n    global COUNT\n    COUNT += 1\n    return COUNT")
    assert [g.name for g in found.globals] == ["COUNT"]


@pytest.mark.parametrize(
    "source", ["get_ipython().system('ls')", "get_ipython().run_line_magic('pwd', '')", "[get_ipython]"]
)
def test_notebook_commands(source: str) -> None:
    """What IPython makes of `!cmd` and `%magic` is told as what the user typed."""
    with pytest.raises(CannotTravelError, match=r"helper uses a notebook command .*\(line 2: .*subprocess\.run"):
        walk(f"def helper():\n    {source}\ndef predict(x): return helper()", get_ipython=len)


def test_display_exists_only_in_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython puts `display` among the builtins of the kernel only; one that was imported is an ordinary name."""
    monkeypatch.setattr(builtins, "display", print, raising=False)
    with pytest.raises(CannotTravelError, match=r"predict uses 'display' \(line 1"):
        walk("def predict(x): display(x)")
    assert walk("def predict(x): display(x)", display=print).functions == ("predict",)


def test_what_a_library_wraps_is_looked_into_but_not_the_library() -> None:
    """A decorator's wrapper bears our function's name; its own globals are the library's affair."""
    library = types.ModuleType("some_library")
    exec(  # noqa: S102 - a library of the test
        "import functools\nSETTING = 1\ndef deco(f):\n    @functools.wraps(f)\n"
        "    def inner(*a): return f(*a) + SETTING\n    return inner",
        library.__dict__,
    )
    sys.modules["some_library"] = library
    try:
        found = walk("LABEL = 3\n@deco\ndef predict(x): return LABEL", deco=library.__dict__["deco"])
    finally:
        del sys.modules["some_library"]
    assert [g.name for g in found.globals] == ["LABEL"]


def test_partials_methods_objects_and_caches() -> None:
    """Every callable leads to its function."""
    names = cell(
        "import functools\nA = 1\ndef f(k, x): return A\n"
        "class C:\n    def __call__(self, x): return f(1, x)\n    def m(self, x): return f(1, x)\n"
        "@functools.lru_cache\ndef cached(x): return f(1, x)"
    )
    for predict in (functools.partial(names["f"], 1), names["C"](), names["C"]().m, names["cached"], names["C"]):
        assert [g.name for g in reach.walk(predict).globals] == ["A"]
    assert reach.target_of(functools.partial(names["C"]().m, 1)) is names["C"].m
    assert reach.target_of(len) is len


def test_an_unused_gigabyte_is_named_and_not_touched() -> None:
    """Large variables that predict does not reach are listed; small ones, private ones and modules are not."""
    import numpy as np

    names = cell("def predict(x): return x", X_train=np.empty(1 << 30, "u1"), small=[1], _i=np.empty(1 << 21, "u1"))
    assert reach.left_behind(names, {"predict"}) == ["X_train (1.1 GB, never reached by predict)"]
    assert reach.left_behind(names, {"X_train"}) == []


def test_sizes_are_read_without_touching_the_object() -> None:
    """Arrays, frames and builtins tell their size; an object that cannot has none, whatever it raises."""
    import numpy as np
    import pandas as pd

    class Broken:
        __module__ = "numpy"

        @property
        def nbytes(self) -> int:
            raise RuntimeError

    assert reach.size_of(np.zeros(10)) == 80
    assert reach.size_of(pd.DataFrame({"a": [1.0, 2.0]})) >= 16
    assert reach.size_of(b"abc") > 3
    assert reach.size_of(Broken()) == reach.size_of(object()) == 0


def test_holds_finds_objects_in_objects_and_ends_on_loops() -> None:
    """Attributes and containers are searched by identity; circles end."""
    wanted = [1]
    circle: dict[str, Any] = {}
    circle["self"] = circle
    circle["deep"] = types.SimpleNamespace(a=[types.SimpleNamespace(b=wanted)])
    assert reach.holds([circle], wanted)
    assert not reach.holds([circle], [1])


def test_a_real_main_module_is_the_notebook(tmp_path: Any) -> None:
    """A script's own functions are treated like a notebook's."""
    script = tmp_path / "main.py"
    script.write_text(
        "from nbdeploy.capture.reach import walk\nK = 2\ndef predict(x): return K\nprint(walk(predict).globals[0].name)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "K\n"
