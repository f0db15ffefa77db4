"""What Replicas print, kept with rotation."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

SIZE = 8 * 1024 * 1024  # bytes per file
FILES = 4  # so at most 32 MiB per Endpoint
_POLL = 0.1  # seconds between looks of `follow`


class LogFile:
    """Appends lines, each with the Replica it came from, and rotates by size."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "replicas.log"
        self._file = self._path.open("ab", buffering=0)
        self._size = self._path.stat().st_size
        self._partial: dict[str, bytes] = {}
        self.last: dict[str, collections.deque[str]] = {}

    def feed(self, replica: str, data: bytes) -> None:
        """Take what a Replica printed; lines are written when they are complete (or longer than 64 KiB)."""
        data = self._partial.pop(replica, b"") + data
        *lines, rest = data.split(b"\n")
        if len(rest) > 65536:  # noqa: PLR2004 - a line that never ends must not fill the memory
            lines, rest = [*lines, rest], b""
        if rest:
            self._partial[replica] = rest
        if lines:
            self._write(replica, lines)

    def end(self, replica: str) -> list[str]:
        """Write a Replica's unfinished line; return its last lines."""
        rest = self._partial.pop(replica, b"")
        if rest:
            self._write(replica, [rest])
        return list(self.last.pop(replica, ()))

    def _write(self, replica: str, lines: list[bytes]) -> None:
        tail = self.last.setdefault(replica, collections.deque(maxlen=20))
        tail.extend(line.decode("utf-8", "replace") for line in lines[-20:])
        stamp = time.strftime("%Y-%m-%d %H:%M:%S").encode()
        data = b"".join([stamp + b" " + replica.encode() + b" " + line + b"\n" for line in lines])
        if self._size + len(data) > SIZE:
            self._rotate()
        self._file.write(data)
        self._size += len(data)

    def _rotate(self) -> None:
        self._file.close()
        for number in range(FILES - 1, 0, -1):
            older = self._path.with_name(f"replicas.log.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"replicas.log.{number - 1}")
            if newer.exists():
                newer.replace(older)
        self._file = self._path.open("ab", buffering=0)
        self._size = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(folder: Path, *, follow: bool) -> Iterator[str]:
    """Yield the kept lines, oldest first; with `follow`, go on until interrupted or the folder is removed."""
    path = folder / "replicas.log"
    for number in range(FILES - 1, 0, -1):
        older = path.with_name(f"replicas.log.{number}")
        with contextlib.suppress(FileNotFoundError):  # not that many yet, or just rotated away
            yield from older.read_text(encoding="utf-8", errors="replace").splitlines()
    if not path.exists():
        return
    file: TextIO = path.open("r", encoding="utf-8", errors="replace")
    try:
        rest = ""
        while True:
            line = file.readline()
            if line.endswith("\n"):
                yield (rest + line).rstrip("\n")
                rest = ""
                continue
            rest += line
            if not follow:
                if rest:
                    yield rest
                return
            if not folder.is_dir():
                return
            if newer := _rotated(path, file):
                left = file.read()  # what was written between the last look and the rotation
                file.close()
                file = newer
                yield from (rest + left).splitlines()
                rest = ""
                continue
            time.sleep(_POLL)
    finally:
        file.close()


def _rotated(path: Path, file: TextIO) -> TextIO | None:
    """Return the newer file where the one being read was rotated away."""
    try:
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return None
        return path.open("r", encoding="utf-8", errors="replace")
    except FileNotFoundError:  # between two renames, or deleted
        return None
