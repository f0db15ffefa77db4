"""The ways in from outside, HTTPRoute and Ingress, as a real API server takes, keeps and drops them.

No Gateway or Ingress controller runs on the test cluster: the objects are tested, not what one makes of them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.base import get_engine
from nbdeploy.engines.kubernetes.role import needed, role_yaml
from nbdeploy.engines.kubernetes.workload import object_name
from nbdeploy.errors import EngineError
from tests.conftest import wait_until
from tests.engines.conftest import ADD, House, house_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cluster.running import Cluster, Namespace

GATEWAY = {"gateway": "infra/web", "host": "https://models.example.com"}
INGRESS = {"ingress_class": "nginx", "host": "{name}.models.example.com", "tls_secret": "cert"}
ROUTES = "httproutes.gateway.networking.k8s.io"
INGRESSES = "ingresses.networking.k8s.io"


@pytest.fixture
def place(gateway_api: Cluster, namespace: Namespace) -> Namespace:
    """A namespace with the Role that nbdeploy prints where settings name a Gateway or an Ingress."""
    rules = needed(outside=True, gateway=True, ingress=True)
    gateway_api.kubectl("apply", "-f", "-", input=role_yaml(namespace.name, rules, subject=namespace.user))
    return namespace


@pytest.fixture
def house(place: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """An engine in that namespace."""
    for key, value in place.environ().items():
        monkeypatch.setenv(key, value)
    yield from house_of("kubernetes", tmp_path / "home", settings_of(place))


def settings_of(place: Namespace, **more: Any) -> dict[str, Any]:
    """Return what an engine of this namespace is made with."""
    return {
        "namespace": place.name,
        "registry": f"{place.cluster.registry}/{place.name}",
        "base_image": place.cluster.base_image,
        "drain": 1.0,
        **more,
    }


def switch(house: House, place: Namespace, **more: str) -> None:
    """Give the house an engine of other settings."""
    house.engine = get_engine("kubernetes", house.home, settings_of(place, **more))


def there(place: Namespace, kind: str) -> list[dict[str, Any]]:
    """Return all objects of a kind in the namespace."""
    found: list[dict[str, Any]] = place.cluster.get("-n", place.name, kind)["items"]
    return found


def test_a_way_in_comes_and_goes_with_the_settings(house: House, place: Namespace) -> None:
    """A Gateway's route, then an Ingress, then neither: a deploy leaves what its settings say, delete nothing."""
    name = house.name()
    switch(house, place, **GATEWAY)
    made = house.apply(name, ADD, {"x": 1})
    assert made.url == house.engine.reach(name) == f"https://{name}.models.example.com"
    [route] = there(place, ROUTES)
    assert route["spec"]["hostnames"] == [f"{name}.models.example.com"]
    assert route["spec"]["parentRefs"][0]["namespace"] == "infra"
    [rule] = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}
    backend = rule["backendRefs"][0]
    service = place.cluster.get("-n", place.name, "service", object_name(name))
    assert (backend["name"], backend["port"]) == (object_name(name), service["spec"]["ports"][0]["port"])
    assert route["metadata"]["ownerReferences"][0]["name"] == object_name(name)
    house.apply(name, ADD, {"x": 1})
    assert [one["metadata"]["uid"] for one in there(place, ROUTES)] == [route["metadata"]["uid"]]

    switch(house, place, **INGRESS)
    assert house.apply(name, ADD, {"x": 1}).url == f"https://{name}.models.example.com"
    [ingress] = there(place, INGRESSES)
    assert ingress["spec"]["tls"] == [{"hosts": [f"{name}.models.example.com"], "secretName": "cert"}]
    assert there(place, ROUTES) == []

    switch(house, place)
    assert house.apply(name, ADD, {"x": 1}).url.startswith("http://127.0.0.1:")
    assert there(place, INGRESSES) == there(place, ROUTES) == []
    assert house.ask(name, x=1) == 2

    switch(house, place, **GATEWAY)
    house.apply(name, ADD, {"x": 1})
    assert len(there(place, ROUTES)) == 1
    house.engine.delete(name)
    assert there(place, ROUTES) == there(place, "deployments") == []


def test_the_schema_is_in_force(house: House, place: Namespace) -> None:
    """The API server knows what an HTTPRoute may hold: a host name that is none fails the deploy, and nothing stays."""
    name = house.name()
    switch(house, place, gateway="infra/web", host="under_score.example.com")
    with pytest.raises(EngineError, match="hostnames"):
        house.apply(name, ADD, {"x": 1})
    assert house.engine.list() == []
    assert there(place, ROUTES) == []


def test_without_the_right_to_routes(house: House, place: Namespace) -> None:
    """Without a right to routes a Gateway in the settings is refused before anything is made; without one all works."""
    text = role_yaml(place.name, needed(outside=True), subject=place.user)
    place.cluster.kubectl("apply", "-f", "-", input=text)
    name = house.name()
    revision = house.revision(name, house.bundle(ADD, {"x": 1}))
    switch(house, place, **GATEWAY)

    def refused() -> str:  # the API server hears of a Role a moment later
        try:
            house.engine.check(revision)
        except EngineError as error:
            return str(error)
        return ""

    assert json.dumps(["httproutes"]) in wait_until(refused)
    switch(house, place)
    house.apply(name, ADD, {"x": 1})
    assert house.ask(name, x=1) == 2
