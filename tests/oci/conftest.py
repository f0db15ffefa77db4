"""Registries for the tests of nbdeploy.oci, each on a port and in a folder of its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nbdeploy.oci.registry import Registry
from tests.oci.servers import PASSWORD, USER, Certificate, DockerRegistry, Front, TokenServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def programs() -> None:
    """Skip where there is no registry to talk to; in CI that is a failure."""
    missing = [name for name in ("docker-registry", "skopeo", "openssl") if shutil.which(name) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{', '.join(missing)} must be installed in CI")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment without proxies and with nobody logged in."""
    home = tmp_path / "user"
    home.mkdir()
    return {"HOME": str(home), "PATH": os.environ["PATH"]}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., DockerRegistry]]:
    """Start registries; all end with the test."""
    running: list[DockerRegistry] = []

    def begin(**options: object) -> DockerRegistry:
        running.append(DockerRegistry(tmp_path / f"registry{len(running)}", **options))  # type: ignore[arg-type]
        return running[-1]

    yield begin
    for one in running:
        one.stop()


@pytest.fixture
def registry(start: Callable[..., DockerRegistry]) -> DockerRegistry:
    """A registry that lets everybody push."""
    return start()


@pytest.fixture
def front(registry: DockerRegistry) -> Iterator[Front]:
    """A front before that registry."""
    made = Front(registry)
    yield made
    made.close()


@pytest.fixture
def connect(environ: dict[str, str]) -> Iterator[Callable[..., Registry]]:
    """Make clients that do not wait long between tries."""
    made: list[Registry] = []

    def of(host: str, **more: str) -> Registry:
        made.append(Registry(host, environ={**environ, **more}, delay=0.01))
        return made[-1]

    yield of
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A self-signed certificate."""
    return Certificate.make(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def token_server(certificate: Certificate) -> Iterator[TokenServer]:
    """A server of tokens."""
    with TokenServer(certificate) as server:
        yield server


@pytest.fixture
def log_in(environ: dict[str, str]) -> Callable[..., None]:
    """Do what `docker login` does for hosts."""

    def write(*hosts: str, **entry: str) -> None:
        entry = entry or {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
        folder = Path(environ["HOME"]) / ".docker"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"auths": dict.fromkeys(hosts, entry)}), encoding="utf-8")

    return write
