"""Which parameter receives the model, and what a sample binds."""

# ruff: noqa: D103 - the functions are data of the tables below
from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

from nbdeploy.capture.arguments import (
    MISSING,
    LastCall,
    arrange,
    class_predict,
    constructor_parameter,
    first_row,
)
from nbdeploy.errors import SampleError

MODEL = SimpleNamespace(kind="a model")
OTHER = SimpleNamespace(kind="an older model")
TOKENIZER = object()


def only(model: Any, text: Any) -> None: ...
def net_first(net: Any, text: Any) -> None: ...
def last(text: Any, gbm: Any) -> None: ...
def keyword(text: Any, *, est: Any) -> None: ...
def absent(text: Any, top: int = 1) -> None: ...
def optional(model: Any, text: Any, top: int = 1) -> None: ...
def several(a: Any, b: Any, model: Any) -> None: ...
def positional(model: Any, text: Any, /) -> None: ...
def extra(model: Any, **features: Any) -> None: ...
def record_and_extra(model: Any, record: Any, **options: Any) -> None: ...
def live_default(text: Any, tokenizer: Any = TOKENIZER) -> None: ...
def defaulted(text: Any, model: Any = None) -> None: ...
def name_and_self(name: Any, self: Any, model: Any) -> None: ...
def nothing() -> None: ...


CASES = [
    # function, the model's variable, sample, receives the model, arguments
    (only, "clf", {"text": "a"}, "model", {"text": "a"}),
    (only, "clf", "a", "model", {"text": "a"}),
    (only, "clf", ("a",), "model", {"text": "a"}),
    (only, "clf", MISSING, "model", None),
    (only, "clf", {"feature": 1, "b": 2}, "model", {"text": {"feature": 1, "b": 2}}),
    (only, "clf", {1: 2}, "model", {"text": {1: 2}}),
    (only, "clf", None, "model", {"text": None}),
    (only, "clf", [1, 2], "model", {"text": [1, 2]}),
    (net_first, "clf", {"text": "a"}, "net", {"text": "a"}),
    (net_first, "clf", "a", "net", {"text": "a"}),
    (net_first, "clf", MISSING, None, None),
    (net_first, "my.Net", MISSING, "net", None),
    (last, "clf", {"text": "a"}, "gbm", {"text": "a"}),
    (last, "gbm", "a", "gbm", {"text": "a"}),
    (last, "gbm", MISSING, "gbm", None),
    (keyword, "clf", ("a",), "est", {"text": "a"}),
    (keyword, "clf", "a", "est", {"text": "a"}),
    (keyword, "clf", {"text": "a"}, "est", {"text": "a"}),
    (absent, "clf", {"text": "a"}, None, {"text": "a"}),
    (absent, "clf", ("a", 2), None, {"text": "a", "top": 2}),
    (absent, "clf", MISSING, None, None),
    (optional, "clf", ("a", 3), "model", {"text": "a", "top": 3}),
    (several, "b", ("x", "y"), "model", {"a": "x", "b": "y"}),
    (several, "clf", {"a": 1, "model": 2}, "b", {"a": 1, "model": 2}),
    (several, "clf", {"a": 1, "b": 2, "model": 3}, None, {"a": 1, "b": 2, "model": 3}),
    (positional, "clf", {"text": "a"}, "model", {"text": "a"}),
    (positional, "clf", "a", "model", {"text": "a"}),
    (extra, "clf", {"age": 3, "size": 4}, "model", {"age": 3, "size": 4}),
    (record_and_extra, "clf", {"record": 1, "k": 2}, "model", {"record": 1, "k": 2}),
    (record_and_extra, "clf", {"age": 1}, "model", {"record": {"age": 1}}),
    (live_default, "clf", {"text": "a"}, None, {"text": "a"}),
    (live_default, "clf", {"text": "a", "tokenizer": TOKENIZER}, None, {"text": "a"}),
    (defaulted, "clf", {"text": "a"}, None, {"text": "a"}),
    (name_and_self, "clf", {"name": 1, "self": 2}, "model", {"name": 1, "self": 2}),
    (only, "clf", LastCall((MODEL, "a")), "model", {"text": "a"}),
    (only, "clf", LastCall((MODEL,), {"text": "a"}), "model", {"text": "a"}),
    (only, "clf", LastCall((OTHER, "a")), "model", {"text": "a"}),
    (net_first, "clf", LastCall((OTHER, "a")), "net", {"text": "a"}),
    (last, "clf", LastCall(("a", MODEL)), "gbm", {"text": "a"}),
    (absent, "clf", LastCall(("a",)), None, {"text": "a"}),
    (optional, "clf", LastCall((MODEL, "a"), {"top": 4}), "model", {"text": "a", "top": 4}),
    (live_default, "clf", LastCall(("a", TOKENIZER)), None, {"text": "a"}),
    (extra, "clf", LastCall((MODEL,), {"age": 3}), "model", {"age": 3}),
]


@pytest.mark.parametrize(("function", "variable", "sample", "parameter", "arguments"), CASES)
def test_the_parameter_that_the_sample_does_not_bind_receives_the_model(
    function: Any, variable: str, sample: Any, parameter: str | None, arguments: dict[str, Any] | None
) -> None:
    """Whatever its name or place; of several, the one called `model` or like the variable, else the first."""
    found = arrange(function, has_model=True, model=MODEL, variable=variable, sample=sample, pass_model=None)
    assert (found.model_parameter, found.arguments) == (parameter, arguments)


@pytest.mark.parametrize(
    ("model", "function", "sample"),
    [
        ([1, 2], net_first, LastCall(([3, 4], "a"))),
        ({"a": 1}, net_first, LastCall(({"a": 2}, "a"))),
    ],
)
def test_a_plain_model_is_not_guessed_by_its_type(model: Any, function: Any, sample: Any) -> None:
    """A list is no sign of a model: a call with another list binds it as an argument."""
    found = arrange(function, has_model=True, model=model, variable="clf", sample=sample, pass_model=None)
    assert found.model_parameter is None


@pytest.mark.parametrize("model", [None, [1], {"a": 1}, 5])
def test_any_object_may_be_the_model(model: Any) -> None:
    """None, lists, dicts and numbers are models like others."""
    found = arrange(only, has_model=True, model=model, variable="m", sample={"text": 1}, pass_model=None)
    assert found.model_parameter == "model"


def test_without_a_model_the_sample_binds_all() -> None:
    """A parameter called `model` is an ordinary one where no MODEL is given."""
    found = arrange(only, has_model=False, model=None, variable="", sample=("m", "a"), pass_model=None)
    assert (found.model_parameter, found.arguments) == (None, {"model": "m", "text": "a"})


def test_a_model_that_a_replica_makes() -> None:
    """With --setup the notebook's stand-in is the argument that no request could hold."""
    call = LastCall((object(), "a"))
    found = arrange(net_first, has_model=True, model=MISSING, variable="", sample=call, pass_model=None)
    assert (found.model_parameter, found.arguments) == ("net", {"text": "a"})


def test_pass_model_overrides_the_rule() -> None:
    """--pass-model gives the model to the likeliest parameter, --no-pass-model to none."""
    common: dict[str, Any] = {"has_model": True, "model": MODEL, "variable": "clf"}
    assert arrange(net_first, **common, sample=MISSING, pass_model=True).model_parameter == "net"
    assert arrange(defaulted, **common, sample={"text": 1}, pass_model=True).model_parameter == "model"
    found = arrange(only, **common, sample={"model": "m", "text": 1}, pass_model=False)
    assert (found.model_parameter, found.arguments) == (None, {"model": "m", "text": 1})
    with pytest.raises(SampleError, match=r"nothing\(\) has no parameter that could receive the model"):
        arrange(nothing, **common, sample=MISSING, pass_model=True)


MISFITS = [
    (only, {}, "missing a required argument: 'text'"),
    (only, ("a", "b", "c"), "too many positional arguments"),
    (several, {"a": 1, "c": 2}, "no parameter 'c'"),
    (optional, {"text": 1, "topp": 2}, r"no parameter 'topp' \(but 'top'\)"),
    (several, ("x",), "missing a required argument"),
]


@pytest.mark.parametrize(("function", "sample", "words"), MISFITS)
def test_a_sample_that_does_not_fit(function: Any, sample: Any, words: str) -> None:
    """The message shows the parameters by name, never a default's value, and an example of a sample."""
    with pytest.raises(SampleError, match=words) as caught:
        arrange(function, has_model=True, model=MODEL, variable="clf", sample=sample, pass_model=None)
    assert "--sample {" in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_what_a_request_cannot_say() -> None:
    """Arguments by position only, and functions whose parameters nobody can read, are refused."""

    def anything(*texts: str) -> None: ...

    with pytest.raises(SampleError, match=r"takes any number of arguments by position.*def anything\(texts\)"):
        arrange(anything, has_model=False, model=None, variable="", sample=("a", "b"), pass_model=None)
    with pytest.raises(SampleError, match="Wrap it: def predict"):
        arrange(iter, has_model=False, model=None, variable="", sample=("a",), pass_model=None)


def test_partials_and_bound_methods() -> None:
    """What is bound already is no parameter any more."""
    found = arrange(
        functools.partial(several, "x"), has_model=True, model=MODEL, variable="m", sample={"b": 1}, pass_model=None
    )
    assert (found.model_parameter, found.arguments) == ("model", {"b": 1})


def test_the_first_row_of_a_large_last_call() -> None:
    """Over 32 rows or 1 MB one row is kept; a vector of numbers is one row already, whatever its length."""
    import numpy as np
    import pandas as pd

    given = {
        "matrix": np.zeros((33, 4)),
        "vector": np.zeros(500),
        "wide": np.zeros((2, 100_000)),
        "small": np.zeros((32, 4)),
        "pixels": [0.5] * 64,
        "texts": ["a"] * 40,
        "frame": pd.DataFrame({"a": range(50)}),
        "text": "a" * 5000,
    }
    kept, cut = first_row(given)
    assert cut == ["matrix", "wide", "texts", "frame"]
    assert kept["matrix"].shape == (1, 4)
    assert kept["vector"].shape == (500,)
    assert kept["small"].shape == (32, 4)
    assert kept["pixels"] == given["pixels"]
    assert kept["texts"] == ["a"]
    assert len(kept["frame"]) == 1


class Cortex:
    """In Cortex's style."""

    def __init__(self, config: Any) -> None: ...

    def predict(self, payload: Any) -> None: ...


class Static:
    @staticmethod
    def predict(payload: Any) -> None: ...


def test_classes_in_cortex_style() -> None:
    """The constructor takes the config, predict the request, with `self` in neither; a static predict works too."""
    for cls in (Cortex, Static):
        found = arrange(class_predict(cls), has_model=False, model=None, variable="", sample={"a": 1}, pass_model=None)
        assert found.arguments == {"payload": {"a": 1}}
    assert constructor_parameter(Cortex) == "config"
    assert constructor_parameter(Static) is None
