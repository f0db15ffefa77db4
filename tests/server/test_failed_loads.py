"""What a Replica in a container tells where it cannot start."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from nbdeploy_server import failure
from nbdeploy_server.errors import LoadFailed

from tests.server.containers import ADD

FAILURES = {
    "raises": (
        "def setup():\n    print('looking')\n    raise RuntimeError('no weights here')\n",
        ["cannot start: RuntimeError while setting up the model: no weights here\n", "line 3, in setup: raise Runtime"],
    ),
    "exits": (
        "import sys\ndef setup():\n    sys.exit('enough')\n",
        ["ended the process (SystemExit: enough)", "line 3"],
    ),
    "lacks": ("def setup():\n    import no_such_package_here\n", ["'no_such_package_here'", "--pip", "line 2"]),
    "eats": ("def setup():\n    raise MemoryError\n", ["--memory", "line 2"]),
    "talks": (
        "def setup():\n    raise ValueError('begin ' + 'x' * 9000 + ' end')\n",
        ["cannot start: ValueError while setting up the model: begin", "line 2, in setup"],
    ),
}


@pytest.mark.parametrize("kind", sorted(FAILURES))
def test_a_failed_load_is_told_last(bundle: Any, begin: Any, kind: str) -> None:
    """The log ends with the reason in words and the notebook's own line, in what Kubernetes keeps; the status is 3."""
    setup, expected = FAILURES[kind]
    one = begin(bundle(setup + "def predict(model, x: int) -> int:\n    return x\n"))
    assert one.process.wait(60) == 3
    kept = one.text().encode()[-2048:].decode(errors="ignore")
    words = kept[kept.index("nbdeploy: this Replica cannot start: ") :]
    for part in expected:
        assert part in words
    assert "Traceback" not in words
    assert "Traceback" in one.text()  # and all of it further up


def test_a_sample_that_fails_keeps_it_from_starting(bundle: Any, begin: Any) -> None:
    """A predict that works in the notebook and not here stops the load, with its own line."""
    source = "import sys\ndef predict(x: int) -> bool:\n    return bool(sys.modules['pytest'])\n"
    one = begin(bundle(source, {"x": 1}))
    assert one.process.wait(60) == 3
    assert "predict raised KeyError on the sample" in one.text()
    assert "line 3, in predict" in one.text()


def test_a_bundle_of_another_python_is_refused_in_words(bundle: Any, begin: Any) -> None:
    """The reason names both Pythons, before anything is unpickled."""
    store, digest = bundle(ADD)
    path = store / "bundles" / "sha256" / digest.removeprefix("sha256:") / "manifest.json"
    data = path.read_bytes().replace(b'"python":"3.11"', b'"python":"3.9"')
    other = hashlib.sha256(data).hexdigest()
    folder = path.parent.parent / other
    folder.mkdir()
    (folder / "manifest.json").write_bytes(data)
    one = begin((store, f"sha256:{other}"))
    assert one.process.wait(60) == 3
    assert "made for Python 3.9, this is 3.11" in one.text()


def test_reasons_are_short_and_advise() -> None:
    """Whatever was raised, the words fit and say what to do next."""
    text = failure.last_words(LoadFailed("x" * 5000 + "\ncell.py line 3, in setup: boom"))
    assert len(text.encode()) <= failure.LONGEST
    assert text.startswith("nbdeploy: this Replica cannot start: xxx")
    assert text.endswith("cell.py line 3, in setup: boom")
    assert "--gpu-type" in failure.reason(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"))
    assert "base_image" in failure.reason(ImportError("libGL.so.1: cannot open shared object file"))
    loop = LoadFailed("round")
    loop.__context__ = other = ValueError("and round")
    other.__context__ = loop
    assert failure.reason(loop) == "round"
