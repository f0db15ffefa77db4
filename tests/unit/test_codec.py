"""Encoding object graphs: what comes back, what is written, what is said."""

from __future__ import annotations

import functools
import linecache
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbdeploy_server.bundle import Bundle

from nbdeploy.codec import encode, write
from nbdeploy.errors import CannotTravelError, CaptureError
from nbdeploy.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def bundle_of(store: Store, encoded: Any) -> Bundle:
    """Write what was encoded as a Bundle."""
    skeleton, blobs, _ = write(encoded, store)
    manifest = {
        "format_version": 1,
        "requires": {"python": f"3.{sys.version_info.minor}", "implementation": "cpython", "platform": "any"},
        "made_with": {},
        "skeleton": skeleton.to_json(),
        "blobs": blobs,
        "files": [],
        "cells": {name: store.put_bytes(source.encode()).to_json() for name, source in encoded.cells.items()},
        "variables": {},
        "secrets": [],
        "distributions": [],
        "predict": {
            "name": "p",
            "kind": "function",
            "model": None,
            "how": "none",
            "variable": None,
            "source": "none",
        },
        "signature": {},
        "sample": None,
        "answer": None,
        "seed": 0,
        "globals": list(encoded.globals),
    }
    return Bundle.open(store.root, store.put_bundle(manifest))


def round_trip(folder: Path, value: Any) -> Any:
    """Encode, write, read."""
    return bundle_of(Store(folder), encode({"model": value})).load()["model"]


def cell(source: str, name: str = "/tmp/ipykernel_1/123.py") -> dict[str, Any]:  # noqa: S108 - what ipykernel calls cells
    """Run source as a notebook cell and return the namespace."""
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 - what a notebook does with a cell
    return namespace


def same(left: Any, right: Any, seen: dict[int, int]) -> bool:
    """Compare two graphs, and that what is one object in one is one object in the other."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | dict | np.ndarray):
        if id(left) in seen:
            return seen[id(left)] == id(right)
        seen[id(left)] = id(right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key], seen) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b, seen) for a, b in zip(left, right, strict=True))
    return bool(left == right)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
arrays = npst.arrays(
    dtype=npst.integer_dtypes() | npst.floating_dtypes() | npst.boolean_dtypes() | npst.complex_number_dtypes(),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
)
views = arrays.flatmap(lambda a: st.sampled_from([a, a.T, a[..., ::-1] if a.ndim else a, np.asfortranarray(a)]))
graphs = st.recursive(
    scalars | views | st.frozensets(st.integers()) | st.sets(st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@given(parts=st.lists(graphs, min_size=1, max_size=4), order=st.lists(st.integers(0, 3), max_size=8))
@settings(max_examples=80, deadline=None)
def test_any_graph_round_trips(tmp_path_factory: pytest.TempPathFactory, parts: list[Any], order: list[int]) -> None:
    """Whatever is nested in whatever comes back equal, and what was one object is one object."""
    value = [parts, [parts[at % len(parts)] for at in order]]
    assert same(value, round_trip(tmp_path_factory.mktemp("store"), value), {})


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 900), st.integers(1, 3)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_views_stay_views(tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int, int]]) -> None:
    """Views of one array share memory after loading exactly where they did before, and only their range is written."""
    base = np.arange(3000.0)
    value = [base[start : start + size : step] for start, size, step in cuts]
    encoded = encode({"model": value})
    used = max(start + size for start, size, _ in cuts) - min(start for start, _, _ in cuts)
    assert sum(buffer.size for buffer in encoded.buffers) <= used * 8 + 64
    loaded = bundle_of(Store(tmp_path_factory.mktemp("store")), encoded).load()["model"]
    assert same(value, loaded, {})
    for left, a in zip(value, loaded, strict=True):
        for right, b in zip(value, loaded, strict=True):
            assert np.shares_memory(a, b) == np.shares_memory(left, right)


def test_same_weights_are_written_once(tmp_path: Path) -> None:
    """A second capture of the same arrays writes no byte of them, in whatever order they come."""
    store = Store(tmp_path)
    one, two = np.arange(1e5), np.arange(2e5)
    assert write(encode({"model": [one, two]}), store)[2] == one.nbytes + two.nbytes
    assert write(encode({"model": {"b": two.copy(), "a": one}}), store)[2] == 0


def test_small_arrays_live_in_the_skeleton(tmp_path: Path) -> None:
    """Many small arrays make no blobs."""
    encoded = encode({"model": [np.arange(4) + at for at in range(1000)]})
    assert encoded.buffers == ()
    assert len(bundle_of(Store(tmp_path), encoded).load()["model"]) == 1000


def test_loaded_arrays_can_be_written(tmp_path: Path) -> None:
    """The mapping is private: a Replica that writes into its weights changes no blob."""
    store = Store(tmp_path)
    bundle = bundle_of(store, encode({"model": np.zeros(10_000)}))
    loaded = bundle.load()["model"]
    loaded[:] = 5
    bundle.check(full=True)
    assert bundle.load()["model"].sum() == 0


def test_cells_travel_with_their_source(tmp_path: Path) -> None:
    """The same cell in two kernels has one name and gives the same bytes; tracebacks show its lines."""
    source = "def predict(x):\n    import orjson.whatever\n    return missing + x\n"
    first = encode({"predict": cell(source)["predict"]})
    second = encode({"predict": cell(source, "/tmp/ipykernel_2/9.py")["predict"]})  # noqa: S108 - what ipykernel calls cells
    assert first.skeleton == second.skeleton
    assert list(first.cells.values()) == [source]
    assert first.modules == ("cloudpickle", "orjson")
    assert [made.qualname for made in first.functions] == ["predict"]
    bundle = bundle_of(Store(tmp_path), first)
    predict = bundle.load()["predict"]
    bundle.fill_linecache()
    linecache.checkcache()
    assert linecache.getline(predict.__code__.co_filename, 3) == "    return missing + x\n"


def test_imports_and_modules_are_named() -> None:
    """Modules by attribute, by reference and by import inside a nested function are all named."""
    source = "import json\ndef predict(x):\n    def inner():\n        from xml.dom import minidom\n    return json\n"
    encoded = encode({"predict": cell(source)["predict"], "model": functools.partial(np.sum)})
    assert {"json", "xml", "functools", "numpy"} <= set(encoded.modules)
    assert "__main__" not in encoded.modules
    assert all(":" in name for name in encoded.globals)


def test_nothing_of_the_notebook_is_stored_by_name() -> None:
    """What pickle would look up in `__main__` is refused at capture, with its path: no Replica has it."""

    class ByName:
        def __reduce__(self) -> str:
            return "thing"

    thing = ByName()
    type(thing).__module__ = "__main__"
    main = sys.modules["__main__"]
    main.thing = thing  # type: ignore[attr-defined] # what a cell does
    try:
        with pytest.raises(
            CannotTravelError, match=r'^model → \["a"\] is an object that Python only stores by its name'
        ):
            encode({"model": {"a": thing}})
    finally:
        del main.thing  # type: ignore[attr-defined] # as above


def test_refuse_is_asked(tmp_path: Path) -> None:
    """A caller may refuse objects of its own, in its own words."""

    class Special:
        pass

    def refuse(obj: object) -> str | None:
        return "a special thing" if isinstance(obj, Special) else None

    with pytest.raises(CannotTravelError, match=r"^model → \[1\] → \[\"x\"\] is a special thing"):
        encode({"model": [1, {"x": Special()}]}, refuse=refuse)


def test_failing_reducers_are_named() -> None:
    """An object whose own pickling raises is named with its path and its own words."""

    class Broken:
        def __reduce__(self) -> str:
            raise ValueError("no way")

    with pytest.raises(CannotTravelError, match=r"^model → \[0\] \(.*Broken\) cannot leave .* ValueError: no way"):
        encode({"model": [Broken()]})


def test_deep_graphs_travel_or_are_named(tmp_path: Path) -> None:
    """Nesting far beyond Python's recursion limit travels, and a culprit at its end is found soon."""
    value: Any = []
    for _ in range(20_000):
        value = [value]
    loaded, depth = round_trip(tmp_path, value), 0
    while loaded:
        loaded, depth = loaded[0], depth + 1
    assert depth == 20_000
    value = threading.Lock()
    for _ in range(20_000):
        value = [value]
    start = time.monotonic()
    with pytest.raises(CannotTravelError, match=r"^model → \[0\] → .*… 19989 more ….*is a lock"):
        encode({"model": value})
    assert time.monotonic() - start < 30


def test_endless_pickling_is_told() -> None:
    """An object that reduces to ever new objects ends in a message, not in a crash."""

    class Endless:
        def __reduce__(self) -> tuple[Any, ...]:
            return Endless, (Endless(),)

    with pytest.raises(CaptureError, match="nested too deeply"):
        encode({"model": Endless()})


def test_change_during_the_write_is_noticed(tmp_path: Path) -> None:
    """An array that another thread writes into is not captured half old, half new."""
    data = np.zeros(8_000_000)
    encoded = encode({"model": data})
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            data[::4096] += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        with pytest.raises(CaptureError, match="the model changed while it was captured"):
            write(encoded, Store(tmp_path))
    finally:
        stop.set()
        thread.join()


@pytest.mark.torch
def test_training_between_encode_and_write_is_noticed(tmp_path: Path) -> None:
    """A tensor whose version moved on is refused: a training thread is still running."""
    torch = pytest.importorskip("torch")
    weight = torch.zeros(5000)
    encoded = encode({"model": weight})
    weight.add_(1)
    with pytest.raises(CaptureError, match="a training thread is still running"):
        write(encoded, Store(tmp_path))


@pytest.mark.torch
def test_torch_storages_and_mapped_weights(tmp_path: Path) -> None:
    """Views of one storage load as views, only the used range is written, in-place edits stay private."""
    torch = pytest.importorskip("torch")
    base = torch.arange(1_000_000.0)
    encoded = encode({"model": [base[1000:3000], base[2000:4000]]})
    assert [buffer.size for buffer in encoded.buffers] == [12_032]
    bundle = bundle_of(Store(tmp_path), encoded)
    one, two = bundle.load()["model"]
    one[1000] = -1
    assert two[0].item() == -1
    bundle.check(full=True)
