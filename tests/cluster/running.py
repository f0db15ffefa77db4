"""The test cluster as tests see it: brought up, asked as its administrator, with namespaces that know only the Role."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from nbdeploy.engines.kubernetes.role import needed, role_yaml

PROGRAM = Path(__file__).with_name("cluster")
NODES = 2
GPUS = 2  # of node1; none has a driver
BUILD_SECONDS = 3600.0  # everything from nothing on a slow machine
PATIENCE = 600.0  # for servers to start or end on a machine that has other work to do
BASE_IMAGE = "127.0.0.1:5000/base:1"
ACCOUNT = "deployer"
_numbers = itertools.count()


def state() -> Path:
    """Return the folder of the cluster's state."""
    return Path(os.environ.get("CLUSTER") or PROGRAM.parents[2] / ".cluster").resolve()


def users() -> IO[str]:
    """Open the file whose locks keep a lent cluster up."""
    cache = Path(os.environ.get("CLUSTER_CACHE") or Path.home() / ".cache" / "nbdeploy-tests")
    cache.mkdir(parents=True, exist_ok=True)
    return (cache / "users").open("a", encoding="utf-8")


def run_program(*arguments: str, seconds: float = 120.0, stdin: str | None = None) -> str:
    """Run the cluster's program and return what it printed; a failure fails the test with its words."""
    done = subprocess.run(
        [PROGRAM, *arguments], input=stdin, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        words = (done.stdout + done.stderr).strip()
        pytest.fail(f"cluster {' '.join(arguments)} ended with {done.returncode}: {words}", pytrace=False)
    return done.stdout


def hindrance() -> str:
    """Install what the cluster needs, which takes minutes once; return why that is impossible here, or ""."""
    if sys.platform != "linux":
        return "a test cluster needs Linux"
    done = subprocess.run([PROGRAM, "install"], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    return (done.stdout + done.stderr).strip()[-1000:] if done.returncode else ""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up, with the administrator's rights: for set-up and for looking, never to deploy with.

    Attributes:
        kubeconfig: the administrator's.
        registry: plain HTTP, `host:port`, reached by this name from here and from the nodes.
        base_image: Debian with Python 3.11 in that registry.
    """

    kubeconfig: Path
    registry: str = BASE_IMAGE.partition("/")[0]
    base_image: str = BASE_IMAGE

    def kubectl(self, *arguments: str, input: str | None = None, seconds: float = 120.0) -> str:  # noqa: A002 - subprocess's word
        """Run kubectl and return what it printed."""
        return run_program("kubectl", *arguments, stdin=input, seconds=seconds)

    def get(self, *arguments: str) -> dict[str, Any]:
        """Return what `kubectl get` finds, an object or a list of them in `items`."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "-o", "json", *arguments))
        return found


@dataclass(frozen=True)
class Namespace:
    """A namespace of one test's own, under Pod Security `restricted`, and a user who may only what nbdeploy asks for.

    Attributes:
        name: of the namespace.
        kubeconfig: of the service account that the Role is bound to; nothing else in it.
        cluster: its administrator.
    """

    name: str
    kubeconfig: Path
    cluster: Cluster

    @property
    def user(self) -> str:
        """Return the name that the API server knows the service account by."""
        return f"system:serviceaccount:{self.name}:{ACCOUNT}"

    def kubectl(self, *arguments: str, input: str | None = None) -> str:  # noqa: A002 - subprocess's word
        """Run kubectl as administrator in this namespace and return what it printed."""
        return self.cluster.kubectl("-n", self.name, *arguments, input=input)

    def in_force(self, kind: str, name: str) -> None:
        """Wait until the API server reckons with a quota: one that no controller has looked at refuses nothing."""
        limit = time.monotonic() + PATIENCE
        while kind == "ResourceQuota" and "used" not in self.cluster.get("-n", self.name, kind, name).get("status", {}):
            if time.monotonic() > limit:
                pytest.fail(f"no controller took up the quota {name} within {PATIENCE:.0f} s", pytrace=False)
            time.sleep(0.2)

    def environ(self) -> dict[str, str]:
        """Return the variables that lead a client here."""
        return {"KUBECONFIG": str(self.kubeconfig)}

    def configure(self, folder: Path, **settings: str) -> None:
        """Write config.toml with the engine `cluster` into a user's configuration folder (XDG_CONFIG_HOME)."""
        rows: dict[str, str] = {
            "kind": "kubernetes",
            "namespace": self.name,
            "registry": f"{self.cluster.registry}/team",
            "base_image": self.cluster.base_image,
            **settings,
        }
        file = folder / "nbdeploy" / "config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in rows.items()]
        file.write_text("".join(["[engines.cluster]\n", *lines]), encoding="utf-8")


def use() -> Cluster:
    """Return the cluster; one that is not up is brought up, until the last process that uses it ends."""
    _locks.append(users())
    fcntl.flock(_locks[-1], fcntl.LOCK_SH)
    run_program("lend", str(NODES), seconds=PATIENCE)
    run_program("base-image", seconds=PATIENCE)
    run_program("gpus", "1", str(GPUS))
    return Cluster(state() / "admin.kubeconfig")


_locks: list[IO[str]] = []  # held until this process ends


def give_back() -> str:
    """End a lent cluster that no other test run uses; return what went wrong, or ""."""
    for file in _locks:
        file.close()
    _locks.clear()
    if not (state() / "guard").exists():
        return ""
    with users() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another run uses it, and this lock is had at once; or the guard ends it, and this waits for that.
            fcntl.flock(file, fcntl.LOCK_SH)
            if state().exists():
                return ""
        done = subprocess.run([PROGRAM, "down"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def make_namespace(cluster: Cluster, folder: Path, labels: Mapping[str, str] | None = None) -> Namespace:
    """Make a namespace; its kubeconfig is written into the folder."""
    name = f"t{os.getpid()}-{next(_numbers)}"
    namespace = Namespace(name, folder / f"{name}.kubeconfig", cluster)
    described = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted", **(labels or {})}},
    }
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": name}}
    role = role_yaml(name, needed(outside=True), subject=namespace.user)
    cluster.kubectl("apply", "-f", "-", input=f"{json.dumps(described)}\n---\n{json.dumps(account)}\n---\n{role}")
    token = namespace.kubectl("create", "token", ACCOUNT, "--duration=24h").strip()
    _write_kubeconfig(namespace, token)
    return namespace


def _write_kubeconfig(namespace: Namespace, token: str) -> None:
    admin = json.loads(namespace.cluster.kubectl("config", "view", "--raw", "--flatten", "-o", "json"))
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": admin["clusters"][0]["cluster"]}],
        "users": [{"name": ACCOUNT, "user": {"token": token}}],
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": ACCOUNT, "namespace": namespace.name}},
        ],
        "current-context": "test",
    }
    namespace.kubeconfig.touch(0o600)
    namespace.kubeconfig.write_text(json.dumps(content), encoding="utf-8")
