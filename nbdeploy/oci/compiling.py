"""Compiles modules for another place: run as a script in a clean process, with the standard library alone.

On standard input comes a JSON list of modules, each as [source file, its path in the Image, file for the bytecode]. A
file that is not Python, or Python of another version, is left out: it would not import in a Replica either.
"""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import sys
from pathlib import Path
from types import CodeType

_UNCHECKED = b"\1\0\0\0"  # flags of PEP 552: made from a source of this hash, which nobody compares


def compiled(source: bytes, path: str) -> bytes | None:
    """Return the .pyc of a source that lies at `path` when it runs; None where it does not compile.

    Files of an Image have the modification time 0 on every machine, so that a .pyc by time would never fit.
    """
    try:
        code: CodeType = compile(source, path, "exec", dont_inherit=True)
        content = _marshalled(code)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return b"".join((importlib.util.MAGIC_NUMBER, _UNCHECKED, importlib.util.source_hash(source), content))


def _marshalled(code: CodeType) -> bytes:
    """Return marshal's bytes of a code object, whatever this process has done before.

    marshal numbers the objects that have more than one reference, and of a string that is as true as the process has
    use for the same name elsewhere. Held here, all have more than one.
    """
    held: list[object] = []
    found: list[CodeType | tuple[object, ...] | frozenset[object]] = [code]
    while found:
        one = found.pop()
        held.append(one)
        if isinstance(one, CodeType):
            held += (one.co_filename, one.co_name, one.co_qualname, one.co_linetable, one.co_exceptiontable)
            held += (one.co_consts, one.co_names, *one.co_names)
            held += (*one.co_varnames, *one.co_cellvars, *one.co_freevars)
        parts = one.co_consts if isinstance(one, CodeType) else one
        held += parts
        found += [part for part in parts if isinstance(part, (CodeType, tuple, frozenset))]
    return marshal.dumps(code)


def main() -> None:
    """Read the list, write what compiles."""
    for number in range(256):  # these exist once in a process, and marshal writes an interned one in another way
        sys.intern(chr(number))
    folders: set[str] = set()
    for source, path, target in json.loads(sys.stdin.buffer.read()):
        data = compiled(Path(source).read_bytes(), path)
        if data is not None:
            folder = os.path.dirname(target)  # noqa: PTH120 - ten thousand files
            if folder not in folders:
                os.makedirs(folder, exist_ok=True)  # noqa: PTH103
                folders.add(folder)
            Path(target).write_bytes(data)


if __name__ == "__main__":
    main()
