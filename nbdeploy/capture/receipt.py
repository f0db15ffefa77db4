"""The receipt: what travels and what stays home, for the card. Nothing here decides anything."""

from __future__ import annotations

from typing import Any

from nbdeploy_server.signature import Signature

from nbdeploy.capture import reach
from nbdeploy.capture.arguments import name_of
from nbdeploy.capture.modules import LocalModule
from nbdeploy.capture.planning import Plan, Request
from nbdeploy.capture.variables import Variables

SHOWN_FILES = 20


def receipt(
    request: Request,
    plan: Plan,
    reached: reach.Reach,
    modules: tuple[LocalModule, ...],
    parts: dict[str, Any],
    new: tuple[int, int],
    changed: Variables,
    cut: list[str],
) -> dict[str, Any]:
    """Return what the card shows of a Capture.

    Args:
        request: what was asked for.
        plan: how predict answers.
        reached: what it reaches.
        modules: local modules that travel.
        parts: the manifest's rows of what was written.
        new: how many of the blobs were new in the Store, and how many bytes.
        changed: environment variables of the notebook.
        cut: arguments of the sample of which only the first row was kept.
    """
    namespace = getattr(reach.target_of(request.predict), "__globals__", {})
    names = {one.name for one in reached.globals} | set(reached.functions) | {request.variable.partition(".")[0]}
    if request.has_model:  # deploy(model, predict) knows no name: whatever is called so travels as the model
        names |= {name for name, value in list(namespace.items()) if value is request.model}
    blobs = parts["blobs"]
    model_travels = plan.model in {"passed", "reached"}
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
        "blobs": {
            "count": len(blobs),
            "new": new[0],
            "bytes": sum(row["size"] for row in blobs),
            "new_bytes": new[1],
        },
        "skeleton_bytes": parts["skeleton"]["size"],
        "variables": sorted(changed.changed),
        "secrets": sorted(request.secrets),
        "files": [row["path"] for row in parts["files"] if row["kind"] != "code"][:SHOWN_FILES],
        "left_behind": reach.left_behind(namespace, names) if namespace.get("__name__") == "__main__" else [],
        "notes": _notes(request, plan, changed if reached.reads_environment or modules else None, cut),
    }


def _notes(request: Request, plan: Plan, changed: Variables | None, cut: list[str]) -> list[str]:
    """Return the warnings; `changed` is None where nothing of the user's could read the environment."""
    notes = [f"only the first row of {name} was kept as the sample (more than fits one request)" for name in cut]
    if plan.model == "unused":
        notes.append(
            f"predict neither takes nor reaches {request.variable or 'the model'}: it stays home (--pass-model gives "
            "it to predict's first parameter)"
        )
    notes += [
        f"{name} was set in this notebook and looks like a secret: it stays home; --secret {name} hands it over"
        for name in (changed.withheld if changed is not None else ())
    ]
    return notes


def call(request: Request, plan: Plan, signature: Signature) -> str:
    """Return the call for people: predict(model ← clf, text)."""
    how = plan.how
    names = [p.name if p.required else f"{p.name}=…" for p in signature.parameters]
    if signature.extra:
        names.append("**")
    given = ""
    if plan.passed:
        source = {"setup": f"{name_of(request.setup)}()", "folder": str(request.model_from)}.get(
            how["source"], request.variable or type(request.model).__name__
        )
        given = f"{how['model']} ← {source}"
    if how["how"] == "class":
        return f"{how['name']}({given}).predict({', '.join(names)})"
    return f"{how['name']}({', '.join([given, *names] if given else names)})"
