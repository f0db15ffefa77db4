"""Annotations written as texts (`from __future__ import annotations`) travel as what they mean.

A Replica looks such a text up in the module of its class. For a class of the notebook that is `__main__`, which is
another program there.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from nbdeploy.capture.reach import by_value


@contextlib.contextmanager
def evaluated(annotations: Iterable[Any]) -> Iterator[None]:
    """Let the notebook's classes in these annotations have evaluated annotations for the length of the block."""
    changed: list[tuple[Any, dict[str, Any]]] = []
    seen: set[int] = set()
    todo = list(annotations)
    try:
        while todo:
            hint = todo.pop()
            if id(hint) in seen:
                continue
            seen.add(id(hint))
            todo += typing.get_args(hint)
            if not isinstance(hint, type) or not by_value(hint):
                continue
            todo += hint.__bases__
            own = vars(hint).get("__annotations__", {})
            meant = _meant(hint)
            todo += meant.values()
            if any(isinstance(value, str) for value in own.values()):
                with contextlib.suppress(AttributeError, TypeError):  # a class that cannot be changed stays as it is
                    hint.__annotations__ = {name: meant.get(name, value) for name, value in own.items()}
                    changed.append((hint, own))
        yield
    finally:
        for cls, before in changed:
            cls.__annotations__ = before


def _meant(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:  # noqa: BLE001 - evaluating annotations runs the user's own names; those that fail stay texts
        return {}
