"""Which parameter receives the model, and which arguments the sample binds (interface: The model argument)."""

from __future__ import annotations

import difflib
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbdeploy_server import wire
from nbdeploy_server.forms import describe

from nbdeploy.errors import SampleError

MAX_BYTES = 1_000_000  # of a sample taken from the notebook's last call (interface: The sample)
MAX_ROWS = 32


class _Missing:
    """The type of MISSING."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()
"""No sample was given; None is a sample."""


@dataclass(frozen=True)
class LastCall:
    """The arguments of predict's last call in the notebook."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrangement:
    """How predict is called.

    Attributes:
        model_parameter: receives the model, or None.
        arguments: the sample's arguments by name, or None without a sample.
    """

    model_parameter: str | None
    arguments: dict[str, Any] | None


def arrange(
    function: Callable[..., Any],
    *,
    has_model: bool,
    model: Any,
    variable: str,
    sample: Any,
    pass_model: bool | None,
) -> Arrangement:
    """Decide how predict gets its model and what the sample binds.

    Args:
        function: what requests call.
        has_model: whether a model was given.
        model: it, only its identity and type are used; MISSING where a Replica makes it.
        variable: its name in the notebook.
        sample: MISSING, a LastCall, a dict of arguments, a tuple, or the one argument.
        pass_model: --pass-model or --no-pass-model; None means the rule decides.

    Raises:
        SampleError: the sample does not fit the function.
    """
    call = _Call(function, signature_of(function), variable if has_model else None)
    parameter = None
    if has_model and pass_model is not False:
        parameter = _receiver(call, model, sample, pass_model=bool(pass_model))
        if parameter is None and pass_model:
            raise SampleError(
                f"{call.shown()} has no parameter that could receive the model. Give it one, or leave out --pass-model "
                "(a decorator hides parameters where it lacks functools.wraps)."
            )
    return Arrangement(parameter, call.bind(sample, parameter))


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature; raises SampleError where nobody can read it."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise SampleError(
            f"The parameters of {name_of(function)!r} cannot be read, because it is not written in "
            "Python. Wrap it: def predict(x): return it(x)"
        ) from error


def name_of(predict: Any) -> str:
    """Return the name of a function, or of what stands for one."""
    while isinstance(predict, functools.partial):
        predict = predict.func
    return str(getattr(predict, "__name__", None) or type(predict).__name__)


def _receiver(call: _Call, model: Any, sample: Any, *, pass_model: bool) -> str | None:
    """Return the parameter that receives the model, or None where the sample binds all."""
    required = [p.name for p in call.named if p.default is p.empty]
    if isinstance(sample, LastCall):
        found = _given_as(call, sample, model)
        if found is not None:
            return found
    if sample is MISSING:
        names = [name for name in required if call.like_the_model(name)]
    else:
        bound = call.bound(sample, required)
        names = [name for name in required if name not in bound]
        if not call.by_name(sample):
            # A tuple has no names: any parameter without which the sample fits may be the model's.
            fitting = [name for name in required if call.fits(sample, without=name)]
            names = (fitting or required) if names else [name for name in fitting if call.like_the_model(name)]
    if not names and pass_model:
        names = [p.name for p in call.named if call.like_the_model(p.name)] or required
    return next((name for name in names if name == "model"), None) or next(
        (name for name in names if call.like_the_model(name)), names[0] if names else None
    )


def _given_as(call: _Call, sample: LastCall, model: Any) -> str | None:
    """Return the parameter that received the model in the last call: the object itself, or one in its place.

    The call may have been made with another object, such as an older model: that parameter is named like the model, or
    received an object of the model's own kind.
    """
    try:
        given = call.signature.bind(*sample.args, **sample.kwargs).arguments
    except TypeError:
        return None
    same = [name for name, value in given.items() if value is model]
    if same:
        return next((name for name in same if call.like_the_model(name)), same[0])
    required = {p.name for p in call.named if p.default is p.empty}
    if model is MISSING:  # --setup or --model-from makes it: the notebook's stand-in is what no request can hold
        return next((name for name, value in given.items() if name in required and not _sendable(value)), None)
    special = describe(model)["type"] == "annotation"  # no number, text, list, array: nothing that a request could hold
    return next((name for name in given if name in required and name == "model"), None) or next(
        (name for name, value in given.items() if special and name in required and type(value) is type(model)), None
    )


def _sendable(value: Any) -> bool:
    try:
        wire.pack(value)
    except wire.WireError:
        return False
    return True


@dataclass(frozen=True)
class _Call:
    """A function that requests call; `variable` is the model's name in the notebook, None without a model."""

    function: Callable[..., Any]
    signature: inspect.Signature
    variable: str | None

    @property
    def named(self) -> list[inspect.Parameter]:
        """Parameters that an argument can be bound to by name."""
        kept = self.signature.parameters.values()
        return [p for p in kept if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]

    @property
    def extra(self) -> bool:
        """Whether it takes any keyword."""
        return any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())

    def like_the_model(self, name: str) -> bool:
        """Whether a parameter is called `model`, or like the model's variable (`net` like `my.net` or `Net`)."""
        if self.variable is None:
            return False
        return name == "model" or name.lower() == self.variable.rpartition(".")[2].lower()

    def without(self, parameter: str | None) -> _Call:
        """Return the call with the model's parameter left out."""
        if parameter is None:
            return self
        kept = [p for p in self.signature.parameters.values() if p.name != parameter]
        return _Call(self.function, self.signature.replace(parameters=kept), None)

    def shown(self) -> str:
        """Return the call for messages: names only, since a default may be an object of any length."""
        names = []
        for p in self.signature.parameters.values():
            star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
            names.append(f"{star}{p.name}" + ("" if p.default is p.empty else "=…"))
        return f"{name_of(self.function)}({', '.join(names)})"

    def by_name(self, sample: Any) -> bool:
        """Whether a sample is a dict of arguments by name, or is itself the one argument."""
        if isinstance(sample, LastCall):
            return True
        if not isinstance(sample, dict) or not all(isinstance(key, str) for key in sample):
            return False
        names = {p.name for p in self.named}
        if set(sample) <= names:
            return True
        if any(key in names and not self.like_the_model(key) for key in sample):
            return True  # one wrong name among right ones is a slip, not a record of features
        required = [p for p in self.named if p.default is p.empty]
        return self.extra and len(required) <= (self.variable is not None)

    def bound(self, sample: Any, required: list[str]) -> set[str]:
        """Return the names a sample binds if no parameter is kept for the model."""
        if isinstance(sample, LastCall):
            try:
                return set(self.signature.bind(*sample.args, **sample.kwargs).arguments)
            except TypeError:
                return set(required[: len(sample.args)]) | set(sample.kwargs)
        if self.by_name(sample):
            return set(sample)
        given = sample if isinstance(sample, tuple) else (sample,)
        positional = [p.name for p in self.named if p.kind is not p.KEYWORD_ONLY]
        return set(positional[: len(given)])

    def fits(self, sample: Any, *, without: str) -> bool:
        """Whether a sample without names fits once this parameter is left out."""
        try:
            self.without(without).signature.bind(*(sample if isinstance(sample, tuple) else (sample,)))
        except TypeError:
            return False
        return True

    def bind(self, sample: Any, parameter: str | None) -> dict[str, Any] | None:
        """Bind the sample to names, with the model's parameter left out.

        Raises:
            SampleError: it does not fit.
        """
        if sample is MISSING:
            return None
        rest = self.without(parameter)
        try:
            is_call = isinstance(sample, LastCall)
            values = self.values_of_call(sample, parameter) if is_call else rest.values(sample)
        except TypeError as error:
            without = f" (without {parameter}, which receives the model)" if parameter else ""
            example = ", ".join(f'"{p.name}": …' for p in rest.named if p.default is p.empty)
            raise SampleError(
                f"The sample does not fit {rest.shown()}{without}: {error}. Give one request as a dict of arguments, "
                f"for example --sample {{{example}}}"
            ) from None
        return rest.flat(values)

    def values(self, sample: Any) -> dict[str, Any]:
        """Bind a sample; raises TypeError in words."""
        required = [p for p in self.named if p.default is p.empty]
        if self.by_name(sample):
            # By name, whatever the kind: a request has names only, and the server gives positional-only ones by place.
            names = [p.name for p in self.named]
            unknown = next((key for key in sample if key not in names), None)
            if unknown is not None and not self.extra:
                near = difflib.get_close_matches(unknown, names, 1)
                raise TypeError(f"it has no parameter {unknown!r}" + (f" (but {near[0]!r})" if near else ""))
            missing = next((p.name for p in required if p.name not in sample), None)
            if missing is not None:
                raise TypeError(f"missing a required argument: {missing!r}")
            return dict(sample)
        given = sample if isinstance(sample, tuple) else (sample,)
        if len(given) == 1 and len(required) == 1:
            return {required[0].name: given[0]}  # keyword-only ones too
        return dict(self.signature.bind(*given).arguments)

    def values_of_call(self, sample: LastCall, parameter: str | None) -> dict[str, Any]:
        """Bind the last call, the model left out; raises TypeError in words."""
        try:
            values = dict(self.signature.bind(*sample.args, **sample.kwargs).arguments)
        except TypeError:
            if parameter is None:
                raise
            # The call gave only the others: a partial or a wrapper had put the model in its place.
            return dict(self.without(parameter).signature.bind(*sample.args, **sample.kwargs).arguments)
        values.pop(parameter or "", None)
        return values

    def flat(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write **kwargs as arguments, and leave out what only repeats a default that is no plain value."""
        for p in self.signature.parameters.values():
            if p.kind is p.VAR_KEYWORD and isinstance(values.get(p.name), dict):
                values.update(values.pop(p.name))
            elif p.kind is p.VAR_POSITIONAL and values.pop(p.name, ()):
                raise SampleError(
                    f"{self.shown()} takes any number of arguments by position, but a request has names only. Give it "
                    f"one parameter that is a list: def {name_of(self.function)}({p.name})."
                )
            elif p.name in values and values[p.name] is p.default and describe(p.default)["type"] == "annotation":
                values.pop(p.name)
        return values


def first_row(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keep one row of large arguments that were not chosen as a sample; returns the names that were cut.

    A vector of numbers is one row already. Whether a matrix is rows or one image, only predict can tell.
    """
    cut = []
    kept = {}
    for name, value in arguments.items():
        kept[name] = value
        rows = _rows(value)
        if rows is not None and rows > 1 and (rows > MAX_ROWS or _bytes(value) > MAX_BYTES):
            kept[name] = value.iloc[:1] if hasattr(value, "iloc") else value[:1]
            cut.append(name)
    return kept, cut


def _rows(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        return None if all(isinstance(item, (bool, int, float)) for item in value) else len(value)
    shape = getattr(value, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and len(shape) > 1 else None


def _bytes(value: Any) -> int:
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


def class_predict(cls: type) -> Callable[..., Any]:
    """Return `predict` of a class in Cortex's style, bound to nothing, for its Signature."""
    member = inspect.getattr_static(cls, "predict")
    function: Callable[..., Any] = cls.predict  # type: ignore[attr-defined] # the caller has looked
    return function if isinstance(member, (staticmethod, classmethod)) else types.MethodType(function, object())


def constructor_parameter(cls: type) -> str | None:
    """Return the parameter of `__init__` that takes the config, or None if it takes none."""
    parameters = list(inspect.signature(cls).parameters.values())
    return next((p.name for p in parameters if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}), None)
