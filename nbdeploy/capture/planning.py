"""How predict will be made to answer: what it is, where its model comes from, and which parameter receives it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdeploy_server import predictor
from nbdeploy_server.errors import ServerError

from nbdeploy.capture import arguments as binding
from nbdeploy.capture import live, reach
from nbdeploy.capture.arguments import MISSING, Arrangement
from nbdeploy.errors import CaptureError, SampleError, UsageError


@dataclass(frozen=True)
class Request:
    """What shall be captured.

    Attributes:
        predict, model: live objects; `has_model` tells whether there is one (None is a model).
        variable: the model's name in the notebook.
        sample: MISSING, a LastCall, a dict, a tuple, or the one argument.
        setup: --setup.
        model_from: --model-from.
        folder: of the notebook; relative paths start there.
        files: --file.
        secrets: names of --secret.
        pass_model: --pass-model, --no-pass-model, or None.
    """

    predict: Any
    model: Any = None
    has_model: bool = False
    variable: str = ""
    sample: Any = MISSING
    setup: Callable[..., Any] | None = None
    model_from: str | None = None
    folder: Path = field(default_factory=Path.cwd)
    files: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    pass_model: bool | None = None


@dataclass(frozen=True)
class Plan:
    """How predict will be made to answer.

    Attributes:
        function: whose parameters are those of a request.
        how: the manifest's "predict".
        arrangement: which parameter receives the model, and the sample.
        model: what becomes of a live model: "passed", "reached", "unused", or "none" where there is none.
    """

    function: Callable[..., Any]
    how: dict[str, Any]
    arrangement: Arrangement
    model: str

    @property
    def passed(self) -> bool:
        """Whether predict, or its class, is given the model."""
        return self.how["model"] is not None

    @property
    def streams(self) -> bool:
        """Whether predict is a generator."""
        return self.how["kind"] in predictor.STREAMING

    def reaching(self) -> Plan:
        """Return the plan of a predict that turned out to reach the model by itself."""
        how = self.how if self.how["how"] == "class" else {**self.how, "how": "reached"}
        return dataclasses.replace(self, how=how, model="reached")

    def with_sample(self, arguments: dict[str, Any]) -> Plan:
        """Return the plan with another sample."""
        return dataclasses.replace(self, arrangement=dataclasses.replace(self.arrangement, arguments=arguments))

    def of_kind(self, kind: str) -> Plan:
        """Return the plan of a predict that turned out to be of this kind."""
        return dataclasses.replace(self, how={**self.how, "kind": kind})


def plan(request: Request, reached: reach.Reach) -> Plan:
    """Decide it.

    Raises:
        UsageError: predict is no function, or there is nothing that could take the model.
        SampleError: the sample does not fit.
    """
    predict = request.predict
    if not callable(predict):
        raise UsageError(
            f"predict must be a function, but it is a {type(predict).__name__}. "
            "Write %deploy MODEL PREDICT, or %deploy PREDICT."
        )
    source = "setup" if request.setup is not None else "folder" if request.model_from else "live"
    has_model = request.has_model or source != "live"
    function, parameter, arrangement = (
        _class(request) if inspect.isclass(predict) else _function(request, has_model=has_model)
    )
    passed = has_model and parameter is not None
    if source == "folder" and not passed:
        raise UsageError(
            f"{binding.name_of(predict)} has no parameter that could receive the model of --model-from "
            f"{request.model_from}. Give it one called model, or take the folder in a function for --setup."
        )
    held = "none"
    if request.has_model:
        held = "passed" if passed else "reached" if _is_reached(request, reached) else "unused"
    uses = "class" if inspect.isclass(predict) else "argument" if passed else held
    how = {
        "name": binding.name_of(predict),
        "kind": kind_of(function),
        "how": uses,
        "model": parameter if passed else None,
        "variable": request.variable or None,
        # a setup runs even where nobody takes its result: it may register what predict needs
        "source": "setup" if source == "setup" else source if passed else "none",
    }
    return Plan(function, how, arrangement, held)


def _function(request: Request, *, has_model: bool) -> tuple[Callable[..., Any], str | None, Arrangement]:
    arrangement = binding.arrange(
        request.predict,
        has_model=has_model,
        model=request.model if request.has_model else MISSING,
        variable=request.variable,
        sample=request.sample,
        pass_model=request.pass_model,
    )
    return request.predict, arrangement.model_parameter, arrangement


def _class(request: Request) -> tuple[Callable[..., Any], str | None, Arrangement]:
    """Plan a class in Cortex's style, whose constructor takes the model (or config) and whose predict the request."""
    cls = request.predict
    if not callable(getattr(cls, "predict", None)):
        raise UsageError(
            f"{cls.__name__} is a class without a predict method. Give a function, or a class with "
            "__init__(self, config) and predict(self, payload)."
        )
    function = binding.class_predict(cls)
    arrangement = binding.arrange(
        function, has_model=False, model=None, variable="", sample=request.sample, pass_model=None
    )
    return function, binding.constructor_parameter(cls), arrangement


def _is_reached(request: Request, reached: reach.Reach) -> bool:
    model = request.model
    if model is request.predict or getattr(request.predict, "__self__", reach) is model:
        return True
    return any(value is model for value in reached.values)


def kind_of(function: Any) -> str:
    """Return the kind of a function as its code tells it; a run may prove otherwise."""
    for target in (reach.target_of(function), reach.target_of(inspect.unwrap(reach.target_of(function)))):
        if inspect.isasyncgenfunction(target):
            return "async_generator"
        if inspect.iscoroutinefunction(target):
            return "coroutine"
        if inspect.isgeneratorfunction(target):
            return "generator"
    return "function"


def roots(request: Request, plan: Plan, types: dict[str, Any]) -> dict[str, Any]:
    """Return what the skeleton holds; a model that predict neither takes nor reaches stays home."""
    found: dict[str, Any] = {"predict": request.predict}
    if plan.how["source"] == "live":
        found["model"] = request.model
    if plan.how["source"] == "setup":
        found["setup"] = request.setup
    found["types"] = types
    return found


def live_call(request: Request, plan: Plan) -> Callable[..., Any] | None:
    """Return predict with its live model, or None where the model exists only in a Replica.

    Raises:
        SampleError: --setup or the class's constructor fails; CaptureError: it cannot be bound.
    """
    model, has_model = request.model, request.has_model
    if plan.passed and not has_model:
        if request.model_from or request.setup is None:
            return None
        try:
            model, has_model = predictor.run_setup(request.setup, None), True
        except Exception as error:
            raise SampleError(
                f"--setup fails here in the notebook: {live.told(error)}. Correct it: it must run without arguments."
            ) from error
    try:
        return predictor.bind(request.predict, plan.how, model, has_model=has_model and plan.passed)
    except ServerError as error:
        raise CaptureError(str(error)) from error
    except Exception as error:
        hint = "" if request.has_model else f" Give what it needs as the model: %deploy CONFIG {plan.how['name']}"
        raise SampleError(f"{plan.how['name']} cannot be made: {live.told(error)}.{hint}") from error
