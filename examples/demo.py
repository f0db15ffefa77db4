"""`make demo`: a model goes from a live notebook to an HTTP endpoint and back to a prediction in another notebook."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent


def run(notebook: str) -> list[dict[str, Any]]:
    """Execute a notebook in a kernel of its own; return the outputs of its code cells, in order."""
    print(f"▸ {notebook} runs in a kernel of its own …", flush=True)
    began = time.monotonic()
    document = nbformat.read(HERE / notebook, as_version=4)
    quiet = ["--IPKernelApp.log_level=40"]  # the kernel's own remarks are not what the demo shows
    place = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(document, timeout=300, kernel_name="python3", resources=place, extra_arguments=quiet)
    client.execute()
    print(f"  done in {time.monotonic() - began:.1f} s\n", flush=True)
    return [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(outputs: list[dict[str, Any]]) -> list[str]:
    """Return what each output shows as text."""
    return [str(one.get("text") or one.get("data", {}).get("text/plain", "")).rstrip() for one in outputs]


def main() -> int:
    """Run both notebooks and tell what to do next."""
    try:
        shown = texts(run("quickstart.ipynb"))
        card = next(text for text in shown if "http://" in text)
        print("The cell shows this card:\n")
        print("\n".join("    " + line for line in card.splitlines()))
        print(f"\nand the notebook's own call answered {shown[-1]}\n")
        answers = texts(run("call_from_elsewhere.ipynb"))
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The other notebook's call answered {answers[0]}")
    print(f"at {answers[-1].partition(':')[0]}\n")
    print("The endpoint stays up. What next:")
    for command, what in (
        ("make lab", "JupyterLab on the quickstart"),
        (".venv/bin/nbdeploy ls", "what is deployed"),
        (".venv/bin/nbdeploy open digits", "its documentation page"),
        (".venv/bin/nbdeploy logs digits", "what it printed"),
        (".venv/bin/nbdeploy delete digits", "remove it; nothing is left"),
    ):
        print(f"    {command:34} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
