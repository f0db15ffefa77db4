"""What is wrong with the registry or the base image is told before anything is captured; publishing remembers."""

from __future__ import annotations

import dataclasses
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.kubernetes.preflight import SECONDS, Place, preflight, target, unmade
from nbdeploy.engines.kubernetes.publish import publish
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import ConfigError, RegistryError
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.registry import Registry
from nbdeploy.spec import Revision
from tests.oci.servers import Front
from tests.oci.test_image import SOURCE, make_base, make_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbdeploy.bundle import Bundle
    from tests.oci.servers import DockerRegistry

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def alone(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in, no proxy is set, and no settings of this machine count."""
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", environ["HOME"])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def based(front: Front, connect: Callable[..., Registry]) -> ClusterSettings:
    """Settings with which all is well; the base has both platforms."""
    make_base(connect(front.registry.host), PYTHON_VERSION=f"{PYTHON}.9")
    return ClusterSettings(name="cluster", registry=f"{front.host}/team", base_image=f"{front.host}/python:3.11")


def asked(folder: Path, **fields: Any) -> Revision:
    """Return what a deploy of a notebook in this folder asks for."""
    return Revision("iris", 1, "", notebook=str(folder / "a.ipynb"), **fields)


def refusal(settings: ClusterSettings, folder: Path, **fields: Any) -> str:
    """Return what the user is told."""
    with pytest.raises((ConfigError, RegistryError)) as caught:
        preflight(settings, asked(folder, **fields), folder / "home")
    return str(caught.value)


def test_all_is_well(front: Front, based: ClusterSettings, tmp_path: Path) -> None:
    """Three small requests once the base is known, in less than a second, and nothing stays in the registry."""
    preflight(based, asked(tmp_path), tmp_path / "home")
    took = []
    for _ in range(5):  # this machine may be busy for a moment
        front.seen.clear()
        began = time.monotonic()
        preflight(based, asked(tmp_path), tmp_path / "home")
        took.append(time.monotonic() - began)
    assert min(took) < 1.0
    assert [one.method for one in front.seen] == ["HEAD", "POST", "DELETE"]
    assert not list(front.registry.root.rglob("_uploads/*/startedat"))


def test_a_base_elsewhere_is_asked_for_at_the_same_time(
    start: Callable[..., DockerRegistry], front: Front, based: ClusterSettings, tmp_path: Path
) -> None:
    """Of two registries neither waits for the other."""
    elsewhere = Front(start())
    both = threading.Barrier(2)

    def wait(handler: Any) -> bool:
        both.wait(30)
        return False

    front.fail("HEAD", "/manifests/", wait)
    elsewhere.fail("POST", "/uploads/", wait)
    preflight(dataclasses.replace(based, registry=f"{elsewhere.host}/team"), asked(tmp_path), tmp_path / "home")
    assert not both.broken
    assert elsewhere.asked("DELETE")
    elsewhere.close()


@pytest.mark.usefixtures("unknown_names")
def test_nothing_answers(based: ClusterSettings, tmp_path: Path) -> None:
    """A port where nobody listens and a name that nobody has: told with the setting and the file that has it."""
    file = tmp_path / "nbdeploy.toml"
    file.write_text('[engines.cluster]\nkind = "kubernetes"\nregistry = "x"\n', encoding="utf-8")
    said = refusal(dataclasses.replace(based, registry="127.0.0.1:9/team"), tmp_path)
    assert "127.0.0.1:9 refuses connections" in said
    assert said.endswith(f"The registry is '127.0.0.1:9/team': engines.cluster.registry in {file}.")
    said = refusal(dataclasses.replace(based, base_image="nobody.invalid/python:3"), tmp_path)
    assert "no machine is called nobody.invalid" in said
    assert f"engines.cluster.base_image in {file}" in said
    assert "--base-image of this deploy" in refusal(based, tmp_path, base_image="nobody.invalid/python:3")


def test_the_file_that_counts(tmp_path: Path) -> None:
    """The last file that has the engine is named, else the user's."""
    own, user = tmp_path / "nbdeploy.toml", tmp_path / "config" / "nbdeploy" / "config.toml"
    place = Place(ClusterSettings(name="cluster"), tmp_path)
    assert place.file("registry") == str(user)
    user.parent.mkdir(parents=True)
    user.write_text('[engines.cluster]\nkind = "kubernetes"\nregistry = "x"\n', encoding="utf-8")
    assert place.file("registry") == str(user)
    with pytest.raises(ConfigError, match=f"in {user}"):
        target(place, "iris")
    own.write_text('[engines.cluster]\nbase_image = "y"\n', encoding="utf-8")
    assert place.file("base_image") == str(own)
    own.write_text("nonsense", encoding="utf-8")
    assert place.file("registry") == "the settings"


@pytest.mark.slow
def test_a_network_that_is_dead(based: ClusterSettings, tmp_path: Path) -> None:
    """Where connections are neither taken nor refused the deploy waits some seconds, no more."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:  # they fill the queue: the next one gets no answer at all
            caller.setblocking(False)
            caller.connect_ex(address)
        began = time.monotonic()
        said = refusal(dataclasses.replace(based, registry=f"127.0.0.1:{address[1]}/team"), tmp_path)
        assert time.monotonic() - began < 3 * SECONDS  # the push waits 20 s for a connection, and tries again
        for caller in callers:
            caller.close()
    assert "did not answer in 5 s" in said or "was not reached in 5 s" in said
    assert "engines.cluster.registry in" in said


@pytest.mark.slow
def test_slow_is_no_failure(front: Front, based: ClusterSettings, tmp_path: Path) -> None:
    """A registry that takes connections and says nothing yet, or asks to wait, does not fail a deploy here."""
    over = threading.Event()

    def silent(handler: Any) -> bool:
        over.wait(60)
        return bool(handler.answer(500))

    front.fail("POST", "/uploads/", silent)
    began = time.monotonic()
    preflight(based, asked(tmp_path), tmp_path / "home")
    assert time.monotonic() - began < 3 * SECONDS
    over.set()
    front.fail("POST", "/uploads/", lambda handler: handler.answer(429, Retry_After="30"))
    preflight(based, asked(tmp_path), tmp_path / "home")


@pytest.mark.slow
def test_a_server_error_may_pass(front: Front, based: ClusterSettings, tmp_path: Path) -> None:
    """Two 503 are nothing; one after the other until the time is over are told."""
    front.fail("POST", "/uploads/", lambda handler: handler.answer(503), times=2)
    preflight(based, asked(tmp_path), tmp_path / "home")
    front.fail("POST", "/uploads/", lambda handler: handler.answer(503), times=99)
    assert "failed (503) when it was to push to team/iris" in refusal(based, tmp_path)


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "docker login"), (403, "ask its admin for the right"), (404, "Amazon ECR"), (405, "is this a registry")],
)
def test_a_push_that_is_refused(front: Front, based: ClusterSettings, tmp_path: Path, status: int, words: str) -> None:
    """Each refusal is told at once, with the setting."""
    front.fail("POST", "/uploads/", lambda handler: handler.answer(status))
    said = refusal(based, tmp_path)
    assert words in said
    assert f"The registry is '{front.host}/team': engines.cluster.registry in " in said


def test_a_base_that_is_closed_or_unfit(front: Front, based: ClusterSettings, tmp_path: Path) -> None:
    """A base that may not be read may be misspelt; one of another platform or Python is told as that."""
    front.fail("HEAD", "/manifests/", lambda handler: handler.answer(401))
    assert f"is {front.host}/python:3.11 spelt right?" in refusal(based, tmp_path)
    absent = dataclasses.replace(based, base_image=f"{front.host}/pyhton:3.11")
    assert "There is no base image" in refusal(absent, tmp_path)
    assert "It names no image" in refusal(based, tmp_path, base_image="https://x/y")


def test_repositories_that_are_made_first() -> None:
    """For Amazon's registry the command is told, for others there is none to tell."""
    made = unmade(Reference.parse("1.dkr.ecr.eu-west-1.amazonaws.com/team/iris"))
    assert made == "aws ecr create-repository --repository-name team/iris"
    assert unmade(Reference.parse("ghcr.io/team/iris")) == ""


# -- publishing ---------------------------------------------------------------------------------------------------


def published(settings: ClusterSettings, bundle: Bundle, name: str, previous: str = "") -> tuple[str, str]:
    """Publish a Bundle under a name; return its reference and the last words."""
    words: list[str] = []
    revision = Revision(name, 1, bundle.digest)
    image = publish(bundle, revision, settings, previous, lambda text, _data: words.append(text))
    return image, words[-1]


def sent(front: Front) -> int:
    """Return the bytes that went to the registry since it was last looked."""
    size = sum(one.body for one in front.seen)
    front.seen.clear()
    return size


def test_a_second_name_sends_no_weights(
    start: Callable[..., DockerRegistry], front: Front, based: ClusterSettings, tmp_path: Path
) -> None:
    """The same weights under another name are taken over within the registry; another registry never hears of them."""
    bundle = make_bundle(tmp_path / "home")
    published(based, bundle, "iris")
    assert sent(front) > 2_000_000
    published(based, bundle, "tulip")
    assert front.asked("POST", "mount=.*&from=team/iris")
    assert sent(front) < 100_000
    elsewhere = Front(start())
    published(dataclasses.replace(based, registry=f"{elsewhere.host}/team"), bundle, "rose")
    assert not elsewhere.asked("POST", "from=team")
    assert sent(elsewhere) > 2_000_000
    elsewhere.close()


def test_a_stale_note(front: Front, based: ClusterSettings, tmp_path: Path) -> None:
    """Where the noted repository lost the blob it is sent as ever, and the note is mended."""
    bundle = make_bundle(tmp_path / "home")
    published(based, bundle, "iris")
    for link in front.registry.root.glob("docker/registry/v2/repositories/team/iris/_layers/sha256/*/link"):
        link.unlink()
    sent(front)
    published(based, bundle, "tulip")
    assert sent(front) > 2_000_000
    published(based, bundle, "rose")
    assert front.asked("POST", "from=team/tulip")
    assert sent(front) < 100_000


def test_a_redeploy_takes_twelve_requests(
    start: Callable[..., DockerRegistry], connect: Callable[..., Registry], log_in: Callable[..., None], tmp_path: Path
) -> None:
    """Preflight and publishing together, with a login and the base in the same registry; nothing changed: no byte."""
    front = Front(start(htpasswd=True))
    log_in(front.host, front.registry.host)
    make_base(connect(front.registry.host), PYTHON_VERSION=f"{PYTHON}.9")
    settings = ClusterSettings(name="cluster", registry=f"{front.host}/team", base_image=f"{front.host}/python:3.11")
    first = make_bundle(tmp_path / "home")
    preflight(settings, asked(tmp_path), tmp_path / "home")
    image, _ = published(settings, first, "iris")
    sent(front)
    preflight(settings, asked(tmp_path), tmp_path / "home")
    second = make_bundle(tmp_path / "home", SOURCE.replace("weights[7]", "weights[8]"))
    image, words = published(settings, second, "iris", image)
    assert len(front.seen) <= 12
    assert sent(front) < 100_000
    preflight(settings, asked(tmp_path), tmp_path / "home")
    _, words = published(settings, second, "iris", image)
    assert words.startswith("the registry has all")
    assert sent(front) == 0
    front.close()
