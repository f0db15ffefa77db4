"""The manifest of a Bundle: what it is made of, and the strict reading of its JSON.

A manifest comes from a Store, an image or a registry, so nothing in it is believed before it was looked at: types,
digests, and above all paths, which must stay below the folder that they are laid into.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from nbdeploy_server.errors import BundleInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT_VERSION = 1
KINDS = {"code": "code", "file": "files", "model": "model", "wheel": "wheels"}  # kind of a File → folder it unpacks to

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DEVICE = re.compile(r"[a-z]+(:[0-9]{1,4})?")


@dataclass(frozen=True)
class Ref:
    """Name and size, in bytes, of some content."""

    digest: str
    size: int

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's form."""
        return {"digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Blob:
    """Raw memory of a tensor or array: the bytes from `start` of a storage of `storage_size` bytes."""

    ref: Ref
    start: int
    storage_size: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's form."""
        return {**self.ref.to_json(), "start": self.start, "storage_size": self.storage_size, "device": self.device}


@dataclass(frozen=True)
class File:
    """A file that travels; `path` is relative, with forward slashes, `kind` one of KINDS."""

    path: str
    ref: Ref
    kind: str

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's form."""
        return {**self.ref.to_json(), "path": self.path, "kind": self.kind}


def canonical(manifest: Mapping[str, Any]) -> bytes:
    """Return the one byte form of a manifest, over which a Bundle's digest is taken."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


@dataclass(frozen=True)
class Manifest:
    """What a Bundle is made of; docs/2-bundle-format.md explains each field."""

    requires: Mapping[str, str]
    made_with: Mapping[str, str]
    skeleton: Ref
    blobs: tuple[Blob, ...]
    files: tuple[File, ...]
    cells: Mapping[str, Ref]
    variables: Mapping[str, str]
    secrets: tuple[str, ...]
    distributions: tuple[Mapping[str, Any], ...]
    predict: Mapping[str, Any]
    signature: Mapping[str, Any]
    sample: Ref | None
    answer: Ref | None
    seed: int
    globals: frozenset[str]

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read the bytes of a manifest.json; raises BundleInvalid naming the field that is wrong."""
        try:
            raw = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BundleInvalid(f"the manifest is no JSON: {error}") from error
        top = _mapping(raw, "the manifest")
        version = _integer(top.get("format_version"), "format_version")
        if version > FORMAT_VERSION:
            raise BundleInvalid(f"made by a newer nbdeploy (format {version}); upgrade nbdeploy here")
        if version < 1:
            _fail("format_version", "a number from 1")
        names = set(cls.__dataclass_fields__)
        missing, unknown = names - set(top), set(top) - names - {"format_version"}
        if missing or unknown:
            raise BundleInvalid(
                f"the manifest lacks {sorted(missing)}" if missing else f"format 1 does not know {sorted(unknown)}"
            )
        return cls(
            requires=_words(top["requires"], "requires", ("python", "implementation", "platform")),
            made_with=_words(top["made_with"], "made_with"),
            skeleton=_ref(top["skeleton"], "skeleton"),
            blobs=tuple(_blob(item, name) for item, name in _items(top["blobs"], "blobs")),
            files=_files(top["files"]),
            cells={
                name: _ref(item, f"cells[{name!r}]") for name, item in sorted(_mapping(top["cells"], "cells").items())
            },
            variables=_words(top["variables"], "variables"),
            secrets=tuple(_word(item, name) for item, name in _items(top["secrets"], "secrets")),
            distributions=tuple(
                _distribution(item, name) for item, name in _items(top["distributions"], "distributions")
            ),
            predict=_predict(top["predict"]),
            signature=_mapping(top["signature"], "signature"),
            sample=None if top["sample"] is None else _ref(top["sample"], "sample"),
            answer=None if top["answer"] is None else _ref(top["answer"], "answer"),
            seed=_integer(top["seed"], "seed"),
            globals=frozenset(_global(item, name) for item, name in _items(top["globals"], "globals")),
        )

    def refs(self) -> dict[str, int]:
        """Return every blob that the Bundle needs, digest → size in bytes."""
        return {ref.digest: ref.size for ref in (*self.small(), *(blob.ref for blob in self.blobs))} | {
            file.ref.digest: file.ref.size for file in self.files
        }

    def small(self) -> Iterable[Ref]:
        """Return what is hashed at every check whatever its size: all that is code, or is read as a whole."""
        yield self.skeleton
        yield from self.cells.values()
        yield from (ref for ref in (self.sample, self.answer) if ref is not None)
        yield from (file.ref for file in self.files if file.kind == "code")


def _fail(where: str, wanted: str) -> NoReturn:
    raise BundleInvalid(f"the manifest's {where} is not {wanted}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else _fail(where, "an object")


def _items(value: Any, where: str) -> list[tuple[Any, str]]:
    """Return the items of a list, each with its own name for messages."""
    if not isinstance(value, list):
        _fail(where, "a list")
    return [(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _word(value: Any, where: str) -> str:
    return value if isinstance(value, str) and value and "\0" not in value else _fail(where, "a non-empty string")


def _integer(value: Any, where: str) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else _fail(where, "a number")


def _words(value: Any, where: str, wanted: tuple[str, ...] = ()) -> dict[str, str]:
    """Check an object whose values are strings and which has at least the wanted keys."""
    words = _mapping(value, where)
    for name, item in words.items():
        if not isinstance(item, str) or "\0" in item or not name or "\0" in name:
            _fail(f"{where}[{name!r}]", "a string")
    for name in wanted:
        _word(words.get(name), f"{where}[{name!r}]")
    return words


def _ref(value: Any, where: str) -> Ref:
    mapping = _mapping(value, where)
    digest = mapping.get("digest")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        _fail(f"{where}.digest", "sha256: and 64 hexadecimal digits")
    return Ref(digest, _integer(mapping.get("size"), f"{where}.size"))


def _blob(value: Any, where: str) -> Blob:
    ref, mapping = _ref(value, where), _mapping(value, where)
    start, whole = (
        _integer(mapping.get("start"), f"{where}.start"),
        _integer(mapping.get("storage_size"), f"{where}.storage_size"),
    )
    if start + ref.size > whole:
        _fail(f"{where}.start", "within its storage")
    device = mapping.get("device")
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        _fail(f"{where}.device", "a device such as cpu or cuda:0")
    return Blob(ref, start, whole, device)


def _files(value: Any) -> tuple[File, ...]:
    """Check the list of files: kinds, relative paths, no path twice and none below another file."""
    files: dict[tuple[str, str], File] = {}
    for item, where in _items(value, "files"):
        mapping = _mapping(item, where)
        kind, path = mapping.get("kind"), mapping.get("path")
        if not isinstance(kind, str) or kind not in KINDS:
            _fail(f"{where}.kind", f"one of {', '.join(KINDS)}")
        if not isinstance(path, str) or not _relative(path):
            _fail(f"{where}.path", f"a plain relative path: {path!r}")
        if (kind, path) in files:
            _fail(f"{where}.path", f"unique: {path!r}")
        files[kind, path] = File(path, _ref(item, where), kind)
    for kind, path in files:
        parts = path.split("/")
        for end in range(1, len(parts)):
            if (kind, "/".join(parts[:end])) in files:
                _fail("files", f"consistent: {path!r} lies below another file")
    return tuple(files.values())


def _relative(path: str) -> bool:
    """Tell whether a path stays below the folder it is laid into, on every operating system."""
    if "\\" in path or "\0" in path or re.match(r"[A-Za-z]:", path):
        return False
    return all(part not in {"", ".", ".."} for part in path.split("/")) and path.isprintable()


def _distribution(value: Any, where: str) -> dict[str, Any]:
    mapping = _mapping(value, where)
    _word(mapping.get("name"), f"{where}.name")
    _word(mapping.get("version"), f"{where}.version")
    if mapping.get("origin") is not None:
        _mapping(mapping["origin"], f"{where}.origin")
    if mapping.get("wheel") is not None and not _relative(_word(mapping["wheel"], f"{where}.wheel")):
        _fail(f"{where}.wheel", "a plain relative path")
    return mapping


def _predict(value: Any) -> dict[str, Any]:
    """Check how predict is called."""
    mapping = _mapping(value, "predict")
    _word(mapping.get("name"), "predict.name")
    for name in ("model", "variable"):
        if mapping.get(name) is not None:
            _word(mapping[name], f"predict.{name}")
    choices = {
        "kind": {"function", "generator", "coroutine", "async_generator"},
        "how": {"argument", "reached", "class", "unused", "none"},
        "source": {"live", "setup", "folder", "none"},
    }
    for name, allowed in choices.items():
        if not isinstance(mapping.get(name), str) or mapping[name] not in allowed:
            _fail(f"predict.{name}", f"one of {', '.join(sorted(allowed))}")
    return mapping


def _global(value: Any, where: str) -> str:
    word = _word(value, where)
    module, _, name = word.partition(":")
    return word if module and name else _fail(where, "module:name")
