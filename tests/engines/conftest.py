"""What tests of engines share: Bundles made of a few lines, Revisions, and a client that never tries again."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import pytest
from nbdeploy_server import signature

from nbdeploy.bundle import Bundle
from nbdeploy.capture import Request, take
from nbdeploy.capture.arguments import MISSING
from nbdeploy.engines.base import get_engine
from nbdeploy.environment import lock, needed
from nbdeploy.errors import NbdeployError
from nbdeploy.spec import Autoscaling, Resources, Revision, Status
from nbdeploy.store import Store
from tests.conftest import leftovers, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from nbdeploy.engines.base import Engine
    from tests.cluster.running import Namespace

assert signature  # the replica's package is importable from here, as it is from a kernel

ADD = "def predict(x: int) -> int:\n    return x + 1\n"
PID = "import os\ndef predict(x: int) -> int:\n    return os.getpid()\n"
REPLICA = (  # pods have pids of their own
    "import os, socket\ndef predict(x: int) -> str:\n    return f'{socket.gethostname()}:{os.getpid()}'\n"
)
SLEEPS = "import time\ndef predict(seconds: float) -> float:\n    time.sleep(seconds)\n    return seconds\n"
PRINTS = "def predict(x: int) -> int:\n    print('asked for', x, flush=True)\n    return x\n"
NEVER_LOADS = (
    "def setup():\n    print('looking for weights', flush=True)\n    raise RuntimeError('no weights here')\n"
    "def predict(model, x: int) -> int:\n    return x\n"
)
NEVER_FITS = (
    "def setup():\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\ndef predict(model, x: int): ...\n"
)
EXITS = "def setup():\n    import os\n    print('bye', flush=True)\n    os._exit(7)\ndef predict(model, x: int): ...\n"


def functions(source: str) -> dict[str, Any]:
    """Return what a notebook has after running a cell of this source."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), namespace)  # noqa: S102 - the cell is the test's own
    return namespace


@dataclass
class House:
    """An engine with a home of its own, and shortcuts for what a deploy does with it.

    Attributes:
        home: folder of nbdeploy.
        engine: the Engine under test.
        progress: what `apply` told last.
    """

    home: Path
    engine: Any
    progress: list[str] = field(default_factory=list)
    _bundles: dict[tuple[str, str], Bundle] = field(default_factory=dict)
    _names: Iterator[int] = field(default_factory=itertools.count)

    def name(self) -> str:
        """Return a name that no other test has."""
        return f"e{next(self._names)}"

    def bundle(self, source: str, sample: Any = MISSING, secrets: Mapping[str, str] | None = None) -> Bundle:
        """Return a Bundle of `predict`, and of `setup` if there is one, in this source."""
        key = (source, repr(sample))
        if key not in self._bundles:
            made = functions(source)
            store = Store(self.home / "store")
            request = Request(predict=made["predict"], setup=made.get("setup"), sample=sample, folder=self.home)
            manifest = {**take(request, store).manifest, "distributions": lock(needed(()))}
            self._bundles[key] = Bundle(store, store.put_bundle(manifest))
        found = self._bundles[key]
        return Bundle(found.store, found.digest, secrets or {})

    def revision(self, name: str, bundle: Bundle, *, replicas: int = 1, **fields: Any) -> Revision:
        """Return the next Revision of an Endpoint."""
        try:
            number = self.engine.revisions(name)[-1].number + 1
        except LookupError:
            number = 1
        except Exception as error:
            if type(error).__name__ != "EndpointNotFoundError":
                raise
            number = 1
        scaling = Autoscaling(min_replicas=replicas, max_replicas=replicas)
        little = Resources(cpus=0.05, memory="256Mi")  # many Replicas on a small test cluster
        fields = {"resources": little, "autoscaling": scaling, "owner": "ada", **fields}
        return Revision(name, number, bundle.digest, **fields)

    def apply(self, name: str, source: str, sample: Any = MISSING, *, replicas: int = 1, **fields: Any) -> Status:
        """Deploy a source as the next Revision."""
        secrets = fields.pop("secret_values", None)
        bundle = self.bundle(source, sample, secrets)
        self.progress = []
        status: Status = self.engine.apply(
            self.revision(name, bundle, replicas=replicas, **fields),
            bundle,
            lambda words, _: self.progress.append(words),
        )
        return status

    def change(self, name: str, **fields: Any) -> Status:
        """Apply the last Revision again with changes, as scale, stop and start do."""
        import dataclasses

        last = self.engine.revisions(name)[-1]
        fresh = dataclasses.replace(last, number=last.number + 1, **fields)
        status: Status = self.engine.apply(fresh, None, lambda _words, _data: None)
        return status

    def ask(self, name: str, **arguments: Any) -> Any:
        """Call an Endpoint once."""
        with Raw(self.engine.status(name).url, self.engine.key(name)) as client:
            return client.ask(arguments)


class Raw:
    """One kept connection that never tries again: whatever is refused or cut raises."""

    def __init__(self, url: str, key: str = "", seconds: float = 30.0) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._key = key
        self._seconds = seconds
        self._sock: socket.socket | None = None
        self._data = b""
        self.headers: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self._data = b""

    def connect(self) -> socket.socket:
        """Open the connection if it is not."""
        if self._sock is None:
            self._sock = socket.create_connection(self._address, self._seconds)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._sock

    def send(self, arguments: Mapping[str, Any], path: str = "/predict") -> None:
        """Send a request."""
        body = json.dumps(arguments).encode()
        key = f"authorization: Bearer {self._key}\r\n" if self._key else ""
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{key}content-type: application/json\r\n"
        self.connect().sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def receive(self) -> tuple[int, bytes]:
        """Return status and body of the next answer."""
        while b"\r\n\r\n" not in self._data:
            self._more()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        first, *rows = head.decode("latin-1").split("\r\n")
        self.headers = {name.lower(): value for name, _, value in (row.partition(": ") for row in rows)}
        size = int(self.headers["content-length"])
        while len(self._data) < size:
            self._more()
        body, self._data = self._data[:size], self._data[size:]
        if self.headers.get("connection") == "close":
            self.close()
        return int(first.split()[1]), body

    def _more(self) -> None:
        got = self.connect().recv(65536)
        if not got:
            raise ConnectionResetError("the server closed the connection before its answer")
        self._data += got

    def request(self, arguments: Mapping[str, Any]) -> tuple[int, bytes]:
        """Send a request and return status and body of its answer."""
        self.send(arguments)
        return self.receive()

    def ask(self, arguments: Mapping[str, Any]) -> Any:
        """Return the answer; anything but 200 is an error."""
        status, body = self.request(arguments)
        assert status == 200, (status, body)
        return json.loads(body)


def house_of(kind: str, home: Path, settings: Mapping[str, Any] | None = None) -> Iterator[House]:
    """Give a House of this kind of engine, and prove at the end that nothing of it is left."""
    engine: Engine = get_engine(kind, home, settings)
    yield House(home, engine)
    for status in engine.list():
        engine.delete(status.name)
    wait_until(lambda: not leftovers(home))
    folder = home / "endpoints"
    assert not folder.is_dir() or list(folder.iterdir()) == []


@pytest.fixture(scope="module", params=["local", pytest.param("kubernetes", marks=pytest.mark.slow)])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A House of each engine that there is; another engine plugs in by its kind here."""
    folder = tmp_path_factory.mktemp("house")
    if request.param != "kubernetes":
        yield from house_of(request.param, folder / "home")
        return
    namespace: Namespace = request.getfixturevalue("make_namespace")()
    settings = {
        "namespace": namespace.name,
        "registry": f"{namespace.cluster.registry}/{namespace.name}",
        "base_image": namespace.cluster.base_image,
        "drain": 1.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in namespace.environ().items():
            patch.setenv(key, value)
        yield from house_of(request.param, folder / "home", settings)


def at_once(do: Callable[[int], object], *arguments: int) -> dict[int, str]:
    """Do something with each argument in a thread of its own, all at one moment; return each one's error, "" for none.

    Args:
        do: raises NbdeployError where it fails.
        arguments: one for each thread.
    """
    outcomes: dict[int, str] = {}
    together = threading.Barrier(len(arguments))

    def run(argument: int) -> None:
        together.wait(30)
        try:
            do(argument)
            outcomes[argument] = ""
        except NbdeployError as error:
            outcomes[argument] = str(error)

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return outcomes


@pytest.fixture
def name(house: House) -> Iterator[str]:
    """A name of this test's own, whose Endpoint goes with the test."""
    found = house.name()
    yield found
    if any(status.name == found for status in house.engine.list()):
        house.engine.delete(found)


def eventually(condition: Any, seconds: float = 30.0) -> Any:
    """Wait for a condition that may raise until it is true."""
    limit = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except AssertionError:
            if time.monotonic() > limit:
                raise
        else:
            if found:
                return found
            assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)
