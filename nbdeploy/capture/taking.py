"""`take`: from live objects to a Capture, checks first and cheap ones before dear ones."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdeploy_server import predictor
from nbdeploy_server.errors import ServerError
from nbdeploy_server.forms import describe, schema_of
from nbdeploy_server.signature import Signature, infer

from nbdeploy import codec
from nbdeploy.capture import arguments as binding
from nbdeploy.capture import folder, live, reach, secrets, variables
from nbdeploy.capture.arguments import MISSING, Arrangement, LastCall
from nbdeploy.capture.modules import LocalModule, imports, local_modules
from nbdeploy.capture.origin import FORMAT_VERSION, made_with, requires
from nbdeploy.errors import CaptureError, SampleError, UsageError
from nbdeploy.store import Store


@dataclass(frozen=True)
class Request:
    """What shall be captured.

    Attributes:
        predict, model: live objects; `has_model` tells whether there is one (None is a model).
        variable: the model's name in the notebook.
        sample: MISSING, a LastCall, a dict, a tuple, or the one argument.
        setup: --setup.
        model_from: --model-from.
        folder: of the notebook; relative paths start there.
        files: --file.
        secrets: names of --secret.
        pass_model: --pass-model, --no-pass-model, or None.
    """

    predict: Any
    model: Any = None
    has_model: bool = False
    variable: str = ""
    sample: Any = MISSING
    setup: Callable[..., Any] | None = None
    model_from: str | None = None
    folder: Path = field(default_factory=Path.cwd)
    files: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    pass_model: bool | None = None


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


@dataclass(frozen=True)
class _Plan:
    """How predict will be made to answer."""

    function: Callable[..., Any]
    how: dict[str, Any]
    arrangement: Arrangement


def take(request: Request, store: Store) -> Capture:
    """Capture predict and its model.

    Raises:
        CaptureError and its kinds: with what, where and the next step; nothing is left in the Store but blobs.
    """
    began = time.perf_counter()
    if not callable(request.predict):
        raise UsageError(
            f"predict must be a function, but it is a {type(request.predict).__name__}. "
            "Write %deploy MODEL PREDICT, or %deploy PREDICT."
        )
    changed = variables.changed(secrets=request.secrets)
    reached = reach.walk(request.predict)
    plan = _plan(request, reached)
    cut: list[str] = []
    if plan.arrangement.arguments is not None and isinstance(request.sample, LastCall):
        kept, cut = binding.first_row(plan.arrangement.arguments)
        plan = dataclasses.replace(plan, arrangement=dataclasses.replace(plan.arrangement, arguments=kept))
    signature, types = infer(
        plan.function,
        model_parameter=plan.arrangement.model_parameter,
        sample=plan.arrangement.arguments,
        streams=plan.how["kind"] in predictor.STREAMING,
    )
    _check_settable(plan, signature)
    roots = _roots(request, plan, types)
    encoded, plan = _encode(request, plan, roots, reached)
    sample = live.pack_sample(plan.arrangement.arguments) if plan.arrangement.arguments is not None else None
    modules = local_modules(encoded.modules)
    cells = dict(encoded.cells)
    values = variables.secret_values(named=request.secrets)
    texts = {k: v for k, v in roots.items() if k != "types"}
    secrets.scan(encoded.skeleton, values, texts, _texts(cells, modules, changed, sample))
    # The memory is written before predict runs: a predict that changes it (batch norm in train mode, a cache) must
    # begin everywhere from the same state.
    written = _write(request, store, encoded, modules, cells)
    run = _sample_run(request, plan, signature, types, sample, whole)
    plan, sample, signature = run.plan, run.sample, run.signature
    if run.sample is not sample:
        cut = []
    manifest = {
        "format_version": FORMAT_VERSION,
        "requires": requires(),
        "made_with": made_with(),
        **written.parts,
        "variables": changed.changed,
        "secrets": sorted(request.secrets),
        "distributions": [],
        "predict": plan.how,
        "signature": signature.to_json(),
        "sample": _stored(store, sample),
        "answer": _stored(store, answer),
        "seed": live.SEED,
        "globals": list(encoded.globals),
    }
    receipt = _receipt(request, plan, reached, modules, written, changed, cut)
    names = {name for module in modules for name in [module.name]}
    return Capture(
        manifest=manifest,
        modules=tuple(sorted({*encoded.modules, *_module_imports(modules)} - names)),
        receipt=receipt,
        sample=live.preview(plan.arrangement.arguments) if plan.arrangement.arguments is not None else "",
        call=_call(request, plan, signature),
        runs=runs,
        seconds=time.perf_counter() - began,
    )


def _plan(request: Request, reached: reach.Reach) -> _Plan:
    predict = request.predict
    source = "setup" if request.setup is not None else "folder" if request.model_from else "live"
    has_model = request.has_model or source != "live"
    name = _name_of(predict)
    if inspect.isclass(predict):
        if not callable(getattr(predict, "predict", None)):
            raise UsageError(
                f"{name} is a class without a predict method. Give a function, or a class with "
                "__init__(self, config) and predict(self, payload)."
            )
        function = binding.class_predict(predict)
        arrangement = binding.arrange(
            function, has_model=False, model=None, variable="", sample=request.sample, pass_model=None
        )
        parameter = binding.constructor_parameter(predict)
        how = {"how": "class", "model": parameter if has_model else None}
    else:
        function = predict
        arrangement = binding.arrange(
            function,
            has_model=has_model,
            model=request.model,
            variable=request.variable,
            sample=request.sample,
            pass_model=request.pass_model,
        )
        if arrangement.model_parameter is not None:
            how = {"how": "argument", "model": arrangement.model_parameter}
        elif not has_model:
            how = {"how": "none", "model": None}
        else:
            held = any(value is request.model for value in reached.values) or request.model is predict
            held = held or getattr(predict, "__self__", None) is request.model
            how = {"how": "reached" if held and source == "live" else "unused", "model": None}
    uses_source = how["how"] in {"argument", "class"} and has_model
    how = {
        "name": name,
        "kind": _kind(function),
        **how,
        "variable": request.variable or None,
        "source": source if uses_source and source != "live" else "live" if uses_source else "none",
    }
    return _Plan(function, how, arrangement)


def _name_of(predict: Any) -> str:
    target = getattr(predict, "func", predict)
    return str(getattr(target, "__name__", None) or type(target).__name__)


def _kind(function: Any) -> str:
    target = reach.target_of(function)
    target = inspect.unwrap(target) if callable(target) else target
    if inspect.isasyncgenfunction(target):
        return "async_generator"
    if inspect.iscoroutinefunction(target):
        return "coroutine"
    return "generator" if inspect.isgeneratorfunction(target) else "function"


def _roots(request: Request, plan: _Plan, types: dict[str, Any]) -> dict[str, Any]:
    """Return what the skeleton holds; a model that predict neither takes nor reaches stays home."""
    roots: dict[str, Any] = {"predict": request.predict}
    if plan.how["source"] == "live" and plan.how["how"] in {"argument", "class"} and request.has_model:
        roots["model"] = request.model
    if plan.how["source"] == "setup":
        roots["setup"] = request.setup
    roots["types"] = types
    return roots


def _sample_run(
    request: Request, plan: _Plan, signature: Signature, types: dict[str, Any]
) -> tuple[bytes | None, bytes | None, Signature, int]:
    """Run predict live on the sample, where there is one and the model is at hand."""
    arguments = plan.arrangement.arguments
    if arguments is None:
        return None, None, signature, 0
    sample = live.pack_sample(arguments)
    arguments = live.decoded(signature, types, sample)
    call = _live_call(request, plan)
    if call is None:
        return sample, None, signature, 0
    done = live.run(call, arguments)
    if done.streams and plan.how["kind"] == "function":
        plan.how["kind"] = "generator"
    item = done.value[0] if done.streams and done.value else done.value
    return (
        sample,
        done.answer,
        dataclasses.replace(signature, returns=schema_of(describe(item)), streams=done.streams),
        1,
    )


def _live_call(request: Request, plan: _Plan) -> Callable[..., Any] | None:
    """Return predict with its live model, or None where the model exists only in a Replica."""
    source = plan.how["source"]
    if source == "folder" and not request.has_model:
        return None
    model = request.model
    if source == "setup" and not request.has_model and request.setup is not None:
        if request.model_from:
            return None
        try:
            model = predictor.run_setup(request.setup, None)
        except Exception as error:
            raise SampleError(
                f"--setup fails here in the notebook: {type(error).__name__}: {error}. It must run without arguments."
            ) from error
    try:
        return predictor.bind(request.predict, plan.how, model, has_model=plan.how["source"] != "none")
    except ServerError as error:
        raise CaptureError(str(error)) from error
    except Exception as error:
        raise SampleError(f"{plan.how['name']} cannot be made: {type(error).__name__}: {error}.") from error


@dataclass(frozen=True)
class _Written:
    """What went into the Store, and the manifest's rows for it."""

    parts: dict[str, Any]
    new_bytes: int
    new_blobs: int


def _write(
    request: Request, store: Store, encoded: codec.Encoded, modules: tuple[LocalModule, ...], cells: dict[str, str]
) -> _Written:
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
    skeleton, blobs, new_bytes = codec.write(encoded, store)
    sources = {name: store.put_bytes(text.encode()) for name, text in cells.items()}
    parts = {
        "skeleton": {"digest": skeleton.digest, "size": skeleton.size},
        "blobs": blobs,
        "files": files,
        "cells": {name: {"digest": ref.digest, "size": ref.size} for name, ref in sources.items()},
    }
    return _Written(parts, new_bytes, 0)


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


def _receipt(
    request: Request,
    plan: _Plan,
    reached: reach.Reach,
    modules: tuple[LocalModule, ...],
    written: _Written,
    changed: variables.Variables,
    cut: list[str],
) -> dict[str, Any]:
    model_travels = plan.how["how"] in {"argument", "class", "reached"} and request.has_model
    notes = [f"only the first row of {name} was kept as the sample (more than fits one request)" for name in cut]
    if plan.how["how"] == "unused":
        notes.append(f"predict neither takes nor reaches {request.variable or 'the model'}: it stays home")
    notes += [
        f"{name} was set in this notebook and looks like a secret: it stays home; --secret {name} hands it over"
        for name in changed.withheld
    ]
    namespace = getattr(reach.target_of(request.predict), "__globals__", {})
    names = {one.name for one in reached.globals} | set(reached.functions) | {request.variable}
    sizes = [row["size"] for row in written.parts["blobs"]]
    return {
        "functions": list(reached.functions),
        "modules": [{"name": m.name, "files": len(m.files), "bytes": m.bytes} for m in modules],
        "globals": [{"name": g.name, "kind": g.kind, "bytes": g.bytes} for g in reached.globals],
        "model": {
            "name": request.variable or "model",
            "kind": type(request.model).__name__,
            "bytes": reach.size_of(request.model),
        }
        if model_travels
        else None,
        "blobs": {"count": len(sizes), "new": written.new_blobs, "bytes": sum(sizes), "new_bytes": written.new_bytes},
        "skeleton_bytes": written.parts["skeleton"]["size"],
        "variables": sorted(changed.changed),
        "secrets": sorted(request.secrets),
        "files": [row["path"] for row in written.parts["files"] if row["kind"] != "code"][:20],
        "left_behind": reach.left_behind(namespace, names) if namespace.get("__name__") == "__main__" else [],
        "notes": notes,
    }


def _call(request: Request, plan: _Plan, signature: Signature) -> str:
    """Return the call for people: predict(model ← clf, text)."""
    how = plan.how
    names = [p.name if p.required else f"{p.name}=…" for p in signature.parameters]
    if signature.extra:
        names.append("**")
    if how["how"] == "argument":
        source = {"setup": f"{_name_of(request.setup)}()", "folder": request.model_from}.get(
            how["source"], request.variable or type(request.model).__name__
        )
        names.insert(0, f"{how['model']} ← {source}")
    dot = ".predict" if how["how"] == "class" else ""
    return f"{how['name']}{dot}({', '.join(names)})"


def secret_environment(names: tuple[str, ...]) -> dict[str, str]:
    """Return the values of --secret from this kernel's environment.

    Raises:
        UsageError: one is not set.
    """
    values = {}
    for name in names:
        variable = name.partition("=")[0]
        if variable not in os.environ:
            raise UsageError(f"--secret {variable}: it is not set in this kernel. Set os.environ[{variable!r}] first.")
        values[variable] = os.environ[variable]
    return values


__all__ = ["Capture", "Request", "secret_environment", "take"]
