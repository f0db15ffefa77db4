"""Secrets: values of the environment that would travel inside the pickled objects."""

from __future__ import annotations

import pickletools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nbdeploy.errors import SecretError

_DEEP = 8  # levels of attributes and containers that the search for a culprit's path goes down
_TEXT = 1 << 20  # bytes: longer byte strings are data


@dataclass(frozen=True)
class Text:
    """A text that travels beside the pickle: what it is, what to do about a secret in it, and the text itself.

    `{name}` in the hint stands for the secret's variable.
    """

    where: str
    hint: str
    text: str


def scan(skeleton: bytes, values: Mapping[str, str], roots: Mapping[str, Any], others: Iterable[Text] = ()) -> None:
    """Look for secrets in everything that would be stored.

    Args:
        skeleton: the pickle, or nothing.
        values: secret values by the name of their variable.
        roots: the live objects by name, to find the path of a culprit.
        others: further texts that travel: sources of cells, files, variables, the sample.

    Raises:
        SecretError: naming the variable and the path, never the value.
    """
    if not values:
        return
    for text in _strings(skeleton) if skeleton else ():
        for name, value in values.items():
            if value in text:
                raise SecretError(
                    f"The value of ${name} stands in what predict needs: {_path(roots, value)}. It would be stored in "
                    f'the Bundle. Deploy with --secret {name}, and read os.environ["{name}"] inside predict, or in a '
                    "function that makes the object and is given with --setup."
                )
    for other in others:
        for name, value in values.items():
            if value in other.text:
                raise SecretError(f"The value of ${name} stands in {other.where}. {other.hint.format(name=name)}")


def _strings(skeleton: bytes) -> Iterator[str]:
    for _op, argument, _position in pickletools.genops(skeleton):
        if isinstance(argument, str):
            yield argument
        elif isinstance(argument, bytes) and len(argument) < _TEXT:
            yield argument.decode("latin-1")


def _path(roots: Mapping[str, Any], value: str) -> str:
    """Find where a text lies, as a user would write it."""
    seen: set[int] = set()
    todo: list[tuple[str, Any, int]] = [(name, root, 0) for name, root in roots.items()]
    while todo:
        path, item, depth = todo.pop(0)
        if isinstance(item, str) and value in item:
            return path
        if id(item) in seen or depth > _DEEP:
            continue
        seen.add(id(item))
        todo += [(path + label, child, depth + 1) for label, child in _children(item)]
    return "a string in reach of predict"


def _children(item: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(item, dict):
        return [(f"[{key!r}]", child) for key, child in item.items()]
    if isinstance(item, (list, tuple, set)):
        return [(f"[{index}]", child) for index, child in enumerate(item)]
    code = getattr(item, "__code__", None)
    if code is not None:
        names = getattr(item, "__globals__", {})
        found = [(f' → globals["{name}"]', names[name]) for name in code.co_names if name in names]
        found += [(" → a constant in its code", constant) for constant in code.co_consts if isinstance(constant, str)]
        cells = zip(code.co_freevars, getattr(item, "__closure__", None) or (), strict=False)
        found += [(f' → closure "{name}"', cell.cell_contents) for name, cell in cells if _filled(cell)]
        defaults = getattr(item, "__defaults__", None) or ()
        return found + [(" → a default", default) for default in defaults]
    found = [
        (f" → {name}", child) for name, child in getattr(item, "__dict__", {}).items() if not name.startswith("__")
    ]
    if isinstance(item, type):
        return found
    if getattr(type(item), "__module__", "") == "__main__":
        found.append((f" → class {type(item).__name__}", type(item)))
    return found


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading an empty cell raises
    except ValueError:
        return False
    return True
