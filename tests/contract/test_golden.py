"""Old Bundles load in new Replicas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbdeploy_server.bundle import Bundle
from nbdeploy_server.errors import BundleInvalid

GOLDEN = sorted(path for path in (Path(__file__).parent / "golden").iterdir() if path.is_dir())
HERE = f"python{sys.version_info.major}.{sys.version_info.minor}"
LOAD = """
import json, sys
from pathlib import Path
from nbdeploy_server import parity, wire
from nbdeploy_server.bundle import Bundle
from nbdeploy_server.predictor import load
bundle = Bundle.open(Path(sys.argv[1]), sys.argv[2])
bundle.check_platform()
bundle.check(full=True)
predictor = load(bundle, Path(sys.argv[1]) / "unpacked")
answer = predictor.answer_sample()
found = parity.compare(predictor.answer, answer)
request = predictor.call(**predictor.decoder.json(b'{"x": [1, 2, 3], "shift": 1}'))
alone = "nbdeploy" not in sys.modules
print(json.dumps([found.equal, found.reason, answer["shared"], answer["label"], request["name"], alone]))
"""


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_golden_bundle_loads_and_answers(golden: Path, tmp_path: Path) -> None:
    """A Bundle written long ago loads without nbdeploy, answers as it did, and takes requests; sharing stays."""
    store = tmp_path / "store"
    shutil.copytree(golden, store)
    digest = (golden / "digest").read_text(encoding="ascii")
    if not golden.name.endswith(HERE):
        with pytest.raises(BundleInvalid, match="made for Python"):
            Bundle.open(store, digest).check_platform()
        return
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(store), digest], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [True, "", True, "class 2", "c", True]


def test_there_is_a_golden_bundle_for_each_format() -> None:
    """Each format version has at least one golden Bundle."""
    from nbdeploy_server.bundle import FORMAT_VERSION

    formats = {path.name.partition("-")[0] for path in GOLDEN}
    assert formats == {f"v{number}" for number in range(1, FORMAT_VERSION + 1)}


def test_golden_bundles_name_no_machine() -> None:
    """Golden Bundles hold no host and no path of the machine that wrote them."""
    for golden in GOLDEN:
        for file in golden.rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                assert not any(word in data for word in (b"/home/", b"/work/", b"/root/", b"://"))
