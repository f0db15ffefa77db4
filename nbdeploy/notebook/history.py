"""What a notebook already tells: the sample in its last call of PREDICT, its names, and a name for the Endpoint.

Nothing here calls the user's code: a sample is read from the call's arguments only where they are names, literals,
attributes and constant subscripts, which can be looked up again.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import difflib
import operator
import re
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbdeploy.errors import UndefinedNameError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Call", "executed", "last_call", "nearest", "resolve"]

_TIMERS = {"time", "timeit", "prun", "capture"}  # magics whose text is Python that they run
_TIMER_OPTIONS = re.compile(r"(?:\s*-\w+(?:\s*\d+)?(?=\s))*\s*")
_HIDDEN = {"In", "Out", "exit", "quit", "open", "get_ipython"}  # IPython puts these among the user's names


@dataclass(frozen=True)
class Call:
    """The arguments of one call, as the notebook's names stand now."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def last_call(predict_name: str, cells: Sequence[str], namespace: Mapping[str, Any]) -> Call | None:
    """Find the last call of PREDICT whose arguments can be looked up without calling anything.

    Args:
        predict_name: as the notebook names it; dotted names allowed.
        cells: sources of the executed cells, oldest first (IPython's `In`, transformed or not).
        namespace: the notebook's names.

    Returns:
        None if there is no such call.
    """
    for cell in reversed(cells):
        tree = _parse(cell)
        if tree is None:
            continue
        for call in reversed(_calls(tree, predict_name)):
            found = _look_up(call, namespace)
            if found is not None:
                return found
    return None


def executed(cells: Sequence[str], line: str) -> list[str]:
    """Return the cells without what stands at and behind `%deploy LINE` in the last one: that has not run yet."""
    if not cells:
        return []
    tree = _parse(cells[-1])
    if tree is None:
        return list(cells)
    done: list[ast.stmt] = []
    for statement in tree.body:
        if any(_magic_text(node, {"deploy"}) == line for node in ast.walk(statement)):
            break
        done.append(statement)
    return [*cells[:-1], ast.unparse(ast.Module(done, []))]


def nearest(name: str, namespace: Mapping[str, Any]) -> tuple[str, ...]:
    """Return up to three of the user's names that `name` may have been meant to be, best first."""
    names = [n for n in namespace if not n.startswith("_") and n not in _HIDDEN]
    same = [n for n in names if n.lower() == name.lower()]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return tuple(dict.fromkeys([*same, *close]))[:3]


def resolve(name: str, namespace: Mapping[str, Any]) -> Any:
    """Return the object of a name or dotted name.

    Raises:
        UndefinedNameError: the notebook has no such name; the message offers the nearest.
    """
    first, *rest = name.split(".")
    if first not in namespace:
        offer = _offer(nearest(first, namespace)) or " Is it spelled as in the notebook?"
        raise UndefinedNameError(f"There is no {first!r} in this notebook.{offer} Run the cell that defines it first.")
    value = namespace[first]
    seen = first
    for attribute in rest:
        try:
            value = getattr(value, attribute)
        except AttributeError:
            near = difflib.get_close_matches(attribute, [n for n in dir(value) if not n.startswith("_")], n=3)
            raise UndefinedNameError(f"{seen!r} has no attribute {attribute!r}.{_offer(tuple(near))}") from None
        seen = f"{seen}.{attribute}"
    return value


def _offer(near: tuple[str, ...]) -> str:
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _parse(source: str) -> ast.Module | None:
    """Parse a cell, after IPython's transform where it needs that; None if it is no Python at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's own literals; they were shown when the cell ran
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):  # ValueError: a NUL character, up to Python 3.11
            from IPython.core.inputtransformer2 import TransformerManager

            with contextlib.suppress(SyntaxError, ValueError):
                return ast.parse(str(TransformerManager().transform_cell(source)))
    return None


def _calls(tree: ast.AST, predict_name: str) -> list[ast.Call]:
    """Return the calls of PREDICT that ran when the cell ran, in the order in which they ended."""
    return [node for node in _walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == predict_name]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield nodes, inner before outer, without the bodies that may have run elsewhere or with names of their own."""
    for child in ast.iter_child_nodes(node):
        apart = (
            ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
            | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
        )  # fmt: skip
        if not isinstance(child, apart):
            yield from _walk(child)
    yield node
    timed = _magic_text(node, _TIMERS)
    inside = _parse(timed) if timed else None
    if inside is not None:
        yield from _walk(inside)


def _magic_text(node: ast.AST, magics: set[str]) -> str | None:
    """Return the text that a transformed magic (`get_ipython().run_line_magic("time", TEXT)`) is given."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    given = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    if len(given) != len(node.args) or not given or given[0] not in magics:
        return None
    if node.func.attr == "run_line_magic":
        return _TIMER_OPTIONS.sub("", str(given[-1]), count=1) if magics is _TIMERS else str(given[-1])
    return str(given[-1]) if node.func.attr == "run_cell_magic" else None


def _look_up(call: ast.Call, namespace: Mapping[str, Any]) -> Call | None:
    """Return the call's arguments, or None where one of them is not simple or no longer there."""
    if any(keyword.arg is None for keyword in call.keywords):
        return None
    try:
        return Call(
            tuple(_value(argument, namespace) for argument in call.args),
            {str(keyword.arg): _value(keyword.value, namespace) for keyword in call.keywords},
        )
    except Exception:  # noqa: BLE001 - attributes and subscripts run the user's classes, which may raise anything
        return None


class _NotSimpleError(Exception):
    """An argument would need a call to be had again."""


def _value(node: ast.expr | None, namespace: Mapping[str, Any]) -> Any:
    """Look up an argument; None stands for the missing key of `{**other}`."""
    value: Any
    match node:
        case None:
            raise _NotSimpleError
        case ast.Name():
            value = namespace[node.id] if node.id in namespace else getattr(builtins, node.id)
        case ast.Attribute():
            value = getattr(_value(node.value, namespace), node.attr)
        case ast.Subscript():
            value = operator.getitem(_value(node.value, namespace), _constant(node.slice))
        case ast.Tuple():
            value = tuple(_value(item, namespace) for item in node.elts)
        case ast.List():
            value = [_value(item, namespace) for item in node.elts]
        case ast.Set():
            value = {_value(item, namespace) for item in node.elts}
        case ast.Dict():
            value = {_value(k, namespace): _value(v, namespace) for k, v in zip(node.keys, node.values, strict=True)}
        case _:
            value = _constant(node)
    return value


def _constant(node: ast.expr | None) -> Any:
    """Return the value of a constant: a number with its sign, a slice, or a tuple or list of such."""
    match node:
        case None:
            return None
        case ast.Slice():
            return slice(_constant(node.lower), _constant(node.upper), _constant(node.step))
        case ast.Tuple():
            return tuple(_constant(item) for item in node.elts)
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError:
                raise _NotSimpleError from None
