"""Reading a Bundle: the one place that turns a digest into live objects, and the checks that come before it.

The order is fixed: the manifest against its digest, its format, this Python, the blobs against their digests, and only
then the first byte of the pickle. `find_class` allows only what the manifest lists; that finds a skeleton that does not
belong to its manifest, it is no sandbox: whoever writes Bundles runs code here by design.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import linecache
import mmap
import pickle
import platform
import secrets
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from nbdeploy_server import restore
from nbdeploy_server.errors import BundleInvalid, LoadFailed

if TYPE_CHECKING:
    from pathlib import Path

from nbdeploy_server.manifest import DIGEST, FORMAT_VERSION, KINDS, Blob, File, Manifest, Ref, canonical

__all__ = ["FORMAT_VERSION", "Blob", "Bundle", "File", "Manifest", "Ref", "blob_path", "canonical", "manifest_path"]

SMALL = 1 << 20  # blobs up to this size, in bytes, are hashed at every check
_RESTORE = restore.__name__


def blob_path(store: Path, digest: str) -> Path:
    """Return where a Store keeps this blob."""
    name = digest.removeprefix("sha256:")
    return store / "blobs" / "sha256" / name[:2] / name


def manifest_path(store: Path, digest: str) -> Path:
    """Return where a Store keeps the manifest of this Bundle."""
    return store / "bundles" / "sha256" / digest.removeprefix("sha256:") / "manifest.json"


@dataclass
class Bundle:
    """A Bundle of a Store: its manifest, checked against its digest, and what can be read through it."""

    store: Path
    digest: str
    manifest: Manifest
    _checked: bool = field(default=False, repr=False)

    @classmethod
    def open(cls, store: Path, digest: str) -> Bundle:
        """Read a Bundle's manifest; raises BundleInvalid where it is missing, changed, or of a newer format."""
        if not DIGEST.fullmatch(digest):
            raise BundleInvalid(f"{digest!r} is no digest of a Bundle")
        try:
            data = manifest_path(store, digest).read_bytes()
        except OSError as error:
            raise BundleInvalid(f"the Bundle {digest[:19]} is not in {store}: {error.strerror}") from error
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise BundleInvalid(f"the manifest of Bundle {digest[:19]} was changed after it was made; deploy again")
        return cls(store, digest, Manifest.parse(data))

    def check_platform(self) -> None:
        """Raise BundleInvalid where this Python cannot run the Bundle's bytecode."""
        made, here = self.manifest.requires["python"], f"{sys.version_info.major}.{sys.version_info.minor}"
        if made != here:
            raise BundleInvalid(f"made for Python {made}, this is {here}: its functions are bytecode of {made}")
        made, here = self.manifest.requires["implementation"], platform.python_implementation().lower()
        if made != here:
            raise BundleInvalid(f"made for {made}, this is {here}: its functions are bytecode of {made}")

    def check(self, *, full: bool = False, weights: bool = True) -> None:
        """Compare every blob with its size and digest; raises BundleInvalid naming the first that is wrong.

        Large blobs that a stamp of an earlier check vouches for (same size and modification time) are not hashed
        again unless `full`. The stamp is renewed where the Store can be written. Without `weights` only the sizes of
        large blobs are looked at: they hold no code, so their digests may be checked while the first imports run.
        """
        stamp = {} if full else self._stamp()
        always = {ref.digest for ref in self.manifest.small()}
        found: dict[str, list[int]] = {}
        to_hash = []
        for digest, size in self.manifest.refs().items():
            try:
                state = blob_path(self.store, digest).stat()
            except OSError as error:
                raise BundleInvalid(f"the blob {digest[:19]} is missing in {self.store}; deploy again") from error
            if state.st_size != size:
                raise BundleInvalid(f"the blob {digest[:19]} has {state.st_size} bytes instead of {size}; deploy again")
            large = size > SMALL and digest not in always
            if large:
                found[digest] = [state.st_size, state.st_mtime_ns]
            if not large or (weights and stamp.get(digest) != found[digest]):
                to_hash.append(digest)
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(self._hash, to_hash):
                pass
        if weights and found and found != stamp:
            self._write_stamp(found)
        self._checked = True

    def read(self, ref: Ref) -> bytes:
        """Return a blob's bytes; raises BundleInvalid where they do not match the digest."""
        try:
            data = blob_path(self.store, ref.digest).read_bytes()
        except OSError as error:
            raise BundleInvalid(f"the blob {ref.digest[:19]} cannot be read: {error.strerror}") from error
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != ref.digest:
            _damaged(ref.digest)
        return data

    def unpack_files(self, target: Path) -> None:
        """Lay the files out below `target`: code, files, model (as links to the blobs) and wheels.

        Each folder appears whole or not at all; one that is complete already stays as it is. Raises BundleInvalid where
        a file's content is damaged or a folder of the target is a link.
        """
        target.mkdir(parents=True, exist_ok=True)
        for kind, folder in KINDS.items():
            files = [file for file in self.manifest.files if file.kind == kind]
            final = target / folder
            if final.is_symlink():
                raise BundleInvalid(f"{final} is a link; files of a Bundle are only written into real folders")
            if not files or self._unpacked(files, final):
                continue
            mark = secrets.token_hex(8)
            temporary, old = target / f".{folder}.{mark}.part", target / f".{folder}.{mark}.old"
            try:
                for file in files:
                    self._place(file, temporary / file.path)
                if final.exists():
                    final.rename(old)
                try:
                    temporary.rename(final)
                except OSError:
                    # somebody else unpacked the same Bundle meanwhile: theirs is as good where it is complete
                    if not self._unpacked(files, final):
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)

    def load(self) -> dict[str, Any]:
        """Rebuild the captured objects: {"predict", "model", "setup", "types"}, as far as they travelled.

        Blobs are mapped privately and read when they are touched. Raises BundleInvalid before anything is unpickled
        where the Bundle is damaged or not for this Python, LoadFailed where an object cannot be rebuilt.
        """
        self.check_platform()
        if not self._checked:
            self.check()
        reader = _Reader(self, self.read(self.manifest.skeleton))
        try:
            value = reader.load()
        except (BundleInvalid, LoadFailed):
            raise
        except ModuleNotFoundError as error:
            raise LoadFailed(
                f"the captured objects need the module {error.name!r}, which is not installed here; "
                "add its package with --pip, or its file with --file"
            ) from error
        except AttributeError as error:
            raise LoadFailed(f"the captured objects need a name that is missing here: {error}") from error
        except Exception as error:  # rebuilding runs the users' own code, which may raise anything
            raise LoadFailed(f"the captured objects cannot be rebuilt: {type(error).__name__}: {error}") from error
        if not isinstance(value, dict):
            raise BundleInvalid("the skeleton holds no mapping of captured objects")
        return value

    def fill_linecache(self) -> None:
        """Make tracebacks show the lines of the notebook's cells."""
        for name, ref in self.manifest.cells.items():
            lines = self.read(ref).decode(errors="replace").splitlines(keepends=True)
            # without a modification time the entry is never looked for on disk, so it never expires
            linecache.cache[name] = (ref.size, None, lines, name)

    def handle(self, index: int) -> restore.Handle:
        """Map the blob at this position of the manifest, privately: writes to it stay in this process."""
        if not 0 <= index < len(self.manifest.blobs):
            raise BundleInvalid(f"the skeleton names blob {index}, its manifest has {len(self.manifest.blobs)}")
        blob = self.manifest.blobs[index]
        if not blob.ref.size:
            return restore.Handle(bytearray(), blob.start, blob.device)
        with blob_path(self.store, blob.ref.digest).open("rb") as file:
            memory = mmap.mmap(
                file.fileno(), blob.ref.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        return restore.Handle(memory, blob.start, blob.device)

    def _hash(self, digest: str) -> None:
        """Raise BundleInvalid where a blob's content does not match its name."""
        try:
            found = _digest_of(blob_path(self.store, digest))
        except OSError as error:
            raise BundleInvalid(f"the blob {digest[:19]} cannot be read: {error.strerror}") from error
        if found != digest:
            _damaged(digest)

    def _stamp_path(self) -> Path:
        return self.store / "verified" / f"{self.digest.removeprefix('sha256:')}.json"

    def _stamp(self) -> dict[str, Any]:
        """Return what an earlier check vouches for, nothing where there is no readable stamp."""
        try:
            stamp = json.loads(self._stamp_path().read_bytes())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _write_stamp(self, found: dict[str, list[int]]) -> None:
        path = self._stamp_path()
        temporary = path.with_name(f".{secrets.token_hex(8)}.part")
        with contextlib.suppress(OSError):  # the Store of an image is read-only: the next check hashes again
            path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary.write_bytes(canonical(found))
            temporary.replace(path)

    def _place(self, file: File, target: Path) -> None:
        """Copy one file and check the copy, or link it where it is part of a model."""
        target.parent.mkdir(parents=True, exist_ok=True)
        source = blob_path(self.store, file.ref.digest)
        if file.kind == "model":
            target.symlink_to(source.resolve())
            return
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise BundleInvalid(f"the file {file.path} cannot be unpacked: {error.strerror}") from error
        if _digest_of(target) != file.ref.digest:
            _damaged(file.ref.digest)

    def _unpacked(self, files: list[File], folder: Path) -> bool:
        """Tell whether a folder holds exactly these files already; bytecode may have appeared beside code."""
        present = {path for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
        present = {path for path in present if path.parent.name != "__pycache__"}
        if present != {folder / file.path for file in files}:
            return False
        for file in files:
            path, blob = folder / file.path, blob_path(self.store, file.ref.digest)
            if file.kind == "model":
                if not path.is_symlink() or path.resolve() != blob.resolve():
                    return False
            elif path.resolve() != folder.resolve() / file.path or _digest_of(path) != file.ref.digest:
                return False
        return True


class _Reader(pickle.Unpickler):  # noqa: S301 - digests and format are checked before one is made
    """Unpickles a skeleton: only listed globals, blobs from the Bundle, each mapped once and when first named."""

    def __init__(self, bundle: Bundle, skeleton: bytes) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._bundle = bundle
        self._handles: dict[int, restore.Handle] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == _RESTORE:
            if name not in restore.__all__:
                raise BundleInvalid(f"the skeleton asks for {name!r} of the restore functions; upgrade nbdeploy here")
            return self._blob if name == "blob" else getattr(restore, name)
        if module.partition(".")[0] != "cloudpickle" and f"{module}:{name}" not in self._bundle.manifest.globals:
            raise BundleInvalid(f"the skeleton names {module}:{name}, which its manifest does not list")
        if module == "__main__":
            raise LoadFailed(f"the captured objects name {name!r} of the notebook without bringing it along")
        importlib.import_module(module)  # the unpickler's own import is less exact about which module was missing
        return super().find_class(module, name)

    def _blob(self, index: int) -> restore.Handle:
        if index not in self._handles:
            self._handles[index] = self._bundle.handle(index)
        return self._handles[index]


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _damaged(digest: str) -> NoReturn:
    raise BundleInvalid(f"the blob {digest[:19]} is damaged: its content does not match its name; deploy again")
