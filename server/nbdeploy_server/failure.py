"""Why a Replica could not start, in the words of somebody who wrote a notebook and no server."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from nbdeploy_server.errors import ServerError

LONGEST = 2000  # bytes: Kubernetes keeps the last 2,048 of a container's log as the reason of its end


def notebook_lines(error: BaseException) -> tuple[str, ...]:
    """Return the user's own lines of a traceback: cells and shipped modules, not the server or site-packages."""
    here = str(Path(__file__).parent)
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        name = frame.filename
        own = name.startswith("<cell ") or "/code/" in name or ("ipykernel_" in name and not name.startswith(here))
        if own:
            place = name if name.startswith("<cell ") else Path(name).name
            lines.append(f"{place} line {frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip(": "))
    return tuple(lines)


def reason(error: BaseException) -> str:
    """Return what stopped a load and what to do next; a first line, then the notebook's lines where there are some."""
    if isinstance(error, SystemExit):
        text = f"the notebook's code ended the process (SystemExit: {error.code}) while its model was loaded"
    else:
        text = str(error) if isinstance(error, ServerError) else f"{type(error).__name__}: {error}".rstrip(": ")
    first, _, rest = text.partition("\n")
    advice = _advice(error, text)
    lines = [first + (f"; {advice}" if advice else ""), *rest.splitlines()]
    return "\n".join([*lines, *(line for line in notebook_lines(error) if line not in lines)])


def last_words(error: BaseException) -> str:
    """Return the end of the log of a Replica that cannot start, at most LONGEST bytes with its line ends."""
    first, *rest = reason(error).splitlines()
    text = "\n".join([f"nbdeploy: this Replica cannot start: {first}", *(f"  {line}" for line in rest)])
    data = text.encode(errors="replace")
    if len(data) <= LONGEST:
        return text
    # Both ends say something: the start names the error, the last lines are where it was raised.
    head, tail = data[: LONGEST // 2], data[-(LONGEST // 2 - 8) :]
    return f"{head.decode(errors='ignore')} … {tail.decode(errors='ignore')}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _advice(error: BaseException, text: str) -> str:
    for one in _chain(error):
        if isinstance(one, ModuleNotFoundError) and "--pip" not in text:
            return f"the module {one.name!r} is not installed here: add its package with --pip, or its file with --file"
        if isinstance(one, MemoryError):
            limit = _memory_limit()
            have = f" of {limit / 1e9:.1f} GB" if limit else ""
            return f"the memory{have} is too small for this model: deploy with more --memory"
        if type(one).__name__ == "OutOfMemoryError":  # torch's, of a GPU; torch is not imported to ask
            return "the GPU's memory is too small for this model: choose a larger card with --gpu-type"
        if "GLIBC" in str(one) or "cannot open shared object file" in str(one):
            return "a compiled package misses a library of the system: use a base image that has it (base_image)"
    return ""


def _memory_limit() -> int:
    """Return the bytes that this container may use, 0 where nothing limits it."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return int(limit) if limit.isdigit() else 0
