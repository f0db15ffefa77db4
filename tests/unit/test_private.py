"""Files for their owner alone."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from nbdeploy.private import write_private

if TYPE_CHECKING:
    from pathlib import Path


def test_whole_and_private(tmp_path: Path) -> None:
    """The new content takes the place of the old, readable by its owner alone, and nothing else is left."""
    file = tmp_path / "key"
    for data in (b"first", b"second"):
        write_private(file, data)
        assert file.read_bytes() == data
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """Where the file cannot take its place, what is there stays, and no partial file with it."""
    folder = tmp_path / "key"
    folder.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_private(folder, b"data")
    assert list(tmp_path.iterdir()) == [folder]
