"""Endpoint: found by name or URL, called like the function, changed, pickled, deleted."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest

import nbdeploy
from nbdeploy.deploying import deploy
from nbdeploy.endpoint import Endpoint, connect, endpoints, summed
from nbdeploy.errors import EndpointNotFoundError, EngineError, RemoteError, UsageError
from nbdeploy.spec import Serving, Status
from tests.conftest import leftovers, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def predict_of(source: str) -> Any:
    """Return `predict` of a cell."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(source), "<cell>", "exec"), namespace)  # noqa: S102 - the cell is the test's own
    return namespace["predict"]


ECHO = """
    import time
    def predict(name: str, self: int = 0, seconds: float = 0.0) -> str:
        time.sleep(seconds)
        if name == 'bad':
            raise ValueError('no such name')
        return f'hello {name} {self}'
    """
COUNT = "def predict(n: int):\n    for i in range(n):\n        yield i\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with two Endpoints, `echo` and `count`, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("endpoint") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBDEPLOY_HOME", str(folder))
        patch.setenv("XDG_CONFIG_HOME", str(folder.parent / "config"))
        patch.delenv("NBDEPLOY_KEY", raising=False)
        deploy(predict_of(ECHO), name="echo", sample={"name": "ada"}, verify=False, serving=Serving(queue=1))
        deploy(predict_of(COUNT), name="count", sample={"n": 3}, verify=False)
        yield folder
        for endpoint in endpoints():
            endpoint.delete()
        wait_until(lambda: not leftovers(folder))


@pytest.fixture
def echo(place: Path) -> Endpoint:
    """The Endpoint `echo`, found by its name."""
    return connect("echo")


def test_connect_by_name(echo: Endpoint) -> None:
    """The name is enough; the Endpoint knows where it is, what serves, and shows itself."""
    assert echo(name="ada") == "hello ada 0"
    assert (echo.name, echo.engine, echo.revision) == ("echo", "local", 1)
    assert echo.url.startswith("http://127.0.0.1:")
    assert "echo" in repr(echo)
    assert "local" in repr(echo)
    assert connect("echo", engine="local")(name="b") == "hello b 0"


def test_any_parameter_name(echo: Endpoint) -> None:
    """A parameter may be called `name` or `self`: the Endpoint takes no name away."""
    assert echo(name="x", self=5) == "hello x 5"


def test_connect_by_url(echo: Endpoint) -> None:
    """A URL and a key are enough for calls; what needs the engine says so."""
    key = nbdeploy.endpoint.engine_named("local").key("echo")  # type: ignore[attr-defined] # the local engine has keys
    there = connect(url=echo.url, key=key)
    assert there(name="ada") == "hello ada 0"
    assert there.map([{"name": "a"}, {"name": "b"}]) == ["hello a 0", "hello b 0"]
    for act in (there.status, there.logs, there.delete, there.history):
        with pytest.raises(UsageError, match="connected by URL"):
            act()
    with pytest.raises(RemoteError, match="key") as caught:
        connect(url=echo.url, key="wrong")(name="x")
    assert caught.value.status == 401


def test_wrong_uses_of_connect(place: Path) -> None:
    """A wrong name offers the nearest; neither or both of name and URL is explained."""
    with pytest.raises(EndpointNotFoundError, match="Did you mean 'echo'"):
        connect("ehco")
    with pytest.raises(UsageError, match=r'connect\("sentiment"\)'):
        connect()
    with pytest.raises(UsageError, match="name"):
        connect("echo", url="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="no engine 'mars'"):
        connect("echo", engine="mars")


def test_endpoints(place: Path) -> None:
    """All Endpoints are listed, each ready to be called."""
    assert [one.name for one in endpoints()] == ["count", "echo"]
    assert endpoints("local")[1](name="x") == "hello x 0"


def test_an_engine_that_is_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that name an engine of another installation do not hide the Endpoints of this machine."""
    config = place.parent / "with-engine" / "nbdeploy"
    config.mkdir(parents=True, exist_ok=True)
    (config / "config.toml").write_text('[engines.far]\nkind = "kubernetes"\n', encoding="utf-8")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config.parent))
    monkeypatch.setenv("KUBECONFIG", str(place / "none"))
    with pytest.warns(UserWarning, match="The engine far did not answer"):
        assert {one.name for one in endpoints()} >= {"count", "echo"}
    assert connect("echo")(name="x") == "hello x 0"


PICKLED = """
import pickle, sys
endpoint = pickle.load(sys.stdin.buffer)
print(endpoint(name="there"), endpoint.map([{"name": "a"}]))
"""


def test_a_pickled_endpoint(echo: Endpoint, tmp_path: Path) -> None:
    """Another process, with another home, calls it all the same: URL and key travel."""
    echo(name="warm")  # a live connection must not hinder the pickle
    data = pickle.dumps(echo)
    done = subprocess.run(
        [sys.executable, "-c", PICKLED],
        input=data,
        capture_output=True,
        check=True,
        env={**os.environ, "NBDEPLOY_HOME": str(tmp_path / "other")},
    )
    assert done.stdout.decode().split("\n")[0] == "hello there 0 ['hello a 0']"
    assert pickle.loads(data)(name="here") == "hello here 0"


def test_an_endpoint_inside_another_predict(echo: Endpoint) -> None:
    """A captured Endpoint works where the Replica runs."""
    outer = predict_of("def predict(name: str) -> str:\n    return inner(name=name).upper()\n")
    outer.__globals__["inner"] = echo
    endpoint = deploy(outer, name="outer", sample={"name": "x"})
    assert endpoint(name="ada") == "HELLO ADA 0"
    endpoint.delete()


def test_map_keeps_order_and_waits(echo: Endpoint) -> None:
    """More calls at once than the queue takes: all are answered, in order."""
    items = [{"name": str(n), "seconds": 0.02} for n in range(24)]
    assert echo.map(items, concurrency=12) == [f"hello {n} 0" for n in range(24)]
    assert echo.map([]) == []
    assert echo.map({"name": str(n)} for n in range(3)) == ["hello 0 0", "hello 1 0", "hello 2 0"]


def test_call_async(echo: Endpoint) -> None:
    """Awaited calls run together and fail as others do."""

    async def both() -> list[Any]:
        return list(await asyncio.gather(echo.call_async(name="a"), echo.call_async(name="b")))

    assert asyncio.run(both()) == ["hello a 0", "hello b 0"]
    with pytest.raises(RemoteError, match="no such name"):
        asyncio.run(echo.call_async(name="bad"))


def test_stream(place: Path) -> None:
    """A generator's items come one by one; a plain call gives the list."""
    count = connect("count")
    assert list(count.stream(n=4)) == [0, 1, 2, 3]
    assert count(n=3) == [0, 1, 2]
    items = count.stream(n=1000)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined] # a generator
    assert count(n=1) == [0]


def test_remote_errors(echo: Endpoint) -> None:
    """What predict raises comes with its type; a wrong argument names the parameter."""
    with pytest.raises(RemoteError, match="no such name") as caught:
        echo(name="bad")
    assert caught.value.remote_type == "ValueError"
    with pytest.raises(RemoteError, match="name"):
        echo(nam="x")


def test_metrics_and_logs(echo: Endpoint) -> None:
    """Metrics are sums over Replicas; logs are text."""
    echo(name="x")
    found = wait_until(echo.metrics)  # a Replica that is too busy to answer in time is left out
    assert found['nbdeploy_requests_total{code="200"}'] >= 1
    assert found["nbdeploy_request_seconds_count"] >= 1
    assert not any("_bucket" in name for name in found)
    assert isinstance(echo.logs(), str)


def test_receipt(echo: Endpoint) -> None:
    """The card of the last deploy is kept as data."""
    card = echo.receipt()
    assert (card["name"], card["revision"], card["url"]) == ("echo", 1, echo.url)


def test_summed() -> None:
    """Counters add up; times of day and lags are the largest."""
    text = 'a_total{{code="200"}} {0}\nnbdeploy_last_request_timestamp_seconds {0}\nh_bucket{{le="1"}} 3\n'
    found = summed({"one": text.format(2), "two": text.format(5)})
    assert found == {'a_total{code="200"}': 7.0, "nbdeploy_last_request_timestamp_seconds": 5.0}
    assert summed({}) == {}


# -- changes ----------------------------------------------------------------------------------------------------------


def test_the_life_of_an_endpoint(home: Path) -> None:
    """Scale, update, rollback, stop, start and delete, through one handle that goes on working."""
    first = predict_of("def predict(x: int) -> str:\n    return 'first'\n")
    second = predict_of("def predict(x: int) -> str:\n    return 'second'\n")
    endpoint = deploy(first, name="life", verify=False)
    assert endpoint.scale(min_replicas=2).ready == 2  # a fixed number stays a fixed number
    assert endpoint.revision == 2
    with pytest.raises(UsageError, match="--max"):
        endpoint.scale(min_replicas=3, max_replicas=2)
    with pytest.raises(UsageError, match="fixed number"):
        endpoint.scale(min_replicas=0, max_replicas=8)
    with pytest.raises(UsageError, match="no earlier Revision"):
        endpoint.rollback()
    deploy(second, name="life", verify=False)
    assert endpoint(x=1) == "second"
    status = endpoint.rollback()
    assert (endpoint(x=1), status.revision) == ("first", 4)
    assert endpoint.rollback(3).revision == 5
    assert endpoint(x=1) == "second"
    with pytest.raises(UsageError, match="no Revision 77; kept are 1, 2, 3, 4, 5"):
        endpoint.rollback(77)
    assert endpoint.stop().phase == "idle"
    with pytest.raises(RemoteError, match="nbdeploy start"):
        connect(url=endpoint.url, timeout=0.2)(x=1)
    assert endpoint.start().phase == "ready"
    assert endpoint(x=1) == "second"
    assert [one.stopped for one in endpoint.history()] == [False] * 5 + [True, False]
    endpoint.delete()
    for act in (endpoint.status, endpoint.delete, endpoint.stop, endpoint.history):
        with pytest.raises(EndpointNotFoundError):
            act()


def test_a_deploy_that_nobody_waited_for(home: Path) -> None:
    """wait=False gives a handle at once; it has a URL as soon as the deploy has one."""
    endpoint = deploy(predict_of("def predict(x: int) -> int:\n    return x\n"), name="later", wait=False)
    assert endpoint.url == ""
    with pytest.raises((EndpointNotFoundError, EngineError)):
        endpoint(x=1)

    def ready() -> Status | None:
        try:
            return endpoint.status() if endpoint.status().phase == "ready" else None
        except EndpointNotFoundError:
            return None

    status = wait_until(ready)
    assert endpoint(x=1) == 1
    assert endpoint.url == status.url


def test_delete_while_a_deploy_runs(home: Path) -> None:
    """Delete ends the deploy under way, a first one too, and leaves nothing."""
    slow = predict_of(f"""
        import os, time
        def predict(x: int) -> int:
            if os.getpid() != {os.getpid()}:
                time.sleep(60)
            return x
        """)
    endpoint = deploy(slow, name="gone", sample={"x": 1}, wait=False)
    wait_until(lambda: len(leftovers(home)) >= 2)  # the worker and its clean process
    endpoint.delete()
    wait_until(lambda: not leftovers(home))
    with pytest.raises(EndpointNotFoundError):
        endpoint.delete()
    quick = predict_of("def predict(x: int) -> int:\n    return x\n")
    endpoint = deploy(quick, name="gone", verify=False)
    deploy(slow, name="gone", sample={"x": 1}, wait=False)
    endpoint.delete()
    wait_until(lambda: not leftovers(home))
    assert endpoints() == []


def test_calls_from_many_threads(echo: Endpoint) -> None:
    """One handle serves several threads."""
    results: list[str] = []
    threads = [threading.Thread(target=lambda n=n: results.extend(echo.map([{"name": str(n)}]))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [f"hello {n} 0" for n in range(8)]


def test_values_without_a_name_go_by_place(home: Path) -> None:
    """`endpoint(2, 3)` works as the function itself would; too many values are told with the names."""
    predict = predict_of("def predict(x: int, y: int = 10) -> int:\n    return x * y\n")
    endpoint = deploy(predict, name="places", verify=False)
    assert endpoint(2) == 20
    assert endpoint(2, 3) == endpoint(2, y=3) == 6
    with pytest.raises(UsageError, match=r"takes x, y\. Name them: endpoint\(x=…, y=…\)"):
        endpoint(1, 2, 3)
