"""`take`: from live objects to a Capture, checks first and cheap ones before dear ones."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdeploy_server.forms import describe, schema_of
from nbdeploy_server.signature import Signature, infer

from nbdeploy import codec
from nbdeploy.capture import arguments as binding
from nbdeploy.capture import folder, hints, live, reach, secrets, variables
from nbdeploy.capture.arguments import LastCall
from nbdeploy.capture.modules import LocalModule, check_fresh, imports, local_modules
from nbdeploy.capture.origin import FORMAT_VERSION, made_with, requires
from nbdeploy.capture.planning import Plan, Request, live_call, plan, roots
from nbdeploy.capture.receipt import call, receipt
from nbdeploy.errors import SampleError, UsageError
from nbdeploy.store import Store

_TEXT = 1 << 20  # bytes: larger files are data, which the search for secrets leaves out


@dataclass(frozen=True)
class Capture:
    """What was captured, written to the Store but for the environment.

    Attributes:
        manifest: of the Bundle, its "distributions" still empty.
        modules: import names whose distributions the Bundle needs.
        receipt: what the card shows of it.
        sample: a line that shows the sample, or "".
        call: how predict is called, for people.
        runs: how often predict ran here.
        seconds: how long it took.
    """

    manifest: dict[str, Any]
    modules: tuple[str, ...]
    receipt: dict[str, Any]
    sample: str
    call: str
    runs: int
    seconds: float


def take(request: Request, store: Store) -> Capture:
    """Capture predict and its model.

    Raises:
        CaptureError and its kinds: with what, where and the next step; nothing is left in the Store but blobs.
    """
    began = time.perf_counter()
    changed = variables.changed(secrets=request.secrets)
    reached = reach.walk(request.predict)
    planned = plan(request, reached)
    whole = planned.arrangement.arguments
    cut: list[str] = []
    if whole is not None and isinstance(request.sample, LastCall):
        first, cut = binding.first_row(whole)
        planned = planned.with_sample(first)
    if whole is not None:
        planned = planned.with_sample(live.plain(planned.arrangement.arguments or {}))
        whole = live.plain(whole)
    signature, types = infer(
        planned.function,
        model_parameter=planned.arrangement.model_parameter,
        sample=planned.arrangement.arguments,
        streams=planned.streams,
    )
    _check_settable(planned, signature)
    live.pack_sample(planned.arrangement.arguments or {})
    objects = roots(request, planned, types)
    encoded, planned = _encode(request, planned, objects, reached)
    modules = local_modules(encoded.modules)
    check_fresh(modules)
    values = variables.secret_values(named=request.secrets)
    secrets.scan(encoded.skeleton, values, objects, _texts(encoded, modules, changed) if values else ())
    # The memory is written before predict runs: one that changes it (batch norm in train mode, a cache) must begin
    # everywhere from the same state.
    written = _write(request, store, encoded, modules)
    try:
        run = _run(request, planned, signature, types)
    except SampleError:
        if not cut or whole is None:
            raise
        # What looked like rows was one request: an image, a matrix.
        cut, planned = [], planned.with_sample(whole)
        run = _run(request, planned, signature, types)
    planned = run.plan
    packed = {text: b for text, b in (("the sample", run.sample), ("the answer to the sample", run.answer)) if b}
    secrets.scan(
        b"", values, {}, [secrets.Text(text, _OTHER_SAMPLE, b.decode("latin-1")) for text, b in packed.items()]
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "requires": requires(),
        "made_with": made_with(),
        **written.parts,
        "variables": changed.changed,
        "secrets": sorted(request.secrets),
        "distributions": [],
        "predict": planned.how,
        "signature": run.signature.to_json(),
        "sample": _stored(store, run.sample),
        "answer": _stored(store, run.answer),
        "seed": live.SEED,
        "globals": list(encoded.globals),
    }
    arguments = planned.arrangement.arguments
    local = {module.name for module in modules}
    return Capture(
        manifest=manifest,
        modules=tuple(sorted({*encoded.modules, *_module_imports(modules)} - local)),
        receipt=receipt(request, planned, reached, modules, written.parts, written.new, changed, cut),
        sample=live.preview(arguments) if arguments is not None else "",
        call=call(request, planned, run.signature),
        runs=run.count,
        seconds=time.perf_counter() - began,
    )


_OTHER_SAMPLE = "It would be stored in the Bundle. Give another request with --sample."


def _check_settable(planned: Plan, signature: Signature) -> None:
    """Refuse a sample that sets what no request can set."""
    names = {parameter.name for parameter in signature.parameters}
    unknown = sorted(set(planned.arrangement.arguments or ()) - names)
    if unknown and not signature.extra:
        raise SampleError(
            f"The sample sets {unknown[0]}, but its default in {binding.name_of(planned.function)} is an object of the "
            "notebook, so no request can set it: leave it out of the sample."
        )


def _encode(
    request: Request, planned: Plan, objects: dict[str, Any], reached: reach.Reach
) -> tuple[codec.Encoded, Plan]:
    """Encode; a model that is not passed may turn out to be reached after all, through objects of libraries."""
    met = False

    def look(item: object) -> None:
        nonlocal met
        met = met or item is request.model
        if isinstance(item, type) and _MSGSPEC in vars(item):
            delattr(item, _MSGSPEC)  # what our decoder keeps in the notebook's classes cannot travel

    with hints.evaluated(objects["types"].values()):
        encoded = codec.encode(objects, refuse=look)
    if planned.model == "unused" and (met or reach.holds(reached.values, request.model)):
        planned = planned.reaching()
    return encoded, planned


_MSGSPEC = "__msgspec_cache__"


def _texts(
    encoded: codec.Encoded, modules: tuple[LocalModule, ...], changed: variables.Variables
) -> list[secrets.Text]:
    """Return every further text that travels, for the search for secrets."""
    texts = [
        secrets.Text(
            "the cell that defines a part of predict",
            "The text of that cell would be stored in the Bundle. Set os.environ[{name!r}] in a cell without "
            "functions, read it inside predict, and deploy with --secret {name}.",
            text,
        )
        for text in encoded.cells.values()
    ]
    texts += [
        secrets.Text(
            f"the variable {variable}, which this notebook set",
            f"It would be stored in the Bundle. Deploy with --secret {variable}: then it is handed over, not stored.",
            value,
        )
        for variable, value in changed.changed.items()
    ]
    texts += [
        secrets.Text(
            f"the file {place}, which travels with predict",
            "It would be stored in the Bundle. Read os.environ[{name!r}] there instead, and deploy with "
            "--secret {name}.",
            path.read_bytes().decode("latin-1"),
        )
        for module in modules
        for place, path in module.files.items()
        if path.stat().st_size <= _TEXT
    ]
    return texts


@dataclass(frozen=True)
class _Run:
    """What the live run gave; `answer` is None, and `count` 0, where the model exists only in a Replica."""

    plan: Plan
    sample: bytes | None
    answer: bytes | None
    signature: Signature
    count: int


def _run(request: Request, planned: Plan, signature: Signature, types: dict[str, Any]) -> _Run:
    """Run predict live on the sample, where there is one and the model is at hand."""
    arguments = planned.arrangement.arguments
    if arguments is None:
        return _Run(planned, None, None, signature, 0)
    sample = live.pack_sample(arguments)
    arguments = live.decoded(signature, types, sample)
    callable_ = live_call(request, planned)
    if callable_ is None:
        return _Run(planned, sample, None, signature, 0)
    done = live.run(callable_, arguments)
    planned = planned.of_kind(done.kind)
    item = done.value[0] if planned.streams and done.value else done.value
    signature = dataclasses.replace(signature, returns=schema_of(describe(item)), streams=planned.streams)
    return _Run(planned, sample, done.answer, signature, 1)


@dataclass(frozen=True)
class _Written:
    """The manifest's rows of what went into the Store; `new` = how many blobs were new there, and their bytes."""

    parts: dict[str, Any]
    new: tuple[int, int]


def _write(request: Request, store: Store, encoded: codec.Encoded, modules: tuple[LocalModule, ...]) -> _Written:
    files = [_put(store, path, source, "code") for module in modules for path, source in module.files.items()]
    for given in request.files:
        source = (request.folder / Path(given).expanduser()).resolve()
        if not source.is_file():
            raise UsageError(f"--file {given}: there is no file {source}.")
        inside = source.is_relative_to(request.folder.resolve())
        path = source.relative_to(request.folder.resolve()).as_posix() if inside else source.name
        files.append(_put(store, path, source, "file"))
    if request.model_from:
        files += folder.collect(folder.resolve(request.model_from, request.folder), store)
    before = {path.name for path in store.root.glob("blobs/sha256/*/*")}
    skeleton, blobs, new_bytes = codec.write(encoded, store)
    new = {row["digest"] for row in blobs if row["digest"].partition(":")[2] not in before}
    sources = {name: store.put_bytes(text.encode()) for name, text in encoded.cells.items()}
    parts = {
        "skeleton": {"digest": skeleton.digest, "size": skeleton.size},
        "blobs": blobs,
        "files": files,
        "cells": {name: {"digest": ref.digest, "size": ref.size} for name, ref in sources.items()},
    }
    return _Written(parts, (len(new), new_bytes))


def _put(store: Store, path: str, source: Path, kind: str) -> dict[str, Any]:
    ref = store.put_file(source)
    return {"path": path, "digest": ref.digest, "size": ref.size, "kind": kind}


def _stored(store: Store, data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    ref = store.put_bytes(data)
    return {"digest": ref.digest, "size": ref.size}


def _module_imports(modules: tuple[LocalModule, ...]) -> set[str]:
    """Return what local modules import: their distributions are needed too."""
    return {
        name for module in modules for path in module.files.values() if path.suffix == ".py" for name in imports(path)
    }


def secret_environment(names: tuple[str, ...], *, elsewhere: bool = False) -> dict[str, str]:
    """Return the values of --secret from this kernel's environment.

    Args:
        names: each "NAME" or "NAME=SECRET/KEY".
        elsewhere: Replicas find the latter in the cluster, so that they need not be set here.

    Raises:
        UsageError: one is not set.
    """
    values = {}
    for name in names:
        variable, _, place = name.partition("=")
        if place and elsewhere and variable not in os.environ:
            continue
        if variable not in os.environ:
            raise UsageError(f"--secret {variable}: it is not set in this kernel. Set os.environ[{variable!r}] first.")
        values[variable] = os.environ[variable]
    return values


__all__ = ["Capture", "Request", "secret_environment", "take"]
