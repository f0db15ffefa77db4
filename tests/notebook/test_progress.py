"""Progress in a terminal, and with the magic in a real kernel."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from nbdeploy.jobs import Event
from nbdeploy.notebook.progress import Progress
from tests.conftest import DEADLINE, started

CARD = {"name": "sentiment", "engine": "local", "revision": 1, "url": "http://127.0.0.1:1", "seconds": 1.0}
SEQUENCE = itertools.count(1)


def event(step: str, state: str, detail: str = "", seconds: float = 0.0, **data: Any) -> Event:
    """An event of a Job."""
    return Event(next(SEQUENCE), 0.0, step, state, detail, seconds, data)


class Kernel:
    """A real ipykernel with a profile of its own: runs cells, collects what a front end is sent."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "IPYTHONDIR": str(folder / "ipython")}
        self.manager, self.client = started("python3", folder, environment)

    def run(self, code: str) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        self.client.execute_interactive(code, output_hook=sent.append, timeout=DEADLINE)
        return [{"type": message["msg_type"], **message["content"]} for message in sent]

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel for all tests here."""
    running = Kernel(tmp_path_factory.mktemp("notebook"))
    running.run(f"import sys; sys.path[:0] = {sys.path!r}")
    yield running
    running.stop()


def test_a_terminal_gets_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines come as steps end, none twice, and the card at the end."""
    progress = Progress("sentiment", "local")
    progress(event("captured", "running", "walking"))
    assert "captured" not in capsys.readouterr().out
    progress(event("captured", "done", "predict, 2 helpers", 0.21))
    progress(event("captured", "done", "predict, 2 helpers", 0.21))
    progress(event("job", "note", "look here"))
    progress(event("job", "note", "look here"))
    first = capsys.readouterr().out
    assert first.splitlines() == ["  ✓ captured   predict, 2 helpers · 0.21 s", "  ▲ look here"]
    progress(event("job", "done", card=CARD))
    assert "✓ sentiment · local · revision 1" in capsys.readouterr().out


def test_a_failure_stands_at_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    """The step that was running is marked, with the first line of the reason."""
    progress = Progress("sentiment", "local")
    progress(event("captured", "done", "predict"))
    progress(event("verified", "running", "loading"))
    progress(event("job", "failed", "the answer differs\nlong story", error="ParityError"))
    assert "  ✗ verified   the answer differs" in capsys.readouterr().out.splitlines()
    assert "long story" not in progress.text()


def test_an_error_without_an_event_is_shown_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    """A capture that raises ends the block too; before anything was shown, only the error speaks."""
    silent = Progress("a")
    silent.fail("bad option")
    assert capsys.readouterr().out == ""
    progress = Progress("a")
    progress(event("captured", "running", "walking"))
    progress.fail("a lock cannot travel")
    progress.fail("said twice")
    assert progress.text().splitlines() == ["✗ a", "  ✗ captured   a lock cannot travel"]


def test_a_long_step_has_a_bar_with_bytes_and_rate() -> None:
    """Bytes, total and rate while it runs; the duration after it."""
    progress = Progress("sentiment", "gpu", notebook=False)
    progress(event("starting", "running", "pushing", bytes=219_000_000, total=438_000_000, rate=50_000_000))
    assert "219 MB of 438 MB · 50 MB/s" in progress.text()
    assert '<progress max="438000000" value="219000000" aria-label="starting">' in progress.html()
    progress(event("starting", "done", seconds=9.0))
    assert progress.text().splitlines()[1] == "  ✓ starting   pushing · 9.0 s"
    assert "<progress" not in progress.html()


def test_text_is_escaped_and_unknown_data_is_not_shown() -> None:
    """Words of the user become no tags; what else an event carries, a key for example, stays out."""
    progress = Progress("<b>", notebook=False)
    progress(event("captured", "done", "<script>x</script>", key="nbd_secret"))
    assert "<script>" not in progress.html()
    assert "nbd_secret" not in progress.html() + progress.text()


def test_a_notebook_gets_one_block_updated_in_place(kernel: Kernel) -> None:
    """One display, updates of the same id, at most about ten a second, then the card in its place."""
    sent = kernel.run(
        f"""
import time
from nbdeploy.jobs import Event
from nbdeploy.notebook.progress import Progress
progress = Progress("sentiment", "local")
progress(Event(1, 0.0, "captured", "done", "predict", 0.2))
end = time.monotonic() + 0.5
while time.monotonic() < end:
    progress(Event(2, 0.0, "starting", "running", "loading", 0.0, {{"bytes": 1, "total": 2}}))
progress(Event(3, 0.0, "job", "done", "", 0.0, {{"card": {CARD!r}}}))
"""
    )
    shown = [m for m in sent if m["type"] in {"display_data", "update_display_data"}]
    assert [m["type"] for m in shown].count("display_data") == 1
    assert len({m["transient"]["display_id"] for m in shown}) == 1
    assert 3 <= len(shown) <= 9
    assert set(shown[-1]["data"]) == {"text/html", "text/plain"}
    assert "Endpoint sentiment" in shown[-1]["data"]["text/html"]
    assert not [m for m in sent if m["type"] == "stream"]


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        ("clf predict --maxx 2", "UsageError", "Did you mean --max?"),
        ("clff predict", "UndefinedNameError", "Did you mean 'clf'?"),
        ("clf predict --name x --sample 1/0", "SampleError", "ZeroDivisionError"),
        ("clf predict --name x --sample X[{i}]", "SampleError", "'X' is not defined"),
        ("clf predict --max-batch 8 --name x", "UsageError", "not part of this version"),
    ],
)
def test_mistakes_are_real_errors_of_one_line(kernel: Kernel, line: str, name: str, words: str) -> None:
    """A wrong line gives a stored error output without a traceback, and IPython expands nothing."""
    kernel.run("%load_ext nbdeploy\nclf = object()\ndef predict(model, x):\n    return x\ni = 0")
    sent = kernel.run(f"%deploy {line}")
    (error,) = [m for m in sent if m["type"] == "error"]
    assert error["ename"] == name
    assert words in error["evalue"]
    assert len(error["traceback"]) == 1
    assert "File" not in error["traceback"][0]


def test_a_deploy_shows_its_card_once(kernel: Kernel, tmp_path: Path) -> None:
    """The block becomes the card; the Endpoint that `%deploy` returns shows nothing more until a later cell."""
    kernel.run(f"%load_ext nbdeploy\nimport os; os.environ['NBDEPLOY_HOME'] = {str(tmp_path)!r}")
    kernel.run("W = [1, 2, 3]\ndef score(x):\n    return sum(w * x for w in W)\nscore(2)")
    try:
        sent = kernel.run("endpoint = %deploy score\nendpoint")
        shown = [m for m in sent if m["type"] in {"display_data", "update_display_data", "execute_result"}]
        assert [m["type"] for m in shown].count("display_data") == 1
        assert "execute_result" not in {m["type"] for m in shown}
        assert not [m for m in sent if m["type"] == "error"]
        assert "score · local · revision 1" in shown[-1]["data"]["text/plain"]
        assert "x=2" in shown[-1]["data"]["text/plain"]
        (later,) = [m for m in kernel.run("endpoint") if m["type"] == "display_data"]
        assert "ready" in later["data"]["text/plain"]
        assert "Endpoint score" in later["data"]["text/html"]
    finally:
        kernel.run("endpoint.delete()")


def test_a_cell_magic_says_what_to_do(kernel: Kernel) -> None:
    """`%%deploy` is a mistake that is explained."""
    kernel.run("%load_ext nbdeploy")
    (error,) = [m for m in kernel.run("%%deploy clf predict\n1") if m["type"] == "error"]
    assert "on a line of its own" in error["evalue"]


def test_an_ipython_shell_shows_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`%deploy?` shows the options in groups."""
    from nbdeploy.notebook.magic import load_ipython_extension

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell()
    load_ipython_extension(shell)
    shell.run_line_magic("pinfo", "%deploy")
    said = capsys.readouterr().out
    assert "What travels:" in said
    assert "--sample EXPR" in said


def test_new_words_are_shown_however_soon_they_come(kernel: Kernel) -> None:
    """Words that may stand for minutes are shown even if they come just after others; mere numbers are throttled."""
    code = (
        "from nbdeploy.jobs import Event\nfrom nbdeploy.notebook.progress import Progress\np = Progress('a')\n"
        "import time\nbegan = time.monotonic()\n"
        "said = ['waiting for Replicas', 'waiting for a node', *['No node takes a Replica'] * 50]\n"
        "for at, words in enumerate(said):\n"
        "    p(Event(at, 0.0, 'starting', 'running', words, 0.0, {}))\n"
        "print(time.monotonic() - began)"
    )
    sent = kernel.run(code)
    shown = [message["data"]["text/plain"] for message in sent if "data" in message]
    seconds = float("".join(message["text"] for message in sent if message["type"] == "stream"))
    assert "No node takes a Replica" in shown[-1]
    assert 3 <= len(shown) <= 4 + 10 * seconds


def test_throttling_never_hides_an_end() -> None:
    """However fast events come, the text holds the last state."""
    progress = Progress("a", notebook=False)
    began = time.monotonic()
    for _ in range(1000):
        progress(event("starting", "running", "loading"))
    progress(event("starting", "done", "up"))
    progress(event("starting", "running", "late"))
    assert progress.text().splitlines()[1] == "  ✓ starting   up"
    assert time.monotonic() - began < 5
