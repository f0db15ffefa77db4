"""Real Replicas behind real sockets, for the tests of the server."""

from __future__ import annotations

import json
import linecache
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from nbdeploy import capture
from nbdeploy.bundle import Bundle
from nbdeploy.engines.local.engine import LocalEngine
from nbdeploy.engines.local.layout import Layout
from nbdeploy.spec import Revision, Serving
from nbdeploy.store import Store
from tests.conftest import leftovers, wait_until
from tests.server.asking import PAGE, SQUARE, TOKENS, WORK
from tests.server.containers import KEY, PROGRAM, Container, taken_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CELL = "/tmp/ipykernel_7/1234.py"  # noqa: S108 - what ipykernel calls cells


def cell(source: str, name: str = CELL) -> dict[str, Any]:
    """Run source as a notebook cell and return the namespace."""
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 - what a notebook does with a cell
    return namespace


@dataclass(frozen=True)
class Served:
    """One Endpoint of one Replica."""

    home: Path
    name: str
    engine: LocalEngine
    url: str
    key: str

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> httpx.Client:
        """Return a client that shows the key."""
        headers = {**({"authorization": f"Bearer {self.key}"} if self.key else {}), **options.pop("headers", {})}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30.0, **options)

    def post(self, arguments: Any, **options: Any) -> httpx.Response:
        """Call it with JSON."""
        with self.client() as client:
            return client.post("/predict", json=arguments, **options)

    def metrics(self) -> str:
        """Return the Prometheus text of its Replica; on a busy machine it may have to be asked again."""
        return str(wait_until(lambda: "".join(self.engine.scrape(self.name).values())))

    def logs(self) -> str:
        """Return all that it has printed."""
        return "\n".join(self.engine.logs(self.name, follow=False))

    def inflight(self) -> int:
        """Return how many requests run or wait."""
        return self.engine.status(self.name).in_flight

    def supervisor(self) -> int:
        """Return the supervisor's process id."""
        record = Layout(self.home, self.name).supervisor()
        assert record is not None
        return record.identity.pid


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Capture functions of a cell and serve them; each Endpoint lives as long as the module's tests."""
    home = tmp_path_factory.mktemp("home")
    engine = LocalEngine(home)
    made: dict[str, Served] = {}

    def start(name: str, source: str, sample: Any = capture.arguments.MISSING, **serving: Any) -> Served:
        if name not in made:
            store = Store(home / "store")
            predict = cell(source)["predict"]
            taken = capture.take(capture.Request(predict=predict, sample=sample, folder=home), store)
            digest = store.put_bundle(taken.manifest)
            revision = Revision(name, 1, digest, serving=Serving(**serving))
            status = engine.apply(revision, Bundle(store, digest), lambda _words, _data: None)
            made[name] = Served(home, name, engine, status.url, engine.key(name))
        return made[name]

    yield start
    for name in made:
        engine.delete(name)
    wait_until(lambda: not leftovers(home))


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


@pytest.fixture
def square(serve: Callable[..., Served]) -> Served:
    """A function with a key and one allowed page."""
    return serve("square", SQUARE, {"input": 4.0}, cors=(PAGE,))


@pytest.fixture
def work(serve: Callable[..., Served]) -> Served:
    """A function that sleeps, spins, raises; two may wait."""
    return serve("work", WORK, queue=2)


@pytest.fixture
def tokens(serve: Callable[..., Served]) -> Served:
    """A generator."""
    return serve("tokens", TOKENS, {"items": ["a", "b"]})


@pytest.fixture
def public(serve: Callable[..., Served]) -> Served:
    """An Endpoint without a key."""
    return serve("public", SQUARE, {"input": 7.25}, public=True)
