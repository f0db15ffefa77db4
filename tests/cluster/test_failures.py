"""Failures produced for real: what the API server makes of our objects, told by the diagnosis."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.kubernetes.client import Client
from nbdeploy.engines.kubernetes.diagnosis import Finding, complete, diagnose, unready
from nbdeploy.engines.kubernetes.manifests import Workload, environment_secret, key_secret, object_name, objects
from nbdeploy.engines.kubernetes.record import Kept, Record, read, root
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.workload import selector
from nbdeploy.errors import EngineError
from nbdeploy.spec import Resources, Revision, Serving

if TYPE_CHECKING:
    from tests.cluster.running import Cluster, Namespace

SERVES = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("", 9090), Handler).serve_forever()
"""
SECONDS = 90.0  # until a failure is told; a node that is busy with other tests is slow
_names = (f"case-{number}" for number in itertools.count(1))

Container = dict[str, Any]


def digest_of(image: str) -> str:
    """Return the reference by digest of an image in the test registry."""
    registry, _, path = image.partition("/")
    repository, _, tag = path.rpartition(":")
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    request = urllib.request.Request(f"http://{registry}/v2/{repository}/manifests/{tag}", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - as above
        return f"{registry}/{repository}@sha256:{hashlib.sha256(answer.read()).hexdigest()}"


@dataclasses.dataclass(frozen=True)
class Deployer:
    """Deploys with the rights of the Role alone."""

    client: Client
    namespace: Namespace
    image: str

    def deploy(self, change: Container | None = None, **fields: Any) -> str:
        """Apply an Endpoint's objects, with `change` in place of parts of its container, and return its name."""
        name = next(_names)
        kept = Kept(Revision(name, 1, "sha256:0", owner="Ada <ada@x>"), self.image)
        record = Record(name).with_revision(kept)
        made = self.client.apply(root(record, self.namespace.name))
        assert read(made) == record
        fields = {"image": self.image, "owner": "Ada <ada@x>", "memory": 128 << 20, "drain": 1, **fields}
        workload = Workload(
            name, self.namespace.name, 1, uid=made["metadata"]["uid"], serving=Serving(timeout=1), **fields
        )
        for one in objects(workload):
            if one["kind"] == "Deployment":
                container = one["spec"]["template"]["spec"]["containers"][0]
                container.update(change or python(SERVES))
                container["resources"]["requests"]["cpu"] = "1m"
            self.client.apply(one)
        return name

    def follow(self, name: str, until: Callable[[Finding | None], bool]) -> Finding:
        """Follow the roll-out until the diagnosis is as expected."""
        said: list[Finding | None] = []
        for snapshot in self.client.watch(",".join(f"{k}={v}" for k, v in selector(name).items()), seconds=SECONDS):
            finding = diagnose(snapshot, now=time.time())
            if finding is not None and until(finding):
                assert not complete(snapshot)
                return finding
            if not said or said[-1] != finding:
                said.append(finding)
        raise AssertionError(said)

    def remove(self, name: str) -> None:
        """Delete the root, and with it all."""
        self.client.delete("ConfigMap", object_name(name))


def python(code: str) -> Container:
    """Return the part of a container that runs this code."""
    return {"command": ["python3", "-c", code]}


@pytest.fixture(scope="module")
def make_deployer(
    cluster: Cluster, make_namespace: Callable[[], Namespace], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Deployer]]:
    """Make users of namespaces of their own, who have the rights of the Role alone."""
    made: list[Deployer] = []

    def make() -> Deployer:
        namespace = make_namespace()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(namespace.kubeconfig))
            client = Client.connect(ClusterSettings(namespace=namespace.name))
        made.append(Deployer(client, namespace, digest_of(cluster.base_image)))
        return made[-1]

    yield make
    for deployer in made:
        deployer.client.close()


@pytest.fixture(scope="module")
def deployer(make_deployer: Callable[[], Deployer]) -> Deployer:
    """A user of a namespace that these tests share."""
    return make_deployer()


CRASH = "import nosuchmodule"
HUNGRY = "rows = [bytearray(4 << 20) for _ in range(400)]"
SELF_KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
SEGFAULT = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
SEVEN = "import sys; print('the reason in words', file=sys.stderr); sys.exit(7)"


@pytest.mark.parametrize(
    ("change", "fields", "row", "told"),
    [
        (
            {},
            {"image": "127.0.0.1:5000/absent@sha256:" + "0" * 64},
            "pull-not-found",
            ["127.0.0.1:5000/absent", "`registry`"],
        ),
        (
            {},
            {"image": "127.0.0.1:5999/a@sha256:" + "0" * 64},
            "pull-unreachable",
            ["connection refused", "127.0.0.1:5999"],
        ),
        ({}, {"image": "127.0.0.1:5000/Base@sha256:" + "0" * 64}, "image-name", ["must be lowercase"]),
        (python(CRASH), {}, "module", ["nosuchmodule", "--pip"]),
        (python(SEVEN), {}, "crash", ["exited with status 7", "the reason in words"]),
        (python(HUNGRY), {"resources": Resources(memory="64Mi")}, "oom", ["64 MiB", "OOMKilled", "--memory 1Gi"]),
        (python(SELF_KILL), {}, "killed", ["SIGKILL", "usually: out of memory"]),
        (python(SEGFAULT), {}, "native", ["SIGSEGV"]),
        ({"command": ["/no/such/program"]}, {}, "start-error", ["/no/such/program"]),
        ({}, {"secrets": ("TOKEN",), "secrets_object": "absent"}, "secret-missing", ["Secret absent"]),
        ({}, {"foreign_secrets": {"A": ("absent", "key")}}, "secret-missing", ["--secret NAME=SECRET/KEY"]),
        (
            {
                **python("import time; time.sleep(99)"),
                "startupProbe": {"tcpSocket": {"port": 9090}, "periodSeconds": 1},
            },
            {},
            "startup",
            ["not ready within 3 s"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fatal(deployer: Deployer, change: Container, fields: dict[str, Any], row: str, told: list[str]) -> None:
    """What waiting cannot help ends a deploy with its cause, and soon."""
    name = deployer.deploy(change, **fields)
    finding = deployer.follow(name, lambda found: found is not None and found.fatal)
    assert finding.row == row, finding.words
    assert [part for part in told if part not in finding.words] == [], finding.words
    deployer.remove(name)


@pytest.mark.parametrize(
    ("resources", "row", "told"),
    [
        (Resources(gpus=9), "no-gpu", ["fewer than 9 GPUs free", "--gpu 9"]),
        (Resources(gpus=1, gpu_type="NVIDIA-H100-PCIe"), "unschedulable", ["--gpu-type NVIDIA-H100-PCIe"]),
        (Resources(memory="900Gi"), "unschedulable", ["less memory free than the 900Gi asked for", "--memory"]),
    ],
)
def test_no_node(deployer: Deployer, resources: Resources, row: str, told: list[str]) -> None:
    """What no node can take is told at once, with the option that asks for less, and waited for."""
    name = deployer.deploy(resources=resources)
    finding = deployer.follow(name, lambda found: found is not None)
    assert (finding.row, finding.fatal) == (row, False), finding.words
    assert [part for part in told if part not in finding.words] == [], finding.words
    deployer.remove(name)


@pytest.mark.parametrize(
    ("kind", "spec", "row", "told"),
    [
        ("ResourceQuota", {"hard": {"limits.memory": "100Mi"}}, "quota", ["asked 128Mi, used 0 of 100Mi", "--memory"]),
        ("ResourceQuota", {"hard": {"limits.cpu": "4"}}, "quota-wants", ["limits.cpu", "LimitRange"]),
        (
            "LimitRange",
            {"limits": [{"type": "Container", "max": {"memory": "100Mi"}}]},
            "limit-range",
            ["100Mi", "128Mi"],
        ),
    ],
)
def test_refused(
    make_deployer: Callable[[], Deployer], kind: str, spec: dict[str, Any], row: str, told: list[str]
) -> None:
    """What a namespace does not allow is told with its numbers."""
    deployer = make_deployer()
    one = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "team"}, "spec": spec}
    deployer.namespace.kubectl("apply", "-f", "-", input=json.dumps(one))
    deployer.namespace.in_force(kind, "team")
    finding = deployer.follow(deployer.deploy(), lambda found: found is not None and found.fatal)
    assert finding.row == row, finding.words
    assert [part for part in told if part not in finding.words] == [], finding.words


def test_no_right(deployer: Deployer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace without the Role refuses; the words hold the rule to paste."""
    monkeypatch.setenv("KUBECONFIG", str(deployer.namespace.kubeconfig))
    client = Client.connect(ClusterSettings(namespace="default"))
    with pytest.raises(EngineError, match=r"(?s)configmaps.*default.*kind: Role"):
        client.apply(root(Record("a"), "default"))
    client.close()


def test_ready_and_then_restarted(deployer: Deployer) -> None:
    """Our objects come up under Pod Security `restricted`, with nothing to tell; a later crash is told."""
    name = deployer.deploy()
    labels = ",".join(f"{key}={value}" for key, value in selector(name).items())
    watched = deployer.client.watch(labels, seconds=SECONDS)
    snapshot = next(snapshot for snapshot in watched if complete(snapshot))
    assert diagnose(snapshot, now=time.time()) is None
    assert unready(snapshot, now=time.time()) is None
    pod = snapshot.pods[0]["metadata"]["name"]
    kill = (
        "import os; [os.kill(int(p), 9) for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())]"
    )
    with contextlib.suppress(pytest.fail.Exception):  # the container may end before it has answered
        deployer.namespace.kubectl("exec", pod, "--", "python3", "-c", kill)
    told = (unready(snapshot, now=time.time()) for snapshot in watched)
    finding = next(finding for finding in told if finding is not None)
    assert "was killed by SIGKILL" in finding.words
    watched.close()
    deployer.remove(name)


def test_the_cluster_takes_every_object(cluster: Cluster, deployer: Deployer) -> None:
    """A server-side dry run takes every kind of object, the pod of the template included, without a warning."""
    settings = ClusterSettings(
        ingress_class="nginx", host="models.test", tls_secret="cert", tolerations=({"key": "a", "operator": "Exists"},)
    )
    name = "a" * 63
    where = (name, deployer.namespace.name, "00000000-0000-0000-0000-000000000001")
    workload = Workload(
        name,
        deployer.namespace.name,
        1,
        deployer.image,
        where[2],
        resources=Resources(0.5, "1.5Gi", 1, "NVIDIA-L4", spot=True),
        settings=settings,
        owner="数据 科学家 <ada@x>",
        notebook="/home/ada/ü b.ipynb",
        secrets=("TOKEN",),
        secrets_object="s",
        variables={"A": "$(B)"},
        from_namespaces=("apps",),
    )
    deployment = objects(workload)[-1]
    template = deployment["spec"]["template"]
    spec = {key: value for key, value in template["spec"].items() if key != "serviceAccountName"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "p"}, "spec": spec}
    every = [
        root(Record(name), where[1]),
        key_secret(*where, "k"),
        environment_secret(*where, {"TOKEN": "t"}, "k"),
        *objects(workload),
    ]
    for one in (*every, pod):
        given = json.dumps(one)
        done = deployer.namespace.kubectl(
            "apply", "--server-side", "--dry-run=server", "--field-manager=nbdeploy", "-f", "-", input=given
        )
        assert "serverside-applied (server dry run)" in done
