from __future__ import annotations

import base64
import dataclasses
import json
import re
from typing import Any

import kubernetes_validate
import pytest
from nbdeploy_server import listening

from nbdeploy.engines.kubernetes.manifests import (
    Workload,
    environment_secret,
    external_url,
    key_secret,
    memory_request,
    object_name,
    objects,
    secrets_object,
)
from nbdeploy.engines.kubernetes.record import Kept, Record, root
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import label_value
from nbdeploy.errors import ConfigError
from nbdeploy.spec import Resources, Revision, Serving

VERSIONS = [f"1.{minor}" for minor in range(31, 38)]
UID = "5d1b5a4e-0000-4000-8000-000000000000"
IMAGE = "r.test/team/sentiment@sha256:" + "0" * 64
PLAIN = Workload("sentiment", "models", 3, IMAGE, UID, owner="Ada Lovelace <ada@x>", notebook="/home/ada/a b.ipynb")
GPU = dataclasses.replace(
    PLAIN,
    resources=Resources(2.5, "8Gi", 2, "NVIDIA-L4", spot=True),
    settings=ClusterSettings(
        node_selector={"pool": "gpu"}, tolerations=({"key": "team", "operator": "Exists"},), image_pull_secret="pull"
    ),
    secrets=("TOKEN",),
    secrets_object="nbd-sentiment-env-0",
    foreign_secrets={"DB": ("team-db", "password")},
    variables={"MODE": "a$(b)"},
    from_namespaces=("apps", "jobs"),
    replicas=None,
)
GATEWAY = dataclasses.replace(PLAIN, settings=ClusterSettings(gateway="gw-system/public", host="models.test"))
INGRESS = dataclasses.replace(
    PLAIN, settings=ClusterSettings(ingress_class="nginx", host="https://{name}.models.test:8443", tls_secret="cert")
)
LONG = dataclasses.replace(PLAIN, name="a" * 63, owner="数据科学家")
WORKLOADS = {"plain": PLAIN, "gpu": GPU, "gateway": GATEWAY, "ingress": INGRESS, "long": LONG}


def of_kind(workload: Workload, kind: str) -> dict[str, Any]:
    """Return the one object of a kind."""
    (found,) = (one for one in objects(workload) if one["kind"] == kind)
    return found


def template(workload: Workload) -> dict[str, Any]:
    """Return the pod template."""
    found: dict[str, Any] = of_kind(workload, "Deployment")["spec"]["template"]
    return found


def everything(workload: Workload) -> list[dict[str, Any]]:
    """Return all objects of an Endpoint, Secrets and root included."""
    kept = Kept(Revision(workload.name, 3, "sha256:0", owner=workload.owner), workload.image)
    record = Record(workload.name).with_revision(kept).committed(3)
    where = (workload.name, workload.namespace, workload.uid)
    return [
        root(record, workload.namespace),
        key_secret(*where, "key", owner=workload.owner),
        environment_secret(*where, {"TOKEN": "t"}, "key", owner=workload.owner),
        *objects(workload),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_valid_for_every_supported_kubernetes(version: str) -> None:
    """Every object is valid, strictly, in the schemas of Kubernetes 1.31 to 1.37."""
    for workload in WORKLOADS.values():
        for one in everything(workload):
            if one["kind"] != "HTTPRoute":  # not a part of Kubernetes
                kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_names_labels_and_owner(workload: Workload) -> None:
    """Names and labels are legal whatever the Endpoint and its owner are called, and the root owns the rest."""
    first, *others = everything(workload)
    assert first["kind"] == "ConfigMap"
    for one in (first, *others):
        metadata = one["metadata"]
        assert metadata["namespace"] == "models"
        assert metadata["name"].startswith(object_name(workload.name))
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "nbdeploy"
        assert metadata["labels"]["nbdeploy.dev/endpoint"] == workload.name
        for value in metadata["labels"].values():
            assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value), value
    for one in others:
        (owner,) = one["metadata"]["ownerReferences"]
        assert owner["name"] == first["metadata"]["name"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (UID, False, False)


def test_object_names() -> None:
    """Object names are DNS labels, the Endpoint's own where there is room, and different for different Endpoints."""
    assert object_name("sentiment") == "nbd-sentiment"
    longs = {object_name("a" * n) for n in range(58, 64)} | {object_name("a" * 59 + "bcd" + c) for c in "xyz"}
    assert len(longs) == 9
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,61}[a-z0-9]", name) for name in longs)
    assert label_value("Ada Lovelace <ada@x>") == "Ada-Lovelace-ada-x"
    assert label_value("..") == ""


def test_the_deployment_comes_last() -> None:
    """What pods need is there before them, and nothing is made that the settings do not ask for."""
    assert [one["kind"] for one in objects(PLAIN)] == [
        "ServiceAccount",
        "Service",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Deployment",
    ]
    assert "HTTPRoute" in {one["kind"] for one in objects(GATEWAY)}
    assert "Ingress" in {one["kind"] for one in objects(INGRESS)}


def test_roll_out_without_a_gap() -> None:
    """A new Replica is there before an old one goes, unless replaced in place; another may own the number."""
    spec = of_kind(PLAIN, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert (spec["replicas"], spec["progressDeadlineSeconds"], spec["revisionHistoryLimit"]) == (1, 1800, 5)
    in_place = of_kind(dataclasses.replace(PLAIN, in_place=True), "Deployment")["spec"]
    assert in_place["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "replicas" not in of_kind(GPU, "Deployment")["spec"]


@pytest.mark.parametrize(
    "change", [{"replicas": 7}, {"replicas": None}, {"in_place": True}, {"from_namespaces": ("a",)}]
)
def test_what_restarts_no_replica(change: dict[str, Any]) -> None:
    """The number of Replicas and what is around them leave the pod template as it is."""
    assert template(dataclasses.replace(PLAIN, **change)) == template(PLAIN)


@pytest.mark.parametrize(
    "change",
    [
        {"image": IMAGE.replace("0", "1")},
        {"number": 4},
        {"serving": Serving(timeout=5)},
        {"serving": Serving(queue=1)},
        {"serving": Serving(cors=("https://a.test",))},
        {"resources": Resources(memory="3Gi")},
        {"memory": 3 << 30},
        {"variables": {"A": "1"}},
        {"secrets": ("A",), "secrets_object": "nbd-sentiment-env-1"},
        {"key_sha256": "0" * 64},
        {"settings": ClusterSettings(node_selector={"a": "b"})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_restarts_replicas(change: dict[str, Any]) -> None:
    """Whatever a Replica must see changes the pod template."""
    assert template(dataclasses.replace(PLAIN, **change)) != template(PLAIN)


def test_restricted_and_read_only() -> None:
    """Pods are made for Pod Security `restricted`, with a root that cannot be written, and no token."""
    spec = template(PLAIN)["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["shareProcessNamespace"] is True


def test_probes_and_grace() -> None:
    """Probes ask the port that users do not see; there is time to load, to drain, and to finish a request."""
    workload = dataclasses.replace(PLAIN, serving=Serving(timeout=12.5), drain=3)
    spec = template(workload)["spec"]
    (container,) = spec["containers"]
    probes = [container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["httpGet"]["port"] for probe in probes} == {"probes"}
    assert [probe["httpGet"]["path"] for probe in probes] == ["/readyz", "/readyz", "/livez"]
    assert [(probe["periodSeconds"], probe["failureThreshold"]) for probe in probes] == [(1, 1200), (5, 6), (20, 3)]
    assert spec["terminationGracePeriodSeconds"] == listening.LONGEST * 3 + 13 + 10
    assert {"name": "NBDEPLOY_DRAIN_SECONDS", "value": "3"} in container["env"]
    assert "lifecycle" not in container
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_resources() -> None:
    """Memory is request and limit alike, in the words of the user; the CPU has no limit; GPUs are limits."""
    resources = template(GPU)["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "2"}
    assert (resources["requests"]["cpu"], resources["requests"]["memory"]) == ("2500m", "8Gi")
    assert resources["requests"]["ephemeral-storage"] == "1Gi"
    by_hand = dataclasses.replace(PLAIN, resources=Resources(memory="1.5 gb".upper()))
    assert template(by_hand)["spec"]["containers"][0]["resources"]["limits"] == {"memory": "1500000000"}
    default = dataclasses.replace(PLAIN, memory=123 << 20)
    assert template(default)["spec"]["containers"][0]["resources"]["limits"] == {"memory": "123Mi"}


def test_memory_request() -> None:
    """Without a size, there is room for the weights twice, for the server and for CUDA."""
    assert memory_request(0, 0) == 512 << 20
    assert memory_request(3 << 30, 0) == (6 << 30) + (512 << 20)
    assert memory_request(0, 1) == (2 << 30) + (512 << 20)
    assert memory_request(1, 0) % (128 << 20) == 0
    assert memory_request(1, 0) > memory_request(0, 0)


def test_gpu_placement() -> None:
    """GPU nodes are tolerated only with GPUs; a type is looked for under each label that may name it."""
    spec = template(GPU)["spec"]
    affinity = spec["affinity"]["nodeAffinity"]
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    found = {row["key"]: row["values"] for term in terms for row in term["matchExpressions"]}
    assert "NVIDIA-L4" in found["nvidia.com/gpu.product"]
    assert "nvidia-l4" in found["cloud.google.com/gke-accelerator"]
    assert affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert {"key": "team", "operator": "Exists"} in spec["tolerations"]
    assert spec["nodeSelector"] == {"pool": "gpu"}
    plain = template(PLAIN)["spec"]
    assert "affinity" not in plain
    assert not any(row.get("key") == "nvidia.com/gpu" for row in plain["tolerations"])


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ("T4", "Tesla-T4"),
        ("Tesla-T4", "Tesla-T4"),
        ("nvidia-tesla-t4", "Tesla-T4"),
        ("NVIDIA L4", "NVIDIA-L4"),
        ("a100", "NVIDIA-A100-SXM4-80GB"),
        ("H100", "NVIDIA-H100-80GB-HBM3"),
        ("NVIDIA-H100-PCIe", "NVIDIA-H100-PCIe"),
    ],
)
def test_gpu_types_as_people_write_them(asked: str, label: str) -> None:
    """The product's label is found from the names that people and clouds use."""
    workload = dataclasses.replace(PLAIN, resources=Resources(gpus=1, gpu_type=asked))
    affinity = template(workload)["spec"]["affinity"]["nodeAffinity"]
    assert label in json.dumps(affinity["requiredDuringSchedulingIgnoredDuringExecution"])


def test_environment() -> None:
    """Values arrive as they are, secrets by reference, and settings without what only scales."""
    env = {row["name"]: row for row in template(GPU)["spec"]["containers"][0]["env"]}
    assert env["MODE"]["value"] == "a$$(b)"  # the kubelet makes "$$" a "$", and would expand "$(b)"
    assert env["TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "nbd-sentiment-env-0", "key": "TOKEN"}}
    assert env["DB"]["valueFrom"] == {"secretKeyRef": {"name": "team-db", "key": "password"}}
    settings = json.loads(env["NBDEPLOY_SETTINGS"]["value"])
    assert set(settings) == {"name", "revision", "key_sha256", "concurrency", "queue", "timeout", "cors", "gpus"}
    assert (settings["revision"], settings["gpus"] > 0, "NVIDIA_VISIBLE_DEVICES" in env) == (3, True, False)
    plain = {row["name"]: row.get("value") for row in template(PLAIN)["spec"]["containers"][0]["env"]}
    assert plain["NVIDIA_VISIBLE_DEVICES"] == "void"  # no card of a node is seen by who asked for none
    assert env["NBDEPLOY_DRAIN_SECONDS"]["value"] == "10"
    assert env["HOME"]["value"] == "/tmp"  # noqa: S108 - of the pod
    home = dataclasses.replace(PLAIN, variables={"HOME": "/data", "NBDEPLOY_SETTINGS": "{}"})
    changed = {row["name"]: row.get("value") for row in template(home)["spec"]["containers"][0]["env"]}
    assert changed["HOME"] == "/data"
    assert changed["NBDEPLOY_SETTINGS"] != "{}"


def test_secrets() -> None:
    """Other values are another Secret, its name tells nothing without the key, and no repr shows a value."""
    one = environment_secret("a", "models", UID, {"TOKEN": "sécret"}, "key")
    assert one["metadata"]["name"] == secrets_object("a", {"TOKEN": "sécret"}, "key")
    assert base64.b64decode(one["data"]["TOKEN"]).decode() == "sécret"
    assert one["immutable"] is True
    names = {secrets_object("a", {"TOKEN": value}, key) for value in ("1", "2") for key in ("k", "l")}
    assert len(names) == 4
    assert secrets_object("a", {}, "key") == ""
    assert key_secret("a", "models", UID, "k")["metadata"]["name"] == "nbd-a-key"
    assert "a$(b)" not in repr(GPU)


def test_who_may_call() -> None:
    """Users come from the own namespace and those named, or from everywhere through a Gateway; so do probes."""
    users, probes = of_kind(GPU, "NetworkPolicy")["spec"]["ingress"]
    assert users["ports"] == [{"port": 8080, "protocol": "TCP"}]
    own, named = users["from"]
    assert own == {"podSelector": {}}
    assert named["namespaceSelector"]["matchExpressions"][0]["values"] == ["apps", "jobs"]
    assert probes == {"ports": [{"port": 9090, "protocol": "TCP"}]}
    for workload in (GATEWAY, INGRESS):
        assert "from" not in of_kind(workload, "NetworkPolicy")["spec"]["ingress"][0]


def test_from_outside() -> None:
    """Gateway and Ingress lead the Endpoint's own host name to its Service, where TLS is said to be."""
    route = of_kind(GATEWAY, "HTTPRoute")["spec"]
    assert route["parentRefs"] == [{"name": "public", "namespace": "gw-system"}]
    assert route["hostnames"] == ["sentiment.models.test"]
    ingress = of_kind(INGRESS, "Ingress")
    assert ingress["spec"]["tls"] == [{"hosts": ["sentiment.models.test"], "secretName": "cert"}]
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"] == "64m"


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        (ClusterSettings(), ""),
        (ClusterSettings(host="models.test"), ""),
        (GATEWAY.settings, "http://a.models.test"),
        (INGRESS.settings, "https://a.models.test:8443"),
        (ClusterSettings(gateway="g", host="http://x-{name}.test/"), "http://x-a.test"),
        (ClusterSettings(ingress_class="n", host="m.test", tls_secret="t"), "https://a.m.test"),
    ],
)
def test_external_url(settings: ClusterSettings, url: str) -> None:
    """The URL follows the host of the settings: its scheme, its port, and where the name stands in it."""
    assert external_url(settings, "a") == url


def test_a_path_is_no_host() -> None:
    """A host with a path is refused by the name of its setting."""
    with pytest.raises(ConfigError, match=r"engines\.prod\.host"):
        external_url(ClusterSettings(name="prod", gateway="g", host="models.test/{name}"), "a")
