"""The command line: what it prints, its JSON, its exit statuses."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from nbdeploy.cli import main
from nbdeploy.deploying import deploy
from nbdeploy.endpoint import endpoints
from nbdeploy.jobs import running_job
from nbdeploy.spec import Serving
from tests.conftest import leftovers, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

# interface.md, Command line
KEYS = {
    "name": str,
    "engine": str,
    "revision": int,
    "phase": str,
    "reason": str,
    "url": str,
    "key_file": str,
    "owner": str,
    "notebook": str,
    "replicas": {"ready": int, "desired": int},
    "autoscaling": {
        "min": int,
        "max": int,
        "target_in_flight": (int, type(None)),
        "in_flight": int,
        "decision": str,
        "conditions": list,
    },
    "memory_bytes": int,
    "cost": {"now_per_hour": (float, type(None)), "max_per_hour": (float, type(None))},
    "job": (dict, type(None)),
}


def check(row: dict[str, Any], keys: dict[str, Any] = KEYS) -> None:
    """Check that data has exactly these keys, of these types."""
    assert set(row) == set(keys)
    for name, kind in keys.items():
        if isinstance(kind, dict):
            check(row[name], kind)
        else:
            assert isinstance(row[name], kind), name


def predict_of(source: str) -> Any:
    """Return `predict` of a cell."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), namespace)  # noqa: S102 - the cell is the test's own
    return namespace["predict"]


ADD = "def predict(x: int, y: int = 1) -> int:\n    print('adding', x, y, flush=True)\n    return x + y\n"
SLOW = f"""
import os, time
def predict(x: int) -> int:
    if os.getpid() != {os.getpid()}:
        time.sleep(60)
    return x
"""


def run(*arguments: str, text: str | None = None) -> Any:
    """Run a command and return its result."""
    return CliRunner().invoke(main, list(arguments), input=text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with `add` and the public `open-add`."""
    folder = tmp_path_factory.mktemp("cli") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBDEPLOY_HOME", str(folder))
        patch.setenv("XDG_CONFIG_HOME", str(folder.parent / "config"))
        deploy(predict_of(ADD), name="add", sample={"x": 1}, verify=False)
        deploy(predict_of(ADD), name="open-add", verify=False, serving=Serving(public=True))
        yield folder
        for endpoint in endpoints():
            endpoint.delete()
        wait_until(lambda: not leftovers(folder))


def test_ls(place: Path) -> None:
    """Endpoints with their phase and URL; --json is a list of what status gives."""
    shown = run("ls")
    assert shown.exit_code == 0
    assert all(word in shown.output for word in ("add", "open-add", "ready", "1/1", "http://127.0.0.1:"))
    rows = json.loads(run("ls", "--json").output)
    assert [row["name"] for row in rows] == ["add", "open-add"]
    for row in rows:
        check(row)
    assert json.loads(run("ls", "--json", "--engine", "local").output) == rows


def test_status(place: Path) -> None:
    """One Endpoint, as text and as data."""
    shown = run("status", "add")
    assert shown.exit_code == 0
    assert "add · local" in shown.output
    assert "nbdeploy key add" in shown.output
    row = json.loads(run("status", "add", "--json").output)
    check(row)
    assert (row["phase"], row["reason"], row["job"], row["revision"]) == ("ready", "", None, 1)
    assert stat.S_IMODE(Path(row["key_file"]).stat().st_mode) == 0o600
    public = json.loads(run("status", "open-add", "--json").output)
    assert public["key_file"] == ""
    assert "none (public)" in run("status", "open-add").output


def test_call(place: Path) -> None:
    """Arguments are a JSON object, also from standard input; the answer is JSON."""
    assert run("call", "add", '{"x": 2, "y": 40}').output == "42\n"
    assert run("call", "add", "-", text='{"x": 2}').output == "3\n"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("call", "add", "{x: 2}"), 2, "not valid JSON"),
        (("call", "add", "[1]"), 2, "JSON object"),
        (("call", "add", '{"z": 2}'), 1, "z"),
        (("call", "nobody", "{}"), 1, "nobody"),
        (("status", "ad"), 1, "Did you mean 'add'"),
        (("status", "add", "--engine", "mars"), 2, "mars"),
        (("status",), 2, "Missing argument"),
        (("frobnicate",), 2, "No such command"),
        (("ls", "--wrong"), 2, "No such option"),
        (("delete",), 2, "--all"),
        (("delete", "add", "--all"), 2, "--all"),
        (("delete", "nobody"), 1, "nobody"),
        (("cancel", "add"), 1, "No deploy of add"),
        (("key", "open-add"), 1, "public"),
        (("scale", "add"), 2, "--min"),
        (("scale", "add", "--min", "5", "--max", "2"), 2, "--max"),
        (("rollback", "add"), 2, "no earlier Revision"),
        (("logs", "nobody"), 1, "nobody"),
        (("metrics", "nobody"), 1, "nobody"),
        (("stop", "nobody"), 1, "nobody"),
        (("start", "nobody"), 1, "nobody"),
    ],
)
def test_failures_are_told(place: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    """1 for a failure in words, 2 for bad usage; nothing on standard output but an answer, and never a traceback."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_logs_and_metrics(place: Path) -> None:
    """Lines that predict printed; metrics as text and as data."""
    run("call", "add", '{"x": 31337}')
    wait_until(lambda: "adding 31337 1" in run("logs", "add").output)
    # a Replica that is too busy to answer in time is left out, and the call may still be counted as under way
    wait_until(lambda: 'nbdeploy_requests_total{code="200"}' in run("metrics", "add").output)
    wait_until(lambda: json.loads(run("metrics", "add", "--json").output).get("nbdeploy_inflight") == 0)


def test_logs_follow(place: Path) -> None:
    """-f goes on until it is interrupted, which is no failure of anything."""
    command = [sys.executable, "-m", "nbdeploy.cli", "logs", "-f", "add"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run("call", "add", '{"x": 4711}')
        assert any("adding 4711" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode in {130, -signal.SIGINT}
    assert "Traceback" not in errors


def test_a_closed_pipe(place: Path) -> None:
    """`nbdeploy logs … | head` ends quietly."""
    for number in range(40):
        run("call", "add", json.dumps({"x": number}))
    command = f"{sys.executable} -m nbdeploy.cli logs add | head -1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_key_and_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key alone on one line, for $(nbdeploy key NAME); open prints where the documentation is."""
    key = run("key", "add").output
    assert key.count("\n") == 1
    assert key.strip() == (place / "endpoints" / "add" / "key").read_text(encoding="ascii")
    monkeypatch.setenv("BROWSER", "true")
    monkeypatch.setenv("DISPLAY", "")
    opened = run("open", "add")
    assert opened.exit_code == 0
    assert opened.output.startswith("http://127.0.0.1:")
    assert opened.output.endswith("/docs\n")


def test_history(place: Path) -> None:
    """Revisions, as text and as data."""
    assert "1 replica " in run("history", "add").output
    assert "sha256:" in run("history", "add").output
    (row,) = json.loads(run("history", "add", "--json").output)
    assert (row["number"], row["name"], row["stopped"]) == (1, "add", False)


def test_doctor(place: Path) -> None:
    """Each check has a line; all is well here."""
    shown = run("doctor")
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("✓") == shown.output.count("\n")
    rows = json.loads(run("doctor", "--json").output)
    assert {row["check"] for row in rows} == {"python", "home", "settings", "endpoints", "uv", "machine"}


def test_doctor_finds_what_is_wrong(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A damaged setting is named, and the exit status says that something is wrong."""
    (tmp_path / "nbdeploy").mkdir()
    (tmp_path / "nbdeploy" / "config.toml").write_text("colour = 1\n", encoding="utf-8")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shown = run("doctor")
    assert shown.exit_code == 1
    assert "✗ settings" in shown.output
    assert "colour" in shown.output


def test_help_and_version() -> None:
    """Every command explains itself."""
    assert run("--version").output.startswith("nbdeploy, version ")
    for command in main.commands:
        shown = run(command, "-h")
        assert shown.exit_code == 0
        assert len(shown.output) > 60


# -- changes ----------------------------------------------------------------------------------------------------------


def test_an_empty_home(home: Path) -> None:
    """Nothing there is no failure."""
    assert "%deploy" in run("ls").output
    assert json.loads(run("ls", "--json").output) == []
    assert run("delete", "--all").output == "There is no Endpoint.\n"


def test_the_life_of_an_endpoint(home: Path) -> None:
    """scale, rollback, stop, start and delete, with the words for each."""
    deploy(predict_of(ADD), name="life", verify=False)
    assert run("scale", "life", "--min", "2", "--max", "2").output == "life: 2 of 2 Replicas ready\n"
    deploy(predict_of(ADD.replace("x + y", "x - y")), name="life", verify=False)
    assert run("call", "life", '{"x": 5}').output == "4\n"
    assert "serves revision 4" in run("rollback", "life").output
    assert run("call", "life", '{"x": 5}').output == "6\n"
    assert "nbdeploy start life" in run("stop", "life").output
    row = json.loads(run("status", "life", "--json").output)
    assert (row["phase"], row["replicas"]) == ("idle", {"ready": 0, "desired": 0})
    assert "life is ready at http://" in run("start", "life").output
    assert run("delete", "--all").output == "life is deleted.\n"
    assert run("delete", "life").exit_code == 1


def test_cancel_a_first_deploy(home: Path) -> None:
    """While a first deploy runs, status shows its step; cancel leaves no process and no Endpoint."""
    deploy(predict_of(SLOW), name="slow", sample={"x": 1}, wait=False)
    wait_until(lambda: json.loads(run("status", "slow", "--json").output)["job"]["step"] == "verified")
    row = json.loads(run("status", "slow", "--json").output)
    check(row)
    assert (row["phase"], row["url"], row["revision"]) == ("pending", "", 0)
    assert row["job"]["pid"] > 0
    shown = run("status", "slow").output
    assert "verified (job " in shown
    assert "public" not in shown
    assert "half-way" not in shown
    assert run("cancel", "slow").output == "The deploy of slow is cancelled.\n"
    wait_until(lambda: not leftovers(home))
    assert run("status", "slow").exit_code in {0, 1}
    assert json.loads(run("ls", "--json").output) == []
    assert run("cancel", "slow").exit_code == 1


def test_cancel_an_update(home: Path) -> None:
    """What served before goes on; ls tells of the deploy under way."""
    deploy(predict_of(ADD), name="add", verify=False)
    deploy(predict_of(SLOW), name="add", sample={"x": 1}, wait=False)
    wait_until(lambda: (json.loads(run("status", "add", "--json").output)["job"] or {}).get("step") == "verified")
    row = json.loads(run("status", "add", "--json").output)
    assert (row["phase"], row["revision"]) == ("ready", 1)
    assert "under way" in run("ls").output
    assert run("cancel", "add").exit_code == 0
    wait_until(lambda: len(leftovers(home)) == 2)
    assert run("call", "add", '{"x": 1}').output == "2\n"
    assert json.loads(run("status", "add", "--json").output)["job"] is None


def test_cancel_a_worker_that_will_not_hear(home: Path) -> None:
    """A stopped worker must be killed; the end is written, and what it left is ended."""
    deploy(predict_of(SLOW), name="deaf", sample={"x": 1}, wait=False)
    wait_until(lambda: len(leftovers(home)) == 2)
    job = running_job(home, "deaf")
    assert job is not None
    wait_until(job.worker)
    wait_until((job.folder / "child.json").exists)
    worker = job.worker()
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)
    job.cancel(seconds=0.2)
    assert [event.state for event in job.events() if event.ends] == ["cancelled"]
    wait_until(lambda: not leftovers(home))


def test_delete_a_first_deploy(home: Path) -> None:
    """Delete also ends a deploy that has not come as far as an Endpoint."""
    deploy(predict_of(SLOW), name="slow", sample={"x": 1}, wait=False)
    assert run("delete", "slow").output == "slow is deleted.\n"
    wait_until(lambda: not leftovers(home))
    assert run("delete", "slow").exit_code == 1


def test_a_failed_deploy_is_remembered(home: Path) -> None:
    """After a failed first deploy, status tells why."""
    fails = predict_of(
        "import os\ndef predict(x: int) -> int:\n    assert os.getpid() == HERE, 'not here'\n    return x\n"
    )
    fails.__globals__["HERE"] = os.getpid()
    endpoint = deploy(fails, name="fails", sample={"x": 1}, wait=False)
    assert endpoint.name == "fails"
    wait_until(lambda: json.loads(run("status", "fails", "--json").output)["phase"] == "failed")
    shown = run("status", "fails")
    assert shown.exit_code == 0
    assert "not here" in shown.output
    assert "public" not in shown.output
    assert "replicas" not in shown.output
