"""A Bundle's wheels in a Replica: what an editable or local distribution becomes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from typing import TYPE_CHECKING

from nbdeploy.capture import Request, take
from nbdeploy.store import Store

if TYPE_CHECKING:
    from pathlib import Path

CELL = """
def predict(x: int) -> list:
    import lab_of_mine
    return [lab_of_mine.word(), lab_of_mine.__file__.count("installed"), x]
"""
LOAD = """
    import sys
    from pathlib import Path
    from nbdeploy_server.bundle import Bundle
    from nbdeploy_server.predictor import load
    store = Path(sys.argv[1])
    for _ in range(2):
        bundle = Bundle.open(store, sys.argv[2])
        bundle.check()
        predictor = load(bundle, store / "unpacked")
    print(predictor.call(x=3))
"""


def test_a_wheel_of_the_bundle_is_used_from_a_folder(tmp_path: Path) -> None:
    """A package that travels as a wheel is imported in the Replica, and reads its own data files."""
    wheel = tmp_path / "lab_of_mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        source = "from pathlib import Path\ndef word(): return (Path(__file__).parent / 'word.txt').read_text()\n"
        archive.writestr("lab_of_mine/__init__.py", source)
        archive.writestr("lab_of_mine/word.txt", "travelled")
    store = Store(tmp_path / "store")
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(CELL, namespace)  # noqa: S102 - a cell
    taken = take(Request(predict=namespace["predict"], folder=tmp_path), store)
    ref = store.put_file(wheel)
    row = {"path": wheel.name, "digest": ref.digest, "size": ref.size, "kind": "wheel"}
    digest = store.put_bundle({**taken.manifest, "files": [*taken.manifest["files"], row]})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(store.root), digest],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("['travelled', 1, 3]", "")
