"""The Store: content-addressed, written once, never partial."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbdeploy_server
import pytest

import nbdeploy
from nbdeploy.errors import StoreError
from nbdeploy.store import ChangedError, Store

PATHS = [str(Path(nbdeploy.__file__).parents[1]), str(Path(nbdeploy_server.__file__).parents[1])]


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, hidden ones included."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(data: bytes) -> str:
    """Return the digest that a Ref of these bytes has."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_bytes_come_back_by_digest(tmp_path: Path) -> None:
    """A blob is found by the sha256 of its content, is read-only, and only its owner sees the folders."""
    store = Store(tmp_path / "a" / "store")
    ref = store.put_bytes(b"hello")
    assert (ref.digest, ref.size) == (sha256(b"hello"), 5)
    assert store.has(ref.digest)
    assert not store.has(sha256(b"other"))
    path = store.path(ref.digest)
    assert path.read_bytes() == b"hello"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path.relative_to(store.root).parts[:3] == ("blobs", "sha256", ref.digest[7:9])
    for folder in (store.root, store.root / "blobs", store.root / "blobs" / "sha256", path.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_buffers_are_written_once(tmp_path: Path) -> None:
    """A second capture of the same weights writes nothing; equal buffers of one call count once."""
    store = Store(tmp_path)
    large = os.urandom(40 << 20)
    buffers = [memoryview(large), memoryview(b""), memoryview(b"small"), memoryview(large)]
    refs, new = store.put_buffers(buffers)
    assert [ref.size for ref in refs] == [len(large), 0, 5, len(large)]
    assert refs[0].digest == refs[3].digest == sha256(large)
    assert new == len(large) + 5
    assert store.path(refs[0].digest).read_bytes() == large
    before = {path: path.stat().st_mtime_ns for path in files_below(tmp_path)}
    again, new = store.put_buffers(buffers)
    assert (again, new) == (refs, 0)
    assert {path: path.stat().st_mtime_ns for path in files_below(tmp_path)} == before


def test_files_and_streams(tmp_path: Path) -> None:
    """A file and a stream of the same bytes are the same blob, and a file that is known is not copied."""
    store = Store(tmp_path / "store")
    data = os.urandom(3 << 20)
    source = tmp_path / "model.bin"
    source.write_bytes(data)
    ref = store.put_file(source)
    before = store.path(ref.digest).stat().st_ino
    assert store.put_stream(io.BytesIO(data)) == ref == store.put_file(source)
    assert store.path(ref.digest).stat().st_ino == before
    assert [path.stat().st_size for path in files_below(store.root)] == [len(data)]


def test_unreadable_file_is_said(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(StoreError, match=r"gone\.bin cannot be read"):
        Store(tmp_path).put_file(tmp_path / "gone.bin")


def test_bundle_digest_is_that_of_its_canonical_bytes(tmp_path: Path) -> None:
    """Key order does not matter, and the Bundle's digest is the sha256 of the file."""
    store = Store(tmp_path)
    digest = store.put_bundle({"b": 1, "a": "ä"})
    assert digest == store.put_bundle({"a": "ä", "b": 1}) == sha256('{"a":"ä","b":1}'.encode())
    assert store.bundle_path(digest).read_bytes() == '{"a":"ä","b":1}'.encode()


def test_concurrent_writers_of_one_blob(tmp_path: Path) -> None:
    """Many writers of the same bytes leave one whole blob, and one of them counts it as new."""
    data = os.urandom(4 << 20)
    barrier = threading.Barrier(6)

    def put(_: int) -> int:
        store = Store(tmp_path)
        barrier.wait()
        return store.put_buffers([memoryview(data)])[1]

    with ThreadPoolExecutor(6) as pool:
        new = list(pool.map(put, range(6)))
    assert sum(new) == len(data)
    assert [path.read_bytes() == data for path in files_below(tmp_path)] == [True]


def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A write that fails for space names the bytes and the folder; no partial blob stays."""
    text = """
import resource, signal, sys
from pathlib import Path
from nbdeploy.errors import StoreError
from nbdeploy.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = Store(Path(sys.argv[1]))
try: store.put_buffers([memoryview(b"x" * (2 << 20))])
except StoreError as error: print(error)
"""
    done = run_script(text, str(tmp_path))
    assert "is full: 2,097,152 bytes are needed" in done
    assert str(tmp_path) in done
    assert files_below(tmp_path) == []


def run_script(text: str, *arguments: str) -> str:
    """Run Python text in a process of its own and return its output."""
    path = f"import sys; sys.path[:0] = {PATHS!r}\n"
    command = [sys.executable, "-I", "-c", path + text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_interrupt_leaves_no_partial_file(tmp_path: Path) -> None:
    """An interrupt in the midst of writing takes the temporary file along."""
    text = """
import sys
from pathlib import Path
from nbdeploy.store import Store
data = bytearray(700 << 20)
print("go", flush=True)
try: Store(Path(sys.argv[1])).put_buffers([memoryview(data), memoryview(data)[1:]])
except KeyboardInterrupt: print("interrupted")
"""
    path = f"import sys; sys.path[:0] = {PATHS!r}\n"
    command = [sys.executable, "-I", "-c", path + text, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob("*.part")) and process.poll() is None and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=30)[0].strip() == "interrupted"
        finally:
            process.kill()
    assert list(tmp_path.rglob("*.part")) == []


def test_buffer_that_changes_is_noticed(tmp_path: Path) -> None:
    """A blob never gets a name that is not its content's, even when the memory changes while it is written."""
    data = bytearray(64 << 20)
    stop = threading.Event()

    def scribble() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 256
            for at in range(0, len(data), 1 << 20):
                data[at] = value

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        with pytest.raises(ChangedError, match="changed while"):
            Store(tmp_path).put_buffers([memoryview(data)])
    finally:
        stop.set()
        writer.join()
    assert files_below(tmp_path) == []


def test_unusable_folder_is_said(tmp_path: Path) -> None:
    """A Store where a file is in the way says so."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be made"):
        Store(tmp_path / "file" / "store")
    store = Store(tmp_path / "store")
    (store.root / "blobs").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        store.put_bytes(b"x")


def test_memory_of_a_first_capture(tmp_path: Path) -> None:
    """Keeping weights makes no second copy of them in memory."""
    text = """
import os, resource, sys
from pathlib import Path
from nbdeploy.store import Store
blocks = [bytearray(os.urandom(1 << 20) * 64) for _ in range(6)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert Store(Path(sys.argv[1])).put_buffers([memoryview(block) for block in blocks])[1]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (6 << 16))
"""
    extra = float(run_script(text, str(tmp_path)))
    assert extra <= 0.05
