"""What only processes of this machine can do wrong: cut connections, orphans, reused pids, taken ports, reboots."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.local.engine import LocalEngine
from nbdeploy.engines.local.layout import Layout
from nbdeploy.engines.local.logfile import FILES, SIZE, LogFile, read
from nbdeploy.errors import EndpointNotFoundError, EngineError, UsageError
from nbdeploy.process import Identity
from nbdeploy.spec import Autoscaling, Phase, Resources, Revision, Serving
from tests.conftest import leftovers, wait_until
from tests.engines.conftest import ADD, NEVER_LOADS, PID, PRINTS, SLEEPS, House, Raw, eventually, house_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # each test starts kernels or processes; make test-quick leaves them out


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A House of the local engine."""
    yield from house_of("local", tmp_path_factory.mktemp("local") / "home")


def supervisor(house: House, name: str) -> Any:
    """Return the record of an Endpoint's supervisor."""
    record = Layout(house.home, name).supervisor()
    assert record is not None
    return record


def nothing(_words: str, _data: object) -> None:
    """Take progress."""


# -- updates ----------------------------------------------------------------------------------------------------------


def test_updates_refuse_and_cut_nothing(house: House, name: str) -> None:
    """16 kept connections that never try again ask through 5 updates: every request is answered, by every Revision."""
    source = "def predict(x: int) -> int:\n    return {number}\n"
    first = house.apply(name, source.format(number=1), replicas=2)
    key = house.engine.key(name)
    stop = threading.Event()
    failures: list[str] = []
    answers: Counter[int] = Counter()

    def client() -> None:
        mine: Counter[int] = Counter()
        with Raw(first.url, key) as raw:
            while not stop.is_set():
                try:
                    mine[raw.ask({"x": 1})] += 1
                except (OSError, AssertionError) as error:
                    failures.append(repr(error))
                    raw.close()
        answers.update(mine)

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    try:
        for number in range(2, 7):
            house.apply(name, source.format(number=number), replicas=2)
            with Raw(first.url, key) as raw:
                eventually(lambda raw=raw, number=number: raw.ask({"x": 1}) == number)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert set(answers) == {1, 2, 3, 4, 5, 6}


def test_after_an_update_kept_connections_get_the_new_revision(house: House, name: str) -> None:
    """Once apply has returned, the very next request on a connection that was kept open is answered by the new one."""
    source = "def predict(x: int) -> int:\n    return {number}\n"
    first = house.apply(name, source.format(number=1))
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(Raw(first.url, house.engine.key(name))) for _ in range(12)]
        for number in range(1, 5):
            if number > 1:
                house.apply(name, source.format(number=number))
            assert [raw.ask({"x": 1}) for raw in kept] == [number] * 12


def test_idle_connections_survive_a_handover(house: House, name: str) -> None:
    """Connections that idle, or send at the very moment of the handover, get their answer from the new Replica."""
    source = "def predict(x: int) -> int:\n    return {number}\n"
    status = house.apply(name, source.format(number=1))
    key = house.engine.key(name)
    clients = [Raw(status.url, key) for _ in range(32)]
    for client in clients:
        assert client.ask({"x": 1}) == 1
    done = threading.Event()

    def update() -> None:
        house.apply(name, source.format(number=2))
        done.set()

    thread = threading.Thread(target=update)
    thread.start()
    rounds = 0
    sockets = [client.connect() for client in clients]
    while not done.is_set() or rounds < 2:
        for client in clients[: len(clients) // 2]:  # the others idle all the while
            client.send({"x": 1})
        for client in clients[: len(clients) // 2]:
            code, body = client.receive()
            assert code == 200, body
        rounds += 1
    thread.join()
    for client, sock in zip(clients, sockets, strict=True):
        eventually(lambda client=client: client.ask({"x": 1}) == 2)
        if client not in clients[: len(clients) // 2]:
            assert client.connect() is sock  # never closed: handed from one process to the other
        client.close()


def test_a_running_call_is_finished_by_its_replica(house: House, name: str) -> None:
    """An update waits for calls that run, and answers them."""
    status = house.apply(name, SLEEPS)
    with Raw(status.url, house.engine.key(name)) as client:
        client.send({"seconds": 5})
        wait_until(lambda: house.engine.status(name).in_flight == 1)
        house.apply(name, ADD)
        assert house.ask(name, x=1) == 2
        assert client.receive() == (200, b"5.0")


def test_load_is_shared(house: House, name: str) -> None:
    """16 clients over 4 Replicas: no Replica has more than twice the share of another."""
    source = "import os, time\ndef predict(x: int) -> int:\n    time.sleep(0.01)\n    return os.getpid()\n"
    status = house.apply(name, source, replicas=4)
    key = house.engine.key(name)
    answers: Counter[int] = Counter()
    start = threading.Barrier(16)

    def client() -> None:
        mine: Counter[int] = Counter()
        with Raw(status.url, key) as raw:
            start.wait(30)
            for _ in range(40):
                mine[raw.ask({"x": 1})] += 1
        answers.update(mine)

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers.total() == 16 * 40
    assert len(answers) == 4
    assert max(answers.values()) <= 2 * min(answers.values())


def test_a_connection_that_waits_for_a_restart_is_answered(house: House, name: str) -> None:
    """While the only Replica restarts, a new connection waits for it instead of being refused."""
    status = house.apply(name, PID)
    key = house.engine.key(name)
    os.kill(house.ask(name, x=1), signal.SIGKILL)
    wait_until(lambda: house.engine.status(name).ready == 0)
    with Raw(status.url, key) as client:
        assert client.ask({"x": 1}) > 0


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_killed_replica_comes_back(house: House, name: str) -> None:
    """Others go on, a new one takes its place, and the status keeps the reason."""
    house.apply(name, PID, replicas=2)
    before = {house.ask(name, x=0) for _ in range(8)}
    assert len(before) == 2
    victim, other = sorted(before)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: house.engine.status(name).ready == 1 or "SIGKILL" in house.engine.status(name).reason)
    assert house.ask(name, x=0) != victim
    wait_until(lambda: house.engine.status(name).ready == 2)
    status = house.engine.status(name)
    assert status.phase is Phase.READY
    assert "killed (SIGKILL)" in status.reason
    after = {house.ask(name, x=0) for _ in range(8)}
    assert other in after
    assert victim not in after
    assert len(after) == 2


def test_crashes_back_off_and_are_told(house: House, name: str) -> None:
    """A Replica that keeps crashing is restarted later and later; the phase becomes failed with the last lines."""
    source = (
        "import os\ndef predict(x: int) -> int:\n    if x:\n        print('out of luck', flush=True)\n"
        "        os._exit(9)\n    return os.getpid()\n"
    )
    status = house.apply(name, source)
    key = house.engine.key(name)
    gaps: list[float] = []
    for _ in range(3):
        with Raw(status.url, key) as client, pytest.raises(ConnectionError):
            client.ask({"x": 1})
        wait_until(lambda: house.engine.status(name).ready == 0)
        now = house.engine.status(name)
        assert "status 9" in now.reason
        assert "out of luck" in now.reason
        began = time.monotonic()
        wait_until(lambda: house.engine.status(name).ready == 1)
        gaps.append(time.monotonic() - began)
    assert gaps[2] > 1.5  # 0.1, 0.4, 1.6 s, and the start of a Replica


def test_a_silent_replica_is_left_out_of_the_metrics(house: House, name: str) -> None:
    """One that does not tell its counters in time is no Replica whose counters are zero; it comes back."""
    house.apply(name, PID, replicas=2)
    wait_until(lambda: len(house.engine.scrape(name)) == 2)
    silent = house.ask(name, x=0)
    os.kill(silent, signal.SIGSTOP)
    try:
        found = wait_until(lambda: house.engine.scrape(name))
    finally:
        os.kill(silent, signal.SIGCONT)
    assert len(found) == 1
    assert all(found.values())
    wait_until(lambda: len(house.engine.scrape(name)) == 2)


def test_progress_is_told_however_late_anybody_looks(house: House, name: str, tmp_path: Path) -> None:
    """Each step of a Replica is told, also where it was ready by the time its supervisor looked."""
    go, answered = tmp_path / "go", tmp_path / "answered"
    source = (
        "import os, pathlib, time\n"
        f"here, go, answered = {os.getpid()}, pathlib.Path({str(go)!r}), pathlib.Path({str(answered)!r})\n"
        "def setup():\n    while os.getpid() != here and not go.exists():\n        time.sleep(0.01)\n    return 1\n"
        "def predict(model, x: int) -> int:\n    if os.getpid() != here:\n"
        "        answered.symlink_to(str(os.getpid()))\n    return x\n"
    )

    def ready() -> bool:
        """Whether the Replica takes signals as it does when it serves: nobody else can be asked meanwhile."""
        if not answered.is_symlink():
            return False
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{answered.readlink()}/status").read_text(encoding="ascii"))
        return caught is not None and bool(int(caught[1], 16) & 1 << signal.SIGTERM - 1)

    bundle = house.bundle(source, {"x": 1})
    house.apply(name, ADD)
    told: list[str] = []
    applying = threading.Thread(
        target=lambda: house.engine.apply(house.revision(name, bundle), bundle, lambda words, _: told.append(words))
    )
    applying.start()
    pid = supervisor(house, name).identity.pid
    wait_until(lambda: "loading" in told)
    os.kill(pid, signal.SIGSTOP)
    try:
        go.touch()
        wait_until(ready)
        before = list(told)
    finally:
        os.kill(pid, signal.SIGCONT)
    applying.join()
    assert before[-1] == "loading"
    assert told[-1] == "warming up"
    assert len(told) == len(set(told))


def test_a_killed_supervisor(house: House, name: str) -> None:
    """Its Replicas end by themselves, the status tells the truth, start brings the Endpoint back where it was."""
    status = house.apply(name, PID, replicas=2)
    key = house.engine.key(name)
    pids = {house.ask(name, x=0) for _ in range(8)}
    record = supervisor(house, name)
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_until(lambda: not any(Identity.of(pid).alive() for pid in pids))
    dead = house.engine.status(name)
    assert (dead.phase, dead.ready, dead.url) == (Phase.FAILED, 0, status.url)
    assert f"nbdeploy start {name}" in dead.reason
    assert [one.phase for one in house.engine.list() if one.name == name] == [Phase.FAILED]
    assert house.engine.scrape(name) == {}
    back = house.change(name)
    assert (back.phase, back.ready, back.url, house.engine.key(name)) == (Phase.READY, 2, status.url, key)
    assert not Path(record.control).parent.exists()
    house.ask(name, x=0)


def test_delete_after_a_killed_supervisor(house: House, name: str) -> None:
    """Replicas that are still busy when their supervisor is killed do not outlive a delete."""
    status = house.apply(name, SLEEPS)
    with Raw(status.url, house.engine.key(name)) as client:
        client.send({"seconds": 50})
        wait_until(lambda: house.engine.status(name).in_flight == 1)
        record = supervisor(house, name)
        os.kill(record.identity.pid, signal.SIGKILL)
        wait_until(lambda: not record.identity.alive())
        house.engine.delete(name)
        wait_until(lambda: not [one for one in leftovers(house.home) if f"/{name}" in one])
    assert not Path(record.control).parent.exists()


def test_a_removed_folder_ends_its_processes(house: House, name: str) -> None:
    """Whoever removes the files by hand leaves no process without an owner."""
    house.apply(name, ADD)
    record = supervisor(house, name)
    shutil.rmtree(house.home / "endpoints" / name)
    wait_until(lambda: not record.identity.alive())
    assert not Path(record.control).parent.exists()
    with pytest.raises(EndpointNotFoundError):
        house.engine.status(name)


def test_user_code_that_will_not_die(house: House, name: str) -> None:
    """Neither a Replica that ignores SIGTERM, nor its children, nor what it detached is left after delete."""
    source = (
        "def setup():\n"
        "    import signal, subprocess, sys, os\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    hang = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True);"
        " time.sleep(600)'\n"
        "    child = subprocess.Popen([sys.executable, '-c', hang], stdout=subprocess.PIPE)\n"
        "    child.stdout.readline()\n"
        "    detached = subprocess.Popen([sys.executable, '-c', hang], stdout=-1, start_new_session=True)\n"
        "    detached.stdout.readline()\n"
        "    return [os.getpid(), child.pid, detached.pid]\n"
        "def predict(model, x: int) -> list:\n    return model\n"
    )
    house.apply(name, source)
    identities = [Identity.of(pid) for pid in house.ask(name, x=1)]
    assert all(one.alive() for one in identities)
    house.engine.delete(name)
    wait_until(lambda: not any(one.alive() for one in identities))


# -- half-made --------------------------------------------------------------------------------------------------------


DEPLOYS = """
import sys
from pathlib import Path
from nbdeploy.bundle import Bundle
from nbdeploy.engines.local.engine import LocalEngine
from nbdeploy.spec import Revision
from nbdeploy.store import Store
import json
home, revision, digest = Path(sys.argv[1]), Revision.from_json(json.loads(sys.argv[2])), sys.argv[3]
def tell(words, data):
    print(words, flush=True)
LocalEngine(home).apply(revision, Bundle(Store(home / "store"), digest), tell)
"""
LOADS_LONG = "def setup():\n    import time\n    time.sleep(600)\ndef predict(model, x: int) -> int:\n    return x\n"


@pytest.mark.parametrize("update", [False, True], ids=["first", "update"])
def test_a_killed_apply_leaves_what_was(house: House, name: str, update: bool) -> None:  # noqa: FBT001 - a parameter
    """Whoever applies may be killed in the middle: what served goes on, what was half-made is gone by itself."""
    if update:
        house.apply(name, PID)
        before = house.ask(name, x=1)
    bundle = house.bundle(LOADS_LONG)
    revision = json.dumps(house.revision(name, bundle).to_json())
    with subprocess.Popen(
        [sys.executable, "-c", DEPLOYS, str(house.home), revision, bundle.digest], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any("loading" in line for line in iter(process.stdout.readline, ""))
        starting = house.engine.status(name)
        assert starting.phase is (Phase.READY if update else Phase.STARTING)
        assert "starting revision" in starting.reason
        process.kill()
    if update:
        wait_until(lambda: house.engine.status(name).reason == "")
        assert house.ask(name, x=1) == before
        assert [one.number for one in house.engine.revisions(name)] == [1]
    else:
        wait_until(lambda: not (house.home / "endpoints" / name).exists())
        wait_until(lambda: not [one for one in leftovers(house.home) if f"/{name}" in one])
    assert house.apply(name, ADD).phase is Phase.READY


def test_a_failed_scale_keeps_what_runs(house: House, name: str, tmp_path: Path) -> None:
    """Where a further Replica cannot start, those that run stay, and so does the wanted number."""
    flag = tmp_path / "flag"
    source = (
        f"def setup():\n    from pathlib import Path\n    p = Path({str(flag)!r})\n"
        "    if p.exists():\n        raise RuntimeError('no room')\n    p.touch()\n"
        "def predict(model, x: int) -> int:\n    import os\n    return os.getpid()\n"
    )
    house.apply(name, source)
    before = house.ask(name, x=1)
    with pytest.raises(EngineError, match="no room"):
        house.change(name, autoscaling=Autoscaling(3, 3))
    status = house.engine.status(name)
    assert (status.ready, status.desired, status.revision, status.phase) == (1, 1, 1, Phase.READY)
    assert {house.ask(name, x=1) for _ in range(4)} == {before}


def test_half_made_folders_go(house: House, name: str) -> None:
    """A folder of a deploy that died before it had a supervisor is no Endpoint, and whoever looks removes it."""
    layout = Layout(house.home, name)
    with layout.locked():
        layout.create()
        layout.add_revision(
            house.revision(name, house.bundle(ADD)),
            LocalEngine(house.home)._launch(layout, house.revision(name, house.bundle(ADD)), house.bundle(ADD)),
        )
        assert [one.phase for one in house.engine.list() if one.name == name] == [Phase.FAILED]
    assert name not in [one.name for one in house.engine.list()]
    assert not layout.folder.exists()


def test_broken_and_foreign_folders(tmp_path: Path) -> None:
    """`ls` works whatever lies in endpoints/: foreign things stay, broken Endpoints are told and deletable."""
    engine = LocalEngine(tmp_path)
    folder = tmp_path / "endpoints"
    (folder / "foreign").mkdir(parents=True)
    (folder / "foreign" / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "file").write_text("mine", encoding="utf-8")
    (folder / ".DS_Store").write_text("", encoding="utf-8")
    for name, file, text in [
        ("broken", "endpoint.json", "{"),
        ("list", "endpoint.json", "[]"),
        ("later", "revisions/1.json", '{"name": "later", "number": 1, "colour": "blue"}'),
        ("half", "supervisor.json", '{"identity": {}}'),
    ]:
        layout = Layout(tmp_path, name)
        layout.create()
        layout.commit(1)
        layout.write("revisions/1.json", Revision(name, 1, "sha256:0").to_json())
        (layout.folder / file).write_text(text, encoding="utf-8")
    found = {status.name: status for status in engine.list()}
    assert set(found) == {"broken", "list", "later", "half"}
    assert {status.phase for status in found.values()} == {Phase.FAILED}
    assert "cannot be read" in found["broken"].reason
    for name in found:
        engine.delete(name)
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", "file", "foreign"]
    assert engine.list() == []


# -- identity ---------------------------------------------------------------------------------------------------------


def rewrite(house: House, name: str, **changes: object) -> None:
    """Change what the record of a supervisor says of its identity."""
    layout = Layout(house.home, name)
    data = layout.read("supervisor.json")
    layout.write("supervisor.json", {**data, "identity": {**data["identity"], **changes}})


def test_a_reboot_is_told(house: House, name: str) -> None:
    """After a restart of the machine the Endpoint has failed, says so, and starts again on its port."""
    status = house.apply(name, ADD)
    record = supervisor(house, name)
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_until(lambda: not record.identity.alive())
    rewrite(house, name, boot="00000000-0000-0000-0000-000000000000")
    dead = house.engine.status(name)
    assert (dead.phase, dead.reason) == (Phase.FAILED, f"machine restarted; nbdeploy start {name}")
    assert house.change(name).url == status.url
    assert house.ask(name, x=1) == 2


def test_a_reused_pid_is_nobody(house: House, name: str) -> None:
    """A process that has the pid by chance is not taken for the supervisor, and never signalled."""
    house.apply(name, ADD)
    record = supervisor(house, name)
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_until(lambda: not record.identity.alive())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        rewrite(house, name, pid=innocent.pid, started=record.identity.started)
        assert house.engine.status(name).phase is Phase.FAILED
        house.engine.delete(name)
        assert innocent.poll() is None
        innocent.communicate(b"\n")
        assert innocent.returncode == 0


def test_another_machine_is_left_alone(house: House, name: str) -> None:
    """On a shared home, an Endpoint of another host is told as such, and not deleted from here."""
    house.apply(name, ADD)
    good = Layout(house.home, name).read("supervisor.json")
    rewrite(house, name, host="elsewhere", boot="1")
    status = house.engine.status(name)
    assert (status.phase, "elsewhere" in status.reason) == (Phase.FAILED, True)
    with pytest.raises(EngineError, match="elsewhere"):
        house.engine.delete(name)
    Layout(house.home, name).write("supervisor.json", good)
    assert house.ask(name, x=1) == 2


# -- ports ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of this machine that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_told(house: House, name: str, taken: int) -> None:
    """Words and nothing left for a first Revision; an Endpoint that serves stays where it is."""
    with pytest.raises(EngineError, match=rf"Port {taken} of this machine is taken.*--port"):
        house.apply(name, ADD, serving=Serving(port=taken))
    assert not (house.home / "endpoints" / name).exists()
    status = house.apply(name, ADD)
    with pytest.raises(EngineError, match="is taken"):
        house.apply(name, ADD, serving=Serving(port=taken))
    assert house.engine.status(name).url == status.url
    assert house.ask(name, x=1) == 2


def test_a_fixed_port_is_kept(house: House, name: str) -> None:
    """--port holds over Revisions that do not name one, and over stop and start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    assert house.apply(name, ADD, serving=Serving(port=port)).url == url
    assert house.apply(name, ADD.replace("+ 1", "+ 2")).url == url
    house.change(name, stopped=True)
    assert house.change(name, stopped=False).url == url
    assert house.ask(name, x=1) == 3
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        other = probe.getsockname()[1]
    assert house.apply(name, ADD, serving=Serving(port=other)).url == f"http://127.0.0.1:{other}"
    assert house.ask(name, x=1) == 2


@pytest.mark.slow  # a connection is held for 10 s before it is refused
def test_nothing_ready_is_answered_in_words(house: House, name: str) -> None:
    """A stop that waits for a running call answers new connections; nobody is left without words."""
    status = house.apply(name, ADD)
    supervisor_pid = supervisor(house, name).identity.pid
    key = house.engine.key(name)
    layout = Layout(house.home, name)
    crashed = re.compile("exited|killed")
    # Break the launch of Replicas, then kill the one there is: restarts fail until the supervisor gives up.
    launch = layout.read("launch/1.json")
    layout.write("launch/1.json", {**launch, "python": "/nonexistent/python"})
    (replica,) = layout.replicas()
    os.kill(replica.pid, signal.SIGKILL)
    wait_until(lambda: house.engine.status(name).ready == 0)
    with Raw(status.url, key) as client:
        client.send({"x": 1})
        code, body = client.receive()
    problem = json.loads(body)
    assert (code, problem["status"]) == (503, 503)
    assert "nbdeploy status" in problem["detail"]
    assert client.headers["content-type"] == "application/problem+json"
    assert client.headers["retry-after"] == "1"
    reason = house.engine.status(name).reason
    assert crashed.search(reason) or "cannot be started" in reason
    layout.write("launch/1.json", launch)
    assert house.change(name).phase is Phase.READY
    assert supervisor(house, name).identity.pid == supervisor_pid
    assert house.ask(name, x=1) == 2


# -- logs -------------------------------------------------------------------------------------------------------------


def test_logs_rotate(tmp_path: Path) -> None:
    """At most FILES files of SIZE bytes are kept, the newest lines among them, in order."""
    log = LogFile(tmp_path)
    line = b"x" * 65_000
    total = (FILES + 1) * SIZE // len(line)
    for number in range(total):
        log.feed("r1-1", b"%08d %b\n" % (number, line))
    log.feed("r1-1", b"no newline yet")
    assert log.end("r1-1")[-1] == "no newline yet"
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == FILES
    assert all(file.stat().st_size <= SIZE for file in files)
    lines = list(read(tmp_path, follow=False))
    numbers = [int(text.split()[3]) for text in lines[:-1]]
    assert numbers == list(range(numbers[0], total))
    assert 0 < numbers[0] < total // 2
    assert lines[-1].endswith("r1-1 no newline yet")


def test_follow_loses_nothing_at_a_rotation(tmp_path: Path) -> None:
    """A reader that follows sees every line once, over rotations."""
    log = LogFile(tmp_path)
    log.feed("r1-1", b"first\n")
    lines = read(tmp_path, follow=True)
    assert next(lines).endswith("first")
    padding = b"y" * 60_000
    seen = []
    for number in range(2 * SIZE // len(padding)):
        log.feed("r1-1", b"%d %b\n" % (number, padding))
        seen.append(int(next(lines).split()[3]))
    assert seen == list(range(len(seen)))
    log.close()


def test_a_line_that_never_ends(tmp_path: Path) -> None:
    """Output without newlines is cut into lines instead of being collected for ever."""
    log = LogFile(tmp_path)
    for _ in range(40):
        log.feed("r1-1", b"." * 10_000)
    log.end("r1-1")
    log.close()
    lines = list(read(tmp_path, follow=False))
    assert len(lines) > 3
    assert sum(line.count(".") for line in lines) == 400_000


# -- secrecy and isolation --------------------------------------------------------------------------------------------


def test_the_environment_is_an_allow_list(tmp_path: Path) -> None:
    """A Replica sees the allowed names, what --env and --secret name, and nothing else of the kernel's environment."""
    others = {"OTHER": "no", "AWS_SECRET": "no", "PYTHONPATH": "/no"}
    environ = {**os.environ, **others, "MINE": "yes", "CUDA_VISIBLE_DEVICES": ""}
    for house in house_of("local", tmp_path / "home"):
        house.engine = LocalEngine(house.home, environ=environ)
        source = "import os\ndef predict(x: int) -> dict:\n    return dict(os.environ)\n"
        house.apply("env", source, variables=("MINE",), secrets=("TOKEN",), secret_values={"TOKEN": "s3cret"})
        seen = house.ask("env", x=1)
        assert (seen["MINE"], seen["TOKEN"], seen["PATH"]) == ("yes", "s3cret", os.environ["PATH"])
        assert "CUDA_VISIBLE_DEVICES" in seen
        assert not set(others) & set(seen)
        assert not [one for one in seen if one.startswith("NBDEPLOY")]


def test_the_key_is_in_no_wrong_place(house: House, name: str) -> None:
    """Not in ps, an environment, a log or a file that others could read: only in the key file, 0600."""
    house.apply(name, PRINTS, replicas=2)
    key = house.engine.key(name)
    house.ask(name, x=1)
    with Raw(house.engine.status(name).url, key + "x") as client:
        assert client.request({"x": 1})[0] == 401
    processes = [int(one.split()[0]) for one in leftovers(house.home)]
    assert len(processes) >= 3
    for pid in processes:
        for part in ("cmdline", "environ"):
            assert key.encode() not in Path(f"/proc/{pid}/{part}").read_bytes()
    with_key = [path for path in house.home.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert with_key == [house.home / "endpoints" / name / "key"]
    assert stat.S_IMODE(with_key[0].stat().st_mode) == 0o600
    for folder in (house.home / "endpoints" / name, house.home / "endpoints" / name / "launch"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in (house.home / "endpoints" / name / "launch").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_long_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home, and a TMPDIR, whose paths are longer than a Unix socket's may be."""
    deep = tmp_path.joinpath(*["a" * 50] * 4)
    temporary = tmp_path / ("t" * 100)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for house in house_of("local", deep / "home"):
        house.apply("long", ADD)
        assert house.ask("long", x=1) == 2
        control = supervisor(house, "long").control
        house.engine.delete("long")
        assert not Path(control).parent.exists()


# -- changes at once --------------------------------------------------------------------------------------------------


def test_two_changes_at_once_take_turns(house: House, name: str) -> None:
    """Two applies of the same state: one wins, the other is told; the Endpoint is whole."""
    house.apply(name, ADD)
    results: list[str] = []
    revisions = [(house.bundle(source), source) for source in (PID, PRINTS)]
    made = [(house.revision(name, bundle), bundle) for bundle, _ in revisions]

    def apply(revision: Revision, bundle: Any) -> None:
        try:
            house.engine.apply(revision, bundle, nothing)
            results.append("done")
        except EngineError as error:
            results.append(str(error))

    threads = [threading.Thread(target=apply, args=one) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results.count("done") == 1
    assert any("came first" in words for words in results)
    assert house.engine.status(name).ready == 1
    assert len(house.engine.revisions(name)) == 2


def test_delete_waits_for_nobody_for_ever(house: House, name: str) -> None:
    """A delete while another change holds the Endpoint gives up with words."""
    house.apply(name, ADD)
    layout = Layout(house.home, name)
    with layout.locked(), pytest.raises(EngineError, match=f"nbdeploy cancel {name}"), layout.locked(wait=0.2):
        pass


def test_what_this_engine_cannot_do(house: House, name: str) -> None:
    """Scaling by load comes later: asked for now, it is refused with what works."""
    for scaling in (Autoscaling(0, 1), Autoscaling(1, 4)):
        bundle = house.bundle(ADD)
        revision = Revision(name, 1, bundle.digest, autoscaling=scaling)
        with pytest.raises(UsageError, match="fixed number of Replicas"):
            house.engine.apply(revision, bundle, nothing)
    assert not (house.home / "endpoints" / name).exists()


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told_before_the_capture(house: House, name: str) -> None:
    """`--gpu 1` on a machine without a GPU is refused by the pre-flight check."""
    with pytest.raises(UsageError, match="this machine has no GPU"):
        house.engine.check(Revision(name, 1, "", resources=Resources(gpus=1)))


def test_delete_removes_what_was_laid_out(house: House, name: str) -> None:
    """Code and files laid out for Replicas go with the last Endpoint that needs them."""
    house.apply(name, ADD)
    unpacked = house.home / "store" / "unpacked" / house.engine.revisions(name)[-1].bundle.partition(":")[2]
    assert unpacked.is_dir()
    house.engine.delete(name)
    assert not unpacked.exists()


def test_a_lost_interpreter_is_told(house: House, name: str) -> None:
    """Where the Python of the Bundle's kernel is gone, start says so."""
    house.apply(name, ADD)
    house.change(name, stopped=True)
    layout = Layout(house.home, name)
    for number in (1, 2):
        launch = layout.read(f"launch/{number}.json")
        layout.write(f"launch/{number}.json", {**launch, "python": "/nonexistent/python"})
    with pytest.raises(EngineError, match="/nonexistent/python"):
        house.change(name, stopped=False)
    assert house.engine.status(name).phase is Phase.IDLE


def test_old_revisions_are_forgotten(house: House, name: str) -> None:
    """Ten Revisions are kept, with what starts their Replicas."""
    house.apply(name, ADD)
    for number in range(14):
        house.change(name, autoscaling=Autoscaling(1, 1, target_in_flight=number + 1))
    numbers = [one.number for one in house.engine.revisions(name)]
    assert numbers == list(range(6, 16))
    folder = house.home / "endpoints" / name / "launch"
    assert sorted(int(path.stem) for path in folder.glob("*.json")) == numbers


def test_a_failing_load_does_not_disturb(house: House, name: str) -> None:
    """Connections made while a Revision fails to load are all answered by the one that serves."""
    status = house.apply(name, PID, replicas=2)
    key = house.engine.key(name)
    known = {house.ask(name, x=0) for _ in range(6)}
    failed = threading.Event()

    def update() -> None:
        with contextlib.suppress(EngineError):
            house.apply(name, NEVER_LOADS, replicas=2)
        failed.set()

    thread = threading.Thread(target=update)
    thread.start()
    while not failed.is_set():
        with Raw(status.url, key) as client:
            assert client.ask({"x": 1}) in known
    thread.join()
