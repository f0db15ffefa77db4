"""What predict reaches: functions, globals and mistakes that can be told before anything is pickled.

A function reaches what its code names (nested code included), its closure, its defaults and, for objects, their
attributes. The walk looks at functions that travel by value only: those of the notebook.
"""

from __future__ import annotations

import builtins
import difflib
import dis
import functools
import linecache
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nbdeploy.errors import CannotTravelError, UndefinedNameError


@dataclass(frozen=True)
class Global:
    """A global variable that predict reaches.

    Attributes:
        name: in the notebook.
        kind: its type's name.
        bytes: what is known of its size without touching it, 0 if nothing is.
    """

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Reach:
    """What the notebook's own functions refer to.

    Attributes:
        functions: their names, predict's first.
        globals: variables they use.
        values: the objects met on the way that are no functions, classes or modules.
        reads_environment: some of them reads environment variables.
    """

    functions: tuple[str, ...]
    globals: tuple[Global, ...]
    values: tuple[Any, ...]
    reads_environment: bool


def by_value(function: Any) -> bool:
    """Whether a function or class is the notebook's own: it has no module that could be imported elsewhere."""
    module = getattr(function, "__module__", None)
    if module is None or module in {"__main__", "__mp_main__"}:
        return True
    return module not in sys.modules


def target_of(predict: Any) -> Any:
    """Return the plain function inside a partial, bound method, callable object or decorated function."""
    while True:
        if isinstance(predict, functools.partial):
            predict = predict.func
        elif isinstance(predict, types.MethodType):
            predict = predict.__func__
        elif isinstance(predict, (types.FunctionType, type)):
            return predict
        else:
            call = getattr(type(predict), "__call__", None)  # noqa: B004 - the function itself is wanted
            if not isinstance(call, types.FunctionType):
                return predict
            predict = call


def walk(predict: Any, own: Callable[[Any], bool] = by_value) -> Reach:
    """Walk from predict.

    Raises:
        UndefinedNameError: a name is used that is nowhere defined.
        CannotTravelError: a notebook command (`!cmd`, `%magic`, get_ipython) is used.
    """
    functions: dict[str, None] = {}
    reached: dict[str, Global] = {}
    values: list[Any] = []
    missing: list[tuple[types.FunctionType, str]] = []
    reads = False
    made: set[str] = set()  # names that some function in reach makes itself, by a `global` statement
    for function in _functions(predict, own, values):
        functions[_shown(function)] = None
        reads = reads or bool({"environ", "getenv"} & set(function.__code__.co_names))
        loaded, stored = _used_names(function.__code__)
        made |= stored
        for name in sorted(loaded):
            if name in _ONLY_IN_JUPYTER and (name == "get_ipython" or name not in function.__globals__):
                raise CannotTravelError(_only_in_jupyter(function, name))
            if name in function.__globals__:
                value = function.__globals__[name]
                if not isinstance(value, (types.FunctionType, type, types.ModuleType)):
                    reached[name] = Global(name, type(value).__name__, size_of(value))
            elif not hasattr(builtins, name):
                missing.append((function, name))
    for function, name in missing:
        if name not in made:
            raise UndefinedNameError(_undefined(function, name))
    return Reach(tuple(functions), tuple(reached.values()), tuple(values), reads)


def _shown(function: types.FunctionType) -> str:
    return function.__qualname__.rpartition("<locals>.")[2]


def _functions(predict: Any, own: Callable[[Any], bool], values: list[Any]) -> Iterator[types.FunctionType]:
    """Yield the notebook's functions in reach; fills `values` with every other object met on the way."""
    seen: set[int] = set()
    todo = deque([predict])
    while todo:
        value = todo.popleft()
        if id(value) in seen or isinstance(value, types.ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            todo += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            todo += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            todo += vars(value).values()  # what a decorator left there: the function it wraps, a cache
            if own(value) and _is_notebook(value.__globals__):
                yield value
                loaded, _ = _used_names(value.__code__)
                todo += [value.__globals__[name] for name in sorted(loaded) if name in value.__globals__]
        elif isinstance(value, types.MethodType):
            todo += [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, type):
            if own(value):
                todo += [_plain(member) for member in vars(value).values()]
                todo += [base for base in value.__bases__ if base is not object]
        else:
            values.append(value)
            todo += _parts(value, own)


def _is_notebook(namespace: dict[str, Any]) -> bool:
    """Whether a function's globals are the notebook's: a decorator's wrapper bears our name, but lives elsewhere."""
    name = namespace.get("__name__")
    return name in {None, "__main__", "__mp_main__"} or name not in sys.modules


def _parts(value: Any, own: Callable[[Any], bool]) -> list[Any]:
    """Return what belongs to predict inside an object: attributes of notebook classes, functions in containers."""
    wrapped = getattr(value, "__wrapped__", None) if isinstance(value, _CACHED) else None
    if wrapped is not None:
        return [wrapped]
    if own(type(value)):  # an instance of a notebook class: its methods and attributes belong to predict
        return [type(value), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LONG:
        return [item for item in value if callable(item)]
    if isinstance(value, dict) and len(value) <= _LONG:
        return [item for item in value.values() if callable(item)]
    return []


_CACHED = (type(functools.lru_cache(len)), functools.cached_property)
_LONG = 1000  # items of a container that is looked into


def holds(values: Iterable[Any], wanted: Any) -> bool:
    """Whether one of these objects is the wanted one, or holds it in attributes and containers (not too deep)."""
    seen: set[int] = set()
    todo = deque((value, 0) for value in values)
    while todo and len(seen) < _MANY:
        value, depth = todo.popleft()
        if value is wanted:
            return True
        if id(value) in seen or depth >= _DEEP or isinstance(value, (str, bytes, int, float, types.ModuleType)):
            continue
        seen.add(id(value))
        inside = list(getattr(value, "__dict__", {}).values())
        if isinstance(value, dict):
            inside += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside += value
        todo += [(item, depth + 1) for item in inside]
    return False


_DEEP, _MANY = 6, 200_000


def _plain(member: Any) -> Any:
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    return member


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading an empty cell raises
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _used_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the globals that code loads, and those that it makes itself; nested functions and classes included."""
    loaded: set[str] = set()
    stored: set[str] = set()
    todo = [code]
    while todo:
        one = todo.pop()
        own: set[str] = set()  # of a class body: its names are looked up there first
        for instruction in dis.get_instructions(one):
            if instruction.opname in {"STORE_GLOBAL", "DELETE_GLOBAL"}:
                stored.add(instruction.argval)
            elif instruction.opname == "STORE_NAME":
                own.add(instruction.argval)
            elif instruction.opname == "LOAD_GLOBAL" or (
                instruction.opname in {"LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"} and instruction.argval not in own
            ):
                loaded.add(instruction.argval)
        todo += [constant for constant in one.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(loaded), frozenset(stored)


# IPython puts these among Python's own names, so that they are found in the notebook and nowhere else.
_ONLY_IN_JUPYTER = {"get_ipython", "display", "__IPYTHON__"}


def _only_in_jupyter(function: types.FunctionType, name: str) -> str:
    if name == "get_ipython":
        return (
            f"{_shown(function)} uses a notebook command (`!cmd`, `%magic` or get_ipython()){_line(function, name)}, "
            "which exists only inside Jupyter. Write it in Python (for example subprocess.run), or do that work in a "
            "function for --setup."
        )
    return (
        f"{_shown(function)} uses {name!r}{_line(function, name)}, which exists only inside Jupyter. Leave it out of "
        "predict, and show what predict returns in a cell instead."
    )


def _undefined(function: types.FunctionType, name: str) -> str:
    """Return the words for a name that is nowhere defined."""
    names = [known for known in {*function.__globals__, *dir(builtins)} if not known.startswith("_")]
    near = difflib.get_close_matches(name, sorted(names), 3, 0.6)
    hint = f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
    return (
        f"{_shown(function)} uses {name!r}{_line(function, name)}, which is not defined in this notebook.{hint} "
        "Run the cell that defines it, or pass it as an argument."
    )


def _line(function: types.FunctionType, name: str) -> str:
    """Say where a function uses a name: the line of its cell, and its text."""
    todo = [function.__code__]
    while todo:
        code = todo.pop(0)
        for instruction in dis.get_instructions(code):
            line = instruction.positions.lineno if instruction.positions is not None else None
            if instruction.argval == name and instruction.opname.startswith("LOAD") and line is not None:
                text = linecache.getline(code.co_filename, line).strip()
                return f" (line {line}: {text})" if text else f" (line {line})"
        todo += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return ""


def size_of(value: Any) -> int:
    """Return the bytes of an array, frame, tensor or torch module, or of a plain builtin; 0 if unknown."""
    try:
        if isinstance(value, (str, bytes, bytearray, int, float, list, dict, tuple, set)):
            return sys.getsizeof(value)
        root = type(value).__module__.partition(".")[0]
        if root in {"numpy", "torch"} and isinstance(getattr(value, "nbytes", None), int):
            return int(value.nbytes)
        if root == "pandas" and hasattr(value, "memory_usage"):
            used = value.memory_usage(index=True)
            return int(used.sum() if hasattr(used, "sum") else used)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.nn.Module):
            held = {t.untyped_storage().data_ptr(): t.nbytes for t in (*value.parameters(), *value.buffers())}
            return sum(held.values())
    except Exception:  # noqa: BLE001 - a size is only shown; an object that cannot tell it has none
        return 0
    return 0


def left_behind(namespace: dict[str, Any], reached: set[str], least: int = 1_000_000) -> list[str]:
    """Name the large variables of the notebook that stay home."""
    sizes = {
        name: size_of(value)
        for name, value in list(namespace.items())
        if not name.startswith("_") and name not in reached and not isinstance(value, (types.ModuleType, type))
    }
    large = sorted((item for item in sizes.items() if item[1] >= least), key=lambda item: -item[1])
    return [f"{name} ({_megabytes(size)}, never reached by predict)" for name, size in large[:5]]


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"  # noqa: PLR2004 - a gigabyte
