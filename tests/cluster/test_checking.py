"""`nbdeploy cluster check`, on a real cluster with the printed Role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nbdeploy.cluster_cli import cluster as command
from nbdeploy.engines.kubernetes import capacity, checking
from nbdeploy.errors import ConfigError
from tests.cluster.running import Namespace
from tests.conftest import wait_until


def run(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(command, ["check", *arguments])


def rows() -> dict[str, dict[str, str]]:
    """Return what --json prints, by check."""
    return {row["check"]: row for row in json.loads(run("--json").stdout)}


def unset(folder: Path, setting: str) -> None:
    """Take a setting out of the engine's."""
    file = folder / "config" / "nbdeploy" / "config.toml"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith(setting)), encoding="utf-8")


def test_all_is_there(on_cluster: Namespace) -> None:
    """With the Role, a registry and a base image, nothing is missing; what cannot be seen is no failure."""
    result = run()
    assert result.exit_code == 0, result.output
    assert "✗" not in result.output
    found = rows()
    assert found["cluster"]["detail"].startswith("Kubernetes v1.")
    assert on_cluster.user in found["cluster"]["detail"]
    assert found["access"]["state"] == found["registry push"]["state"] == found["base image"]["state"] == "ok"
    assert "restricted is enforced" in found["pod security"]["detail"]
    assert found["GPUs"]["state"] == "note"
    assert "nodes may not be listed" in found["GPUs"]["detail"]
    assert found["quota"]["detail"] == "no ResourceQuota and no LimitRange"
    listed = json.loads(on_cluster.kubectl("get", "deploy,configmap,pod", "-o", "json"))["items"]
    assert {one["metadata"]["name"] for one in listed} <= {"kube-root-ca.crt"}


def test_missing_right(on_cluster: Namespace) -> None:
    """Without its Role the account is told what to paste; the rest is still checked."""
    on_cluster.kubectl("delete", "role,rolebinding", "--all")
    wait_until(lambda: rows()["access"]["state"] == "missing")
    result = run()
    assert result.exit_code == 1
    assert "✗ access" in result.output
    assert "kind: RoleBinding" in result.output
    assert "✓ registry push" in result.output
    assert f"namespace is '{on_cluster.name}', where you may do nothing: is it spelt right?" in result.output
    assert result.output.count("kind: RoleBinding") == 1
    assert "· quota         unknown, a right is missing" in result.output


def test_nothing_reached(on_cluster: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is no kubeconfig the registry and the base image are checked nevertheless."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    found = rows()
    assert list(found) == ["cluster", "registry push", "base image"]
    assert found["cluster"]["state"] == "missing"
    assert "no kubeconfig" in found["cluster"]["detail"]


def test_registry_and_base(on_cluster: Namespace, tmp_path: Path) -> None:
    """A registry that refuses, a base image that is not there and a pull secret that is missing are each told."""
    on_cluster.configure(tmp_path / "config", registry="127.0.0.1:9/team", image_pull_secret="pull")
    found = rows()
    assert found["registry push"]["state"] == "missing"
    assert "127.0.0.1:9" in found["registry push"]["detail"]
    assert f"engines.cluster.registry in {tmp_path / 'config'}" in found["registry push"]["detail"]
    assert "create secret docker-registry pull --docker-server=127.0.0.1:9" in found["registry pull"]["detail"]
    on_cluster.configure(tmp_path / "config", base_image=f"{on_cluster.cluster.registry}/absent:1")
    assert "There is no base image" in rows()["base image"]["detail"]


def test_no_registry(on_cluster: Namespace, tmp_path: Path) -> None:
    """Settings without a registry are told, with the line to write."""
    unset(tmp_path, "registry")
    found = rows()
    assert 'registry = "registry.example.com/team"' in found["registry push"]["detail"]
    assert found["registry pull"]["state"] == "note"


def test_a_registry_written_like_a_web_page(on_cluster: Namespace, tmp_path: Path) -> None:
    """`http://` before the registry is told with the setting that has it."""
    on_cluster.configure(tmp_path / "config", registry="http://127.0.0.1:5000/team")
    file = tmp_path / "config" / "nbdeploy" / "config.toml"
    told = f"engines.cluster.registry in {file} is 'http://127.0.0.1:5000/team'"
    assert rows()["registry push"]["detail"].startswith(told)


def test_a_default_base_image_out_of_reach(
    on_cluster: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who set no base_image learns that there is such a setting."""
    unset(tmp_path, "base_image")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "10.97.0.1")
    found = rows()["base image"]
    assert found["state"] == "missing"
    assert "the proxy of this machine does not let us reach registry-1.docker.io" in found["detail"]
    assert f"engines.cluster.base_image in {tmp_path / 'config'}" in found["detail"]


def test_quota_in_words(on_cluster: Namespace) -> None:
    """Quota and limits are told in numbers; one that is used up is a failure to come."""
    on_cluster.kubectl("create", "quota", "team", "--hard=pods=10,requests.nvidia.com/gpu=0")
    spec = {"limits": [{"type": "Container", "max": {"memory": "4Gi"}}]}
    limit = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": spec}
    on_cluster.kubectl("apply", "-f", "-", input=json.dumps(limit))
    on_cluster.in_force("ResourceQuota", "team")
    found = rows()["quota"]
    assert found["state"] == "ok"
    assert "pods 0 of 10" in found["detail"]
    assert "a Container has at most memory 4Gi" in found["detail"]
    on_cluster.kubectl("create", "quota", "none", "--hard=pods=0")
    on_cluster.in_force("ResourceQuota", "none")
    found = rows()["quota"]
    assert found["state"] == "missing"
    assert "Used up: pods (0 of 0)" in found["detail"]


def test_gpus_for_who_may_see_nodes(on_cluster: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may list nodes and pods sees how many GPUs are free."""
    monkeypatch.setenv("KUBECONFIG", str(on_cluster.cluster.kubeconfig))
    found = rows()["GPUs"]
    assert found["state"] == "ok"
    assert " of 2 " in found["detail"]


def test_routes(on_cluster: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gateway that does not exist is missing; one that may not be looked at is a note."""
    on_cluster.configure(tmp_path / "config", gateway="infra/web", host="models.example.com")
    assert rows()["reach"]["state"] == "note"
    monkeypatch.setenv("KUBECONFIG", str(on_cluster.cluster.kubeconfig))
    assert "There is no Gateway infra/web" in rows()["reach"]["detail"]


def test_which_engine(home: Path, tmp_path: Path) -> None:
    """Of two clusters one must be named; an engine that is none is refused."""
    file = tmp_path / "config" / "nbdeploy" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('[engines.a]\nkind = "kubernetes"\n[engines.b]\nkind = "kubernetes"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Which cluster\? There is a, b"):
        CliRunner().invoke(command, ["check"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="'local' is no cluster"):
        CliRunner().invoke(command, ["check", "--engine", "local"], catch_exceptions=False)


def test_quantities() -> None:
    """Quantities are read as Kubernetes writes them."""
    texts = ("1500m", "2Gi", "3", "4k", "1e3")
    assert [capacity.quantity(text) for text in texts] == [1.5, 2 * 2**30, 3, 4000, 1000]


def test_free_gpus() -> None:
    """GPUs are told by type; those of pods that have ended are free again."""

    def pod(node: str, phase: str) -> dict[str, Any]:
        container = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
        return {"spec": {"nodeName": node, "containers": [container]}, "status": {"phase": phase}}

    def node(name: str, kind: str, count: int) -> dict[str, Any]:
        labels = {"nvidia.com/gpu.product": kind}
        return {"metadata": {"name": name, "labels": labels}, "status": {"allocatable": {"nvidia.com/gpu": str(count)}}}

    nodes = [node("a", "T4", 4), node("b", "T4", 2), node("c", "A100", 1), {"metadata": {"name": "d"}}]
    pods = [pod("a", "Running"), pod("c", "Pending"), pod("b", "Succeeded"), pod("elsewhere", "Running")]
    assert capacity.gpus(nodes, pods) == "0 of 1 A100 free, 5 of 6 T4 free"
    assert capacity.gpus(nodes, None) == "1 A100, 6 T4"
    assert checking.Row("a", "ok", "b").to_json() == {"check": "a", "state": "ok", "detail": "b"}
