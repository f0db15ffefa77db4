"""A notebook in a real kernel, whose deploys are dry runs unless a test asks for more."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_FIRST_CELL = """
import json as _json, nbdeploy as _nbdeploy
_events = []
def deploy(*objects, names=(), **options):
    from nbdeploy.deploying import Context
    _events.clear()
    options = {"dry_run": True, "name": "probe", "context": Context(names=names), **options}
    return _nbdeploy.deploy(*objects, on_event=_events.append, **options)
def _card():
    return next(e.data["card"] for e in _events if "card" in e.data)
"""


class Book:
    """A notebook: runs cells; a cell that ends with `deploy(...)` gives a card or a refusal."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        self.kernel = kernel
        self.folder = folder
        self.run(_FIRST_CELL)

    def write(self, name: str, text: str) -> Path:
        """Put a file beside the notebook."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def run(self, *cells: str) -> str:
        """Run cells that must work; returns what the last one printed."""
        output = None
        for cell in cells:
            output = self.kernel.run(cell)
            assert output.status == "ok", output.error
        return str(output.stream) if output is not None else ""

    def deploy(self, *cells: str) -> dict[str, Any]:
        """Run cells, the last of which deploys; returns the card."""
        self.run(*cells)
        found: dict[str, Any] = json.loads(self.run("print(_json.dumps(_card()))").splitlines()[-1])
        return found

    def refusal(self, *cells: str) -> str:
        """Run cells, the last of which must fail; returns its error and checks how it is written."""
        self.run(*cells[:-1])
        output = self.kernel.run(cells[-1])
        assert output.status == "error", output.text
        for jargon in (" at 0x", "pickle", "reducer", "__reduce", "Traceback"):
            assert jargon not in output.error, output.error
        return str(output.error)


@pytest.fixture
def book(start_kernel: Callable[..., Any], tmp_path: Path) -> Book:
    """One notebook in a folder of its own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return Book(start_kernel(folder), folder)
