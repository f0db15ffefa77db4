"""A Replica as it runs in a container: the real process, told by environment variables, on real sockets."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import nbdeploy_server
import pytest
from nbdeploy_server import __main__ as start
from nbdeploy_server import failure, gpu, restore, variables
from nbdeploy_server.errors import LoadFailed, SettingsInvalid
from nbdeploy_server.metrics import Metrics, machine_text
from nbdeploy_server.probes import Probes
from nbdeploy_server.progress import DRAINING, READY, STUCK, Progress
from nbdeploy_server.sockets import bind
from prometheus_client.parser import text_string_to_metric_families

from nbdeploy import capture
from nbdeploy.store import Store
from tests.conftest import wait_until
from tests.server.conftest import cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM = Path(nbdeploy_server.__file__).parent / "__main__.py"
PACKAGES = sysconfig.get_paths()["purelib"]
BASE = Path(sys.base_prefix) / "bin" / "python3"  # an interpreter without our packages, as a base image has
KEY = "open sesame"

ADD = "def predict(x: int) -> int:\n    print('asked for', x)\n    return x + 1\n"
SLEEP = "import time\ndef predict(seconds: float) -> float:\n    time.sleep(seconds)\n    return seconds\n"
GATE = (  # a pipe that nobody writes to yet: the load lasts until the test says so
    "def setup():\n    return open(PATH).read()\ndef predict(model, x: int) -> str:\n    return model + str(x)\n"
)
LOOK = (
    "import os, sys\ndef predict(what: str) -> object:\n"
    "    if what == 'environ':\n        return sorted(os.environ)\n"
    "    return sys.path if what == 'path' else [os.getuid(), os.getcwd()]\n"
)
TICKS = (
    "import time\ndef predict(count: int, wait: float):\n"
    "    for number in range(count):\n        time.sleep(wait)\n        yield number\n"
)


def taken_port() -> int:
    """Return a port that is free now; not of the range from which the kernel takes ports for clients."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 21_000 + worker * 500 + os.getpid() % 100
    for port in range(first, first + 400):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port
    pytest.fail("no port is free")


_GIVEN: set[int] = set()


@dataclass
class Container:
    """One process, its ports and what it prints."""

    process: subprocess.Popen[bytes]
    port: int
    probes_port: int
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, arguments: Any, **options: Any) -> httpx.Response:
        """Call it on a connection of its own."""
        url = f"http://127.0.0.1:{self.port}/predict"
        return httpx.post(url, json=arguments, headers=self.headers, trust_env=False, timeout=30, **options)

    def probe(self, path: str) -> httpx.Response:
        """Ask the probes' port."""
        return httpx.get(f"http://127.0.0.1:{self.probes_port}{path}", trust_env=False, timeout=10)

    def ready(self) -> Container:
        """Wait until it is ready."""

        def ready() -> bool:
            assert self.process.poll() is None, self.text()
            try:
                return self.probe("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready)
        return self

    def phase(self) -> str:
        """Return the phase that it tells, "" before it answers."""
        try:
            return str(self.probe("/readyz").json()["phase"])
        except httpx.TransportError:
            return ""

    def text(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(encoding="utf-8")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Write a Bundle of a cell's functions; returns the Store's folder and the digest."""

    def write(source: str, sample: Any = capture.arguments.MISSING, **names: Any) -> tuple[Path, str]:
        namespace = cell(source)
        namespace.update(names)
        request = capture.Request(
            predict=namespace["predict"], sample=sample, setup=namespace.get("setup"), folder=tmp_path
        )
        store = Store(tmp_path / "store")
        return tmp_path / "store", store.put_bundle(capture.take(request, store).manifest)

    return write


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Container]]:
    """Start processes as an image's entrypoint does; all end with the test."""
    made: list[Container] = []

    def one(
        made_of: tuple[Path, str],
        *,
        python: list[str | Path] | None = None,
        environment: dict[str, str] | None = None,
        program: Path = PROGRAM,
        user: int | None = None,
        **settings: Any,
    ) -> Container:
        store, digest = made_of
        number = len(made)
        own = tmp_path / f"tmp{number}"
        own.mkdir()
        own.chmod(0o777)
        port, probes_port = taken_port(), taken_port()
        variables_ = {
            "PATH": os.environ["PATH"],
            "NBDEPLOY_STORE": str(store),
            "NBDEPLOY_BUNDLE": digest,
            "NBDEPLOY_UNPACKED": str(own / "nbdeploy"),
            "NBDEPLOY_HOST": "127.0.0.1",
            "NBDEPLOY_PORT": str(port),
            "NBDEPLOY_PROBES_PORT": str(probes_port),
            "NBDEPLOY_DRAIN_SECONDS": "0",
            **({"NBDEPLOY_SETTINGS": json.dumps(settings)} if settings else {}),
            **(environment or {}),
        }
        command = [*(python or [sys.executable]), "-I", "-X", "faulthandler", program]
        log = tmp_path / f"log{number}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=variables_,
                cwd=own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                user=user,
                extra_groups=[] if user else None,
            )
        headers = {"authorization": f"Bearer {KEY}"} if settings.get("key_sha256") else {}
        made.append(Container(process, port, probes_port, log, headers))
        return made[-1]

    yield one
    for container in made:
        if container.process.poll() is None:
            container.process.kill()
        container.process.wait(30)


def test_it_starts_answers_and_says_so(bundle: Any, begin: Any) -> None:
    """The user's port answers with the key only, tells what a Replica tells, and one line says that it is ready."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    one = begin(bundle(ADD, {"x": 1}), name="adder", revision=3, key_sha256=digest, concurrency=1, queue=8, timeout=5.0)
    answer = one.ready().post({"x": 4})
    assert (answer.status_code, answer.json(), answer.headers["x-nbdeploy-revision"]) == (200, 5, "3")
    assert "connection" not in answer.headers
    assert "date" in answer.headers
    assert httpx.post(f"http://127.0.0.1:{one.port}/predict", json={"x": 4}, trust_env=False).status_code == 401
    report = one.probe("/readyz").json()
    assert (report["phase"], report["revision"]) == ("ready", 3)
    assert report["seconds"] >= 0
    for path, status in (("/livez", 200), ("/readyz", 200), ("/metrics", 404)):  # numbers are not for users
        assert httpx.get(f"http://127.0.0.1:{one.port}{path}", trust_env=False).status_code == status
    wait_until(lambda: "asked for 4" in one.text())  # printed into a file: at once all the same
    assert one.text().count(" · revision 3\n") == 1
    assert one.end() == 0


def test_only_a_bundle_is_needed(bundle: Any, begin: Any) -> None:
    """Without settings it serves publicly under any Host name, as behind a Service or a published port."""
    one = begin(bundle(ADD)).ready()
    answer = httpx.post(
        f"http://127.0.0.1:{one.port}/predict", json={"x": 1}, headers={"host": "adder.models.svc"}, trust_env=False
    )
    assert answer.json() == 2
    page = {"host": "adder.example.com", "origin": "https://adder.example.com"}  # a gateway took the encryption off
    assert httpx.post(f"http://127.0.0.1:{one.port}/predict", json={"x": 1}, headers=page, trust_env=False).json() == 2
    page["origin"] = "https://elsewhere.example.com"
    assert httpx.post(f"http://127.0.0.1:{one.port}/predict", json={"x": 1}, headers=page).status_code == 403
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"http://127.0.0.1:{one.port}/openapi.json").json()["info"]["title"] == "model"


def test_probes_are_up_before_the_model(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """While the model loads, it is alive and not ready, tells its phase, and the users' port refuses."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle(GATE, PATH=str(gate)), revision=2)
    wait_until(lambda: one.phase() == "loading")
    assert one.probe("/livez").status_code == 200
    refused = one.probe("/readyz")
    assert (refused.status_code, refused.json()["revision"]) == (503, 2)
    assert "nbdeploy_memory_bytes" in one.probe("/metrics").text
    assert one.probe("/else").status_code == 404
    with pytest.raises(httpx.ConnectError):
        one.post({"x": 1})
    gate.write_text("opened ", encoding="utf-8")
    assert one.ready().post({"x": 1}).json() == "opened 1"


def test_it_can_be_ended_while_it_loads(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """A signal during the load ends the process, also where it is the first of its container."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    one = begin(bundle(GATE, PATH=str(gate)))
    wait_until(lambda: one.phase() == "loading")
    assert one.end() == 143


def test_predict_does_not_hold_the_probes(bundle: Any, begin: Any) -> None:
    """Probes and numbers come while predict runs, and count it."""
    one = begin(bundle(SLEEP), timeout=30.0).ready()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.post, {"seconds": 1.5})
        wait_until(lambda: "\nnbdeploy_inflight 1\n" in one.probe("/metrics").text)
        assert one.probe("/livez").status_code == 200
        assert one.probe("/readyz").status_code == 200
        assert not call.done()
        assert call.result().json() == 1.5
    families = {family.name: family for family in text_string_to_metric_families(one.probe("/metrics").text)}
    assert families["nbdeploy_requests"].samples[0].value == 1
    assert families["nbdeploy_memory_bytes"].samples[0].value > 10e6


def test_scrapes_at_once_are_each_whole(bundle: Any, begin: Any) -> None:
    """Scraped from many sides under load, every text parses, and the counts of a histogram agree with themselves."""
    one = begin(bundle(SLEEP), queue=100).ready()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(trust_env=False) as client:
            while not stop.is_set():
                assert client.post(f"http://127.0.0.1:{one.port}/predict", json={"seconds": 0}).status_code == 200

    def scrape() -> None:
        for _ in range(20):
            families = {f.name: f for f in text_string_to_metric_families(one.probe("/metrics").text)}
            samples = {
                s.name + str(s.labels.get("le", "")): s.value for s in families["nbdeploy_request_seconds"].samples
            }
            assert samples["nbdeploy_request_seconds_bucket+Inf"] == samples["nbdeploy_request_seconds_count"]
            answered = sum(s.value for s in families["nbdeploy_requests"].samples)
            assert answered == samples["nbdeploy_request_seconds_count"]

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for done in [pool.submit(scrape) for _ in range(4)]:
            done.result()
        stop.set()
        for done in asking:
            done.result()


class Switch:
    """A router: sends each new connection to the Replica that is chosen just then, as a Service does."""

    def __init__(self) -> None:
        self.target = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._pumps: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if not self.target:
                near.close()
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self._pumps.append(threading.Thread(target=self._pump, args=(near, far)))
            self._pumps[-1].start()

    @staticmethod
    def _pump(near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in selector.select(30):
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr] # sockets were registered
                    if not data:
                        return
                    key.data.sendall(data)

    def close(self) -> None:
        """Take no more, and wait for what is open."""
        self.target = 0
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in (self._thread, *self._pumps):
            thread.join(30)
        self._listener.close()


class Caller:
    """A client that keeps its connection, never tries again, and reconnects only when it was told to."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self.connections = 0

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
            self.connections += 1
        head = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._socket.sendall(head % len(body) + body)
        data = b""
        while b"\r\n\r\n" not in data:
            got = self._socket.recv(65536)
            assert got, "the connection was closed instead of an answer"
            data += got
        top, _, rest = data.partition(b"\r\n\r\n")
        lines = top.lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length"))
        while len(rest) < length:
            rest += self._socket.recv(65536)
        if b"connection: close" in lines:
            self.close()
        return int(top.split()[1]), rest

    def close(self) -> None:
        """Let go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@pytest.mark.slow
def test_a_handover_loses_no_request(bundle: Any, begin: Any) -> None:
    """16 keep-alive callers that never try again see no failure when one Replica leaves and another takes over."""
    made_of = bundle(ADD.replace("    print('asked for', x)\n", ""))
    old, new = (
        begin(made_of, queue=100, revision=number, environment={"NBDEPLOY_DRAIN_SECONDS": "1.5"}) for number in (1, 2)
    )
    old.ready()
    switch = Switch()
    switch.target = old.port
    stop = threading.Event()

    def call(number: int) -> tuple[int, int]:
        caller, count = Caller(switch.port), 0
        while not stop.is_set():
            assert caller.ask(b'{"x": %d}' % number) == (200, b"%d" % (number + 1))
            count += 1
            if number % 4 == 0:
                stop.wait(0.02)  # some ask seldom: their connections are idle most of the time
        caller.close()
        return count, caller.connections

    with ThreadPoolExecutor(17) as pool:
        calls = [pool.submit(call, number) for number in range(16)]
        new.ready()
        left = pool.submit(old.end)
        wait_until(lambda: old.phase() == "draining")
        refused = old.probe("/readyz")
        assert (refused.status_code, old.probe("/livez").status_code) == (503, 200)
        assert old.post({"x": 1}).headers["connection"] == "close"  # routers do not know yet: it still serves
        switch.target = new.port
        assert left.result() == 0
        stop.set()
        results = [one.result() for one in calls]
    switch.close()
    assert sum(count for count, _ in results) > 100
    assert all(connections >= 2 for _, connections in results)


def test_what_runs_is_finished_and_who_only_waits_is_let_go(bundle: Any, begin: Any) -> None:
    """Told twice, the wait for routers ends: idle connections close, nobody new is taken, the running answer comes."""
    one = begin(bundle(SLEEP), concurrency=2, environment={"NBDEPLOY_DRAIN_SECONDS": "600"}).ready()
    idle = socket.create_connection(("127.0.0.1", one.port), timeout=30)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one.post, {"seconds": 2.0})
        wait_until(lambda: "\nnbdeploy_inflight 1\n" in one.probe("/metrics").text)
        one.process.send_signal(signal.SIGTERM)
        wait_until(lambda: one.phase() == "draining")
        assert one.post({"seconds": 0}).headers["connection"] == "close"
        one.process.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""
        with pytest.raises(httpx.ConnectError):
            one.post({"seconds": 0})
        answer = call.result()
        assert (answer.json(), answer.headers["connection"]) == (2.0, "close")
    assert one.process.wait(30) == 0
    idle.close()


def test_half_a_request_is_waited_for(bundle: Any, begin: Any) -> None:
    """A request whose first bytes came before the listener closed is answered."""
    one = begin(bundle(ADD)).ready()
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as sock:
        sock.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\n")
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(one.end)
            wait_until(lambda: one.phase() == "draining")
            sock.sendall(b'content-length: 8\r\n\r\n{"x": 1}')
            assert b"200 OK" in until(sock, b"\r\n\r\n")
            assert left.result() == 0


def test_a_refused_body_is_still_answered_while_draining(bundle: Any, begin: Any) -> None:
    """413 before the body has come is read by its caller, and not reset away by the closing connection."""
    one = begin(bundle(ADD), max_body=1000, environment={"NBDEPLOY_DRAIN_SECONDS": "600"}).ready()
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: one.phase() == "draining")
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as sock:
        sock.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n")
        assert b" 413 " in until(sock, b'reads."}')
        sock.sendall(b" " * 3_000_000)
        sock.sendall(b'POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n{"x": 1}')
        assert b"connection: close" in until(sock, b"\r\n\r\n")


def until(sock: socket.socket, end: bytes) -> bytes:
    """Read until something has come."""
    data = b""
    while end not in data:
        got = sock.recv(65536)
        assert got, data
        data += got
    return data


def test_a_stream_ends_before_its_replica(bundle: Any, begin: Any) -> None:
    """A stream under way when the Replica leaves comes whole."""
    one = begin(bundle(TICKS)).ready()
    url, asked = f"http://127.0.0.1:{one.port}/predict", {"count": 5, "wait": 0.2}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", url, json=asked, headers={"accept": "application/x-ndjson"}, trust_env=False) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        left = pool.submit(one.end)
        assert [first, *lines] == ["0", "1", "2", "3", "4"]
        assert left.result() == 0


def test_ctrl_c_ends_it(bundle: Any, begin: Any) -> None:
    """By hand, an interrupt drains without waiting for routers."""
    one = begin(bundle(ADD), environment={"NBDEPLOY_DRAIN_SECONDS": "600"}).ready()
    assert one.end(signal.SIGINT) == 0


def test_a_killed_replica_can_start_again(bundle: Any, begin: Any) -> None:
    """What a killed process left in its folder does not keep the next from starting in it."""
    made_of = bundle(ADD)
    one = begin(made_of).ready()
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    folder = str(one.log.parent / "tmp0" / "nbdeploy")
    assert begin(made_of, environment={"NBDEPLOY_UNPACKED": folder}).ready().post({"x": 1}).json() == 2


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


def refusal(environment: dict[str, str]) -> str:
    """Run the program with these variables and return its last words."""
    done = subprocess.run(
        [sys.executable, "-I", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    return done.stderr


def test_settings_that_make_no_sense_are_told_in_words() -> None:
    """Missing variables, unknown settings, wrong types, a taken port: each with what is allowed."""
    assert "NBDEPLOY_STORE and NBDEPLOY_BUNDLE must be set" in refusal({})
    base = {"NBDEPLOY_STORE": "/nowhere", "NBDEPLOY_BUNDLE": "sha256:" + "0" * 64}
    assert "'target' , which" not in refusal({**base, "NBDEPLOY_SETTINGS": '{"queue": "many"}'})
    unknown = refusal({**base, "NBDEPLOY_SETTINGS": '{"no_such": 1}'})
    assert "'no_such'" in unknown
    assert "concurrency" in unknown
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal({**base, "NBDEPLOY_HOST": "127.0.0.1", "NBDEPLOY_PORT": str(port)})
    assert f"port {port} cannot be listened on" in said
    assert "NBDEPLOY_PORT" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NBDEPLOY_SETTINGS", "{", "no JSON"),
        ("NBDEPLOY_SETTINGS", "[]", "object"),
        ("NBDEPLOY_SETTINGS", '{"timeout": "1"}', "'timeout', which must be a float"),
        ("NBDEPLOY_SETTINGS", '{"queue": true}', "'queue', which must be a int"),
        ("NBDEPLOY_SETTINGS", '{"store": "/"}', "does not know"),
        ("NBDEPLOY_SETTINGS", '{"key_sha256": "abc"}', "64 hex digits"),
        ("NBDEPLOY_DRAIN_SECONDS", "soon", "from 0 to 3600"),
        ("NBDEPLOY_PORT", "70000", "from 0 to 65535"),
    ],
)
def test_variables_are_checked(name: str, value: str, said: str) -> None:
    """A wrong variable is an error that says which and what is allowed."""
    with pytest.raises(SettingsInvalid, match=said):
        variables.read({"NBDEPLOY_STORE": "/s", "NBDEPLOY_BUNDLE": "sha256:1", name: value})


def test_variables_make_an_order() -> None:
    """Defaults are those of an image; settings are the Replica's."""
    base = {"NBDEPLOY_STORE": "/s", "NBDEPLOY_BUNDLE": "sha256:1"}
    order = variables.read(base)
    assert (order.port, order.probes_port, order.drain_seconds, order.host) == (8080, 9090, 10.0, "")
    assert (order.settings.name, order.settings.unpacked, order.settings.any_host) == ("model", "/tmp/nbdeploy", True)  # noqa: S108 - the default
    asked = {"name": "a", "revision": 2, "timeout": 3, "cors": ["https://a"], "gpus": 1}
    settings = variables.read({**base, "NBDEPLOY_SETTINGS": json.dumps(asked)}).settings
    assert (settings.revision, settings.timeout, settings.cors, settings.gpus) == (2, 3, ("https://a",), 1)


def test_the_environment_is_cleaned_and_isolated(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """User code sees no variable of nbdeploy, others as they are; PYTHON* variables and the folder change nothing."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "msgspec.py").write_text("raise RuntimeError('the wrong one')", encoding="utf-8")
    extra = {"PYTHONPATH": str(elsewhere), "NBDEPLOY_ANYTHING": "1", "MY_TOKEN": "t"}
    one = begin(bundle(LOOK), environment=extra).ready()
    seen = one.post({"what": "environ"}).json()
    assert "MY_TOKEN" in seen
    assert [name for name in seen if name.startswith("NBDEPLOY")] == []
    assert str(elsewhere) not in one.post({"what": "path"}).json()


def test_an_environment_in_a_folder_is_used(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """NBDEPLOY_SITE brings packages to an interpreter without any, its .pth files included, before the base's own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "packages.pth").write_text(f"{PACKAGES}\n", encoding="utf-8")
    one = begin(bundle(LOOK), python=[BASE], environment={"NBDEPLOY_SITE": str(site)}).ready()
    path = one.post({"what": "path"}).json()
    own = next(index for index, entry in enumerate(path) if entry.startswith(sys.base_prefix) and "site-" in entry)
    library = path.index(sysconfig.get_paths()["stdlib"])
    assert library < path.index(str(site)) < path.index(PACKAGES) < own


def test_paths_are_added_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand where the package is installed, nothing is put twice."""
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    start.add_paths(before[-1], "")
    assert sys.path == before
    start.add_paths(str(tmp_path), "")
    assert sys.path == [str(tmp_path), *before]


@pytest.mark.skipif(os.getuid() != 0, reason="changing the user needs root")
@pytest.mark.skipif(not Path("/usr/bin/python3.11").exists(), reason="needs a Python 3.11 that every user may run")
def test_it_runs_as_a_user_who_owns_nothing(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """As user 10001 on a Store of root's that it can only read, it serves, has a home, and changes nothing there."""
    store, digest = bundle(LOOK)
    server = tmp_path / "server"
    shutil.copytree(PROGRAM.parent, server / "nbdeploy_server", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (store, server):
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (tmp_path, *tmp_path.parents):
        if path == Path("/tmp"):  # noqa: S108 - where pytest keeps its folders
            break
        path.chmod(path.stat().st_mode | 0o011)
    before = sorted(store.rglob("*"))
    program = server / "nbdeploy_server" / "__main__.py"
    if not os.access(PACKAGES, os.X_OK) or not reachable(PACKAGES):
        pytest.skip("the packages lie in a folder that other users may not enter")
    one = begin(
        (store, digest),
        python=["/usr/bin/python3.11"],
        program=program,
        user=10001,
        environment={"NBDEPLOY_SITE": PACKAGES},
    ).ready()
    uid, folder = one.post({"what": "who"}).json()
    assert uid == 10001
    assert folder.endswith("/nbdeploy/files")
    assert {"HOME", "USER"} <= set(one.post({"what": "environ"}).json())
    assert sorted(store.rglob("*")) == before
    assert not list(server.rglob("__pycache__"))
    assert one.end() == 0


def reachable(folder: str) -> bool:
    """Whether every user may enter a folder."""
    return all(path.stat().st_mode & 0o001 for path in (Path(folder), *Path(folder).parents))


def test_a_folder_of_somebody_else_is_refused(bundle: Any, begin: Any, tmp_path: Path) -> None:
    """Code is run out of the folder for unpacked files: where it cannot be made, that is told."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    one = begin(bundle(ADD), environment={"NBDEPLOY_UNPACKED": str(tmp_path / "file" / "below")})
    assert one.process.wait(60) == 3
    assert "NBDEPLOY_UNPACKED" in one.text()


def test_progress_and_stuck_loops() -> None:
    """Phases are timed; a loop that does not turn for a minute fails /livez, one that never began does not."""
    now = [100.0]
    progress = Progress(7, lambda: now[0])
    with bind("127.0.0.1", 0, "ANY") as sock:
        probes = Probes(sock, progress, lambda: "text")
        try:
            now[0] += STUCK + 1
            assert probes.answer("/livez")[0] == 200
            progress.beat()
            progress.enter(READY, "all well")
            now[0] += 5
            assert json.loads(probes.answer("/readyz")[2]) == {
                "phase": "ready", "seconds": 5.0, "revision": 7, "text": "all well",
            }  # fmt: skip
            assert (probes.answer("/livez")[0], probes.answer("/readyz")[0], progress.ready) == (200, 200, True)
            now[0] += STUCK
            assert probes.answer("/livez")[0] == 503
            progress.beat()
            progress.enter(DRAINING)
            assert (probes.answer("/livez")[0], probes.answer("/readyz")[0]) == (200, 503)

            def late() -> str:
                raise TimeoutError

            probes.scrape = late
            assert probes.answer("/metrics")[0] == 503
        finally:
            probes.close()


def test_a_slow_prober_does_not_hold_the_next() -> None:
    """A connection that asks nothing keeps nobody from asking."""
    with bind("127.0.0.1", 0, "ANY") as sock:
        probes = Probes(sock, Progress(1), lambda: "text")
        try:
            with socket.create_connection(("127.0.0.1", probes.port)):
                assert httpx.get(f"http://127.0.0.1:{probes.port}/metrics", trust_env=False).text == "text"
        finally:
            probes.close()


def test_all_addresses_are_listened_on() -> None:
    """Without a host, both kinds of addresses reach it, as clusters of either kind need."""
    with bind("", 0, "ANY") as sock:
        sock.listen(1)
        socket.create_connection(("127.0.0.1", sock.getsockname()[1])).close()


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


def test_memory_is_told() -> None:
    """The resident memory follows what the process holds."""
    before = next(iter(text_string_to_metric_families(machine_text()))).samples[0]
    held = b"x" * 50_000_000
    after = next(iter(text_string_to_metric_families(machine_text()))).samples[0]
    assert before.name == "nbdeploy_memory_bytes"
    assert after.value - before.value > 0.8 * len(held)
    assert "nbdeploy_memory_bytes" in Metrics(1).text()


@pytest.mark.torch
def test_a_missing_gpu_is_said() -> None:
    """Without a GPU the model runs on the CPU, and one line says so; where none was asked for, nothing is said."""
    torch = pytest.importorskip("torch")
    assert gpu.note(set(), 0) == ""
    if not torch.cuda.is_available():
        assert "the model was on cuda:0, torch sees none" in gpu.note({"cuda:0"}, 0)
        assert "2 GPUs were asked for" in gpu.note(set(), 2)
        assert restore._device("cuda:0") == "cpu"
        assert "cuda:0" in restore.lacking
        assert gpu.gauges() == []
    else:
        assert gpu.note(set(), 1) == ""
        assert "torch sees" in gpu.note(set(), 1000)


@pytest.mark.torch
def test_a_gpu_that_is_missing_is_told_in_the_pod(bundle: Any, begin: Any) -> None:
    """--gpu without a GPU: the log and /readyz say that the CPU is used."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = (
        "import torch\nweights = torch.ones(3)\ndef predict(x: int) -> float:\n    return float(weights.sum()) + x\n"
    )
    one = begin(bundle(source), gpus=1).ready()
    assert one.post({"x": 1}).json() == 4.0
    assert "1 GPU was asked for, torch sees none" in one.text()
    assert "runs on the CPU" in one.probe("/readyz").json()["text"]


@pytest.mark.torch
def test_weights_move_slice_by_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved in slices of a mapped blob, every byte arrives, also of a last slice that is not full."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(restore, "SLICE", mmap.PAGESIZE)
    data = os.urandom(5 * mmap.PAGESIZE + 64)
    path = tmp_path / "blob"
    path.write_bytes(data)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    moved = restore._moved(memory, device)
    assert bytes(moved.cpu()) == data


@pytest.mark.torch
def test_weights_of_a_gpu_go_straight_to_it(tmp_path: Path) -> None:
    """Weights that lived on a GPU are put there without a second copy in the host's memory."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.zeros(1, device="cuda")
    size = 512 << 20
    path = tmp_path / "blob"
    with path.open("wb") as file:
        file.truncate(size)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    peak = [0.0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], next(iter(text_string_to_metric_families(machine_text()))).samples[0].value)
            time.sleep(0.005)

    before = next(iter(text_string_to_metric_families(machine_text()))).samples[0].value
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        moved = restore.Handle(memory, 0, "cuda:0").storage()
    finally:
        stop.set()
        watcher.join()
    assert (moved.device.type, moved.nbytes()) == ("cuda", size)
    assert peak[0] - before < 3 * restore.SLICE
