"""Starts a clean process: run as a script under `python -I`, it puts back the kernel's sys.path and calls an entry.

`-I` keeps out PYTHON* variables, the user site and the working directory; what the program needs comes as one JSON
object on standard input, so nothing of it is seen in `ps` or in the environment:

    {"path": [...], "user_sites": [...], "entry": "module:function", "argument": {...}}
"""

from __future__ import annotations

import importlib
import json
import os
import site
import sys


def main() -> None:
    """Read the order, restore sys.path, call the entry with its argument."""
    order = json.loads(sys.stdin.buffer.read())
    # Standard input has said all it had to say; user code that reads it must get end-of-file, not block.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):  # into a pipe: what predict prints shall be in the logs at once
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr] # text files, as `python` opens them
    known = set(sys.path)
    sys.path[:] = [*order["path"], *(entry for entry in sys.path if entry not in order["path"])]
    for folder in order["user_sites"]:
        if folder not in known:
            site.addsitedir(folder)  # -I left the user site out, with the .pth files of editable installs in it
    module, _, function = order["entry"].partition(":")
    getattr(importlib.import_module(module), function)(order["argument"])


if __name__ == "__main__":
    main()
