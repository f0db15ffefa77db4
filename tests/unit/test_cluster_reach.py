"""Where an Endpoint on a cluster is reached, and forwarders of clusters that do not answer."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.kubernetes import forwarder
from nbdeploy.engines.kubernetes.credentials import Access, environment, fetch
from nbdeploy.engines.kubernetes.reach import Forwarders, address
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.slices import Serving, read
from nbdeploy.engines.kubernetes.state import State
from nbdeploy.errors import EngineError, UsageError
from tests.conftest import DEADLINE, leftovers, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = ClusterSettings(name="gpu", namespace="team")


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    """A kubeconfig of a cluster whose API server is down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{free.getsockname()[1]}"
    file = tmp_path / "kubeconfig"
    content = {
        "clusters": [{"name": "one", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [{"name": "one", "context": {"cluster": "one", "user": "me", "namespace": "team"}}],
        "current-context": "one",
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.fixture
def forwarders(tmp_path: Path, kubeconfig: Path) -> Iterator[Forwarders]:
    """Forwarders that end with the test and leave no process."""
    made = Forwarders(tmp_path / "home", SETTINGS, {**os.environ, "KUBECONFIG": str(kubeconfig)})
    yield made
    for folder in (tmp_path / "home" / "clusters" / "gpu").glob("*/"):
        made.stop(folder.name)
    wait_until(lambda: not leftovers(tmp_path))


def ask(url: str) -> tuple[int, dict[str, Any]]:
    """Return status and problem of a GET."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=DEADLINE)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def told(url: str) -> tuple[int, dict[str, Any]]:
    """Ask until there is an answer on what is asked: a busy machine may need longer than one connection waits."""
    found: tuple[int, dict[str, Any]] = wait_until(
        lambda: "not answered yet" not in (answer := ask(url))[1]["detail"] and answer
    )
    return found


def refuses(url: str) -> bool:
    """Whether nobody listens there."""
    try:
        host, _, port = url.removeprefix("http://").partition(":")
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    ("settings", "in_cluster", "url"),
    [
        (ClusterSettings(), True, "http://nbd-spam.team.svc"),
        (ClusterSettings(), False, ""),
        (ClusterSettings(host="models.example.com"), False, ""),
        (ClusterSettings(gateway="web", host="models.example.com"), False, "http://spam.models.example.com"),
        (ClusterSettings(gateway="web", host="https://models.example.com"), False, "https://spam.models.example.com"),
        (ClusterSettings(gateway="web", host="ml-{name}.example.com"), False, "http://ml-spam.example.com"),
        (
            ClusterSettings(ingress_class="nginx", host="x.example.com", tls_secret="tls"),
            False,
            "https://spam.x.example.com",
        ),
        (ClusterSettings(gateway="web", host="models.example.com"), True, "http://nbd-spam.team.svc"),
    ],
)
def test_address(settings: ClusterSettings, in_cluster: bool, url: str) -> None:  # noqa: FBT001 - a parameter of the test
    """Inside the Service's name, outside what is configured, else a forwarder's."""
    assert address("spam", settings, in_cluster=in_cluster, namespace="team") == url


def test_what_slices_say() -> None:
    """Ready pods serve, unknown counts as ready; dying pods are known, but neither ready nor about to be."""
    assert read([]) == Serving()
    assert read([{"endpoints": None}]) == Serving(exists=True)

    def endpoint(pod: str, **conditions: bool) -> dict[str, Any]:
        return {"targetRef": {"kind": "Pod", "name": pod}, "conditions": conditions}

    slices = [
        {"endpoints": [endpoint("b", ready=True), endpoint("a"), {"addresses": ["10.0.0.1"]}]},
        {"endpoints": [endpoint("c", ready=False), endpoint("d", ready=False, terminating=True)]},
    ]
    assert read(slices) == Serving(("a", "b"), ("c",), frozenset("abcd"), exists=True)


def test_only_what_logging_in_needs_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables of clusters and clouds, the kubeconfig's path made absolute; nothing else of the kernel's."""
    monkeypatch.chdir(tmp_path)
    found = environment({"KUBECONFIG": "a:/b:", "AWS_PROFILE": "x", "OPENAI_API_KEY": "secret", "PYTHONPATH": "/"})
    assert found == {"KUBECONFIG": f"{tmp_path}/a:/b", "AWS_PROFILE": "x"}


def test_plain_http_needs_no_certificates() -> None:
    """An API server behind `kubectl proxy`."""
    assert Access("http://127.0.0.1:8001").tls() is None
    assert Access("https://cluster:6443").tls() is not None


def test_a_large_certificate_file(kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of certificates larger than a pipe holds is read whole by the process that logs in."""
    bundle = tmp_path / "ca.crt"
    bundle.write_text("".join(f"# certificate {number}\n" for number in range(20_000)), encoding="ascii")
    content = json.loads(kubeconfig.read_text(encoding="utf-8"))
    content["clusters"][0]["cluster"] = {"server": "https://127.0.0.1:1", "certificate-authority": str(bundle)}
    large = tmp_path / "large"
    large.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(large))
    access = asyncio.run(fetch("cluster", None))
    assert "certificate 19999" in json.dumps(dataclasses.asdict(access))


def test_asking_for_the_url_starts_nothing(forwarders: Forwarders, tmp_path: Path) -> None:
    """There is none before the first start; afterwards it stays, whether the forwarder runs or not."""
    assert forwarders.url("spam") == ""
    assert not (tmp_path / "home").exists()
    url = forwarders.ensure("spam", "team")
    assert forwarders.url("spam") == url
    assert forwarders.alive("spam")
    assert forwarders.stop("spam")
    assert not forwarders.stop("spam")
    assert forwarders.url("spam") == url
    assert not forwarders.alive("spam")
    assert refuses(url)
    assert forwarders.ensure("spam", "team") == url
    forwarders.forget("spam")
    assert forwarders.url("spam") == ""
    assert [path.name for path in (tmp_path / "home" / "clusters" / "gpu").iterdir()] == [".lock"]


def test_state_is_for_its_owner_alone(forwarders: Forwarders, tmp_path: Path) -> None:
    """Folders 0700, the record 0600; nothing of the credentials is in them."""
    forwarders.ensure("spam", "team")
    folder = tmp_path / "home" / "clusters" / "gpu" / "spam"
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])} == {0o700}
    assert (folder / "forwarder.json").stat().st_mode & 0o777 == 0o600
    assert "secret" not in "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())


def test_an_api_server_that_is_down_is_told_in_words(forwarders: Forwarders, kubeconfig: Path) -> None:
    """The connection is answered, with the server's address and the cause."""
    status, problem = told(forwarders.ensure("spam", "team"))
    assert status == 503
    assert problem["detail"].startswith("The cluster cannot be asked: http://127.0.0.1:")
    assert problem["detail"].endswith("`nbdeploy status spam` tells more.")


def test_a_login_that_lasts(kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection waits for as long as the login lasts; from then on the API server has its own time to answer."""
    program, began, go = tmp_path / "cloud-login", tmp_path / "began", tmp_path / "go"
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "status": {"token": "t"}}
    program.write_text(
        f"#!{sys.executable}\nimport time\nfrom pathlib import Path\nPath({str(began)!r}).touch()\n"
        f"while not Path({str(go)!r}).exists():\n    time.sleep(0.01)\nprint({json.dumps(answer)!r})\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    content = json.loads(kubeconfig.read_text(encoding="utf-8"))
    logs_in = {"apiVersion": answer["apiVersion"], "command": str(program), "interactiveMode": "Never"}
    content["users"] = [{"name": "me", "user": {"exec": logs_in}}]
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr(forwarder, "FIRST", 0.5)

    async def call(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        found = await reader.read()
        writer.close()
        return found

    async def wait() -> tuple[bool, float, bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        target = {"context": None, "namespace": "team", "service": "nbd-spam", "port": 8080}
        argument = {"home": str(tmp_path / "home"), "engine": "gpu", "name": "spam", **target}
        one = forwarder.Forwarder({**argument, "fd": listener.detach()})
        async with await asyncio.start_server(one._accept, sock=one._listener):
            following = asyncio.create_task(one._slices.run())
            asked = asyncio.create_task(call(one._listener.getsockname()[1]))
            await asyncio.to_thread(wait_until, began.exists)
            await asyncio.wait({asked}, timeout=3 * forwarder.FIRST)
            soon, since = asked.done(), time.monotonic()
            go.touch()
            found = await asked
            following.cancel()
            return soon, time.monotonic() - since, found

    with socket.create_server(("127.0.0.1", 0)) as silent:
        content["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kubeconfig.write_text(json.dumps(content), encoding="utf-8")
        soon, took, found = asyncio.run(wait())
    assert not soon
    assert took >= forwarder.FIRST
    assert b"has not answered yet" in found


def test_a_kubeconfig_that_is_gone_is_told_in_words(forwarders: Forwarders, kubeconfig: Path) -> None:
    """The forwarder stays, and says what is missing."""
    kubeconfig.unlink()
    status, problem = told(forwarders.ensure("spam", "team"))
    assert status == 502
    assert f"There is no kubeconfig: {kubeconfig} is missing" in problem["detail"]


def test_a_killed_forwarder_comes_back_on_its_port(forwarders: Forwarders, tmp_path: Path) -> None:
    """Whoever asks next starts it; the URL in the notebook stays good."""
    url = forwarders.ensure("spam", "team")
    first = State(tmp_path / "home", "gpu").forwarder("spam")
    assert first is not None
    first.signal(signal.SIGKILL)
    wait_until(lambda: not forwarders.alive("spam"))
    assert forwarders.ensure("spam", "team") == url
    second = State(tmp_path / "home", "gpu").forwarder("spam")
    assert second is not None
    assert second.pid != first.pid


def test_many_who_ask_at_once_get_one_process(forwarders: Forwarders, tmp_path: Path, kubeconfig: Path) -> None:
    """One forwarder is started, and all get its URL."""
    start = threading.Barrier(6)

    def one(_number: int) -> str:
        mine = Forwarders(tmp_path / "home", SETTINGS, {**os.environ, "KUBECONFIG": str(kubeconfig)})
        start.wait()
        return mine.ensure("spam", "team")

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(one, range(6)))) == 1
    state = State(tmp_path / "home", "gpu")
    running = {line.split()[0] for line in leftovers(tmp_path)}
    identity = state.forwarder("spam")
    assert identity is not None
    assert str(identity.pid) in running
    assert len(running) <= 2  # the forwarder, and for a moment the process that reads the kubeconfig


def test_ports(forwarders: Forwarders) -> None:
    """A fixed port is kept or refused in words; a remembered one that is taken gives way to another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"Port {port} of this machine is taken .*--port"):
            forwarders.ensure("spam", "team", port=port)
    assert forwarders.ensure("spam", "team", port=port) == f"http://127.0.0.1:{port}"
    forwarders.stop("spam")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert forwarders.ensure("spam", "team") not in {"", f"http://127.0.0.1:{port}"}


def test_another_target_takes_another_process(forwarders: Forwarders, tmp_path: Path) -> None:
    """An engine that was pointed at another namespace is not served from the old one; the URL stays."""
    url = forwarders.ensure("spam", "team")
    state = State(tmp_path / "home", "gpu")
    first = state.forwarder("spam")
    assert forwarders.ensure("spam", "other") == url
    assert state.forwarder("spam") != first
    assert first is not None
    assert not first.alive()


def test_a_forwarder_whose_folder_is_removed_ends(forwarders: Forwarders, tmp_path: Path) -> None:
    """`rm -r` of the home leaves no process."""
    forwarders.ensure("spam", "team")
    State(tmp_path / "home", "gpu").remove("spam")
    wait_until(lambda: not leftovers(tmp_path))


@pytest.mark.parametrize("name", ["", "..", "a/b", "Spam"])
def test_names_are_no_paths(forwarders: Forwarders, name: str) -> None:
    """What is no Endpoint's name touches no file."""
    with pytest.raises(UsageError):
        forwarders.url(name)
    with pytest.raises(UsageError):
        Forwarders(Path("/nowhere"), ClusterSettings(name="../x"))
