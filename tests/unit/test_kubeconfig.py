"""Which cluster, as whom, in which namespace; and every way in which that goes wrong, in words."""

from __future__ import annotations

import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdeploy.engines.kubernetes.connecting import connect
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError


def kubeconfig(path: Path, *, user: Any = None, **more: Any) -> Path:
    """Write a kubeconfig with the contexts `one` and `two`."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "me", "user": user or {"token": "secret"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "here", "user": "me", "namespace": "models"}},
            {"name": "two", "context": {"cluster": "here", "user": "me"}},
        ],
        "current-context": "one",
        **more,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def program(path: Path, body: str) -> str:
    """Write a login program."""
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def login(command: str, **more: Any) -> dict[str, Any]:
    """Return a user that logs in through a program."""
    version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": version, "command": command, "interactiveMode": "Never", **more}}


ANSWER = (
    "n = int(open(sys.argv[0] + '.count', 'a+').write('x') and os.path.getsize(sys.argv[0] + '.count')) + 1\n"
    "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential', "
    "'status': {'token': f'token-{n}', 'expirationTimestamp': os.environ['ENDS']}}))"
)


def test_current_context_and_its_namespace(tmp_path: Path) -> None:
    """Without settings the current context counts, with its namespace."""
    file = kubeconfig(tmp_path / "config")
    found = connect(ClusterSettings(), {"KUBECONFIG": str(file)})
    assert (found.context, found.namespace, found.server) == ("one", "models", "http://127.0.0.1:1")
    assert not found.in_cluster
    assert found.headers() == {"authorization": "Bearer secret"}


def test_settings_win(tmp_path: Path) -> None:
    """Context and namespace of the settings come first; a context without a namespace means `default`."""
    environ = {"KUBECONFIG": str(kubeconfig(tmp_path / "config"))}
    assert connect(ClusterSettings(context="two"), environ).namespace == "default"
    assert connect(ClusterSettings(context="two", namespace="other"), environ).namespace == "other"


def test_several_files(tmp_path: Path) -> None:
    """$KUBECONFIG lists files: all contexts are known, and as in kubectl the first current one wins."""
    first = kubeconfig(tmp_path / "first", **{"current-context": "two"})
    extra = [{"name": "three", "context": {"cluster": "here", "user": "me", "namespace": "third"}}]
    second = kubeconfig(tmp_path / "second", contexts=extra, **{"current-context": "three"})
    environ = {"KUBECONFIG": f"{tmp_path / 'absent'}:{first}:{second}"}
    assert connect(ClusterSettings(), environ).context == "two"
    assert connect(ClusterSettings(context="three"), environ).namespace == "third"


def test_no_kubeconfig(tmp_path: Path) -> None:
    """A missing file is named, and where to get one."""
    with pytest.raises(EngineError, match=r"no kubeconfig: .*absent is missing. Get one from whoever runs"):
        connect(ClusterSettings(), {"KUBECONFIG": str(tmp_path / "absent")})


def test_unknown_context_lists_the_others(tmp_path: Path) -> None:
    """A context that is not there is answered with those that are."""
    environ = {"KUBECONFIG": str(kubeconfig(tmp_path / "config"))}
    with pytest.raises(EngineError, match=r"engines.gpu.context is 'prod'.*There is one, two\."):
        connect(ClusterSettings(name="gpu", context="prod"), environ)
    kubeconfig(tmp_path / "config", **{"current-context": ""})
    with pytest.raises(EngineError, match=r"names no current context. There is one, two"):
        connect(ClusterSettings(), environ)


@pytest.mark.parametrize("text", ["{", "- a\n- b\n", "just words", "", "clusters: [{}]\ncontexts: [{}]\n"])
def test_damaged_file(tmp_path: Path, text: str) -> None:
    """A file that is no kubeconfig is an error in words that names it."""
    file = tmp_path / "damaged"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match="damaged"):
        connect(ClusterSettings(), {"KUBECONFIG": str(file)})


def test_missing_parts(tmp_path: Path) -> None:
    """A context whose cluster or certificate is missing says which."""
    environ = {"KUBECONFIG": str(kubeconfig(tmp_path / "config", clusters=[]))}
    with pytest.raises(EngineError, match=r"context 'one' .* cannot be used: .*here"):
        connect(ClusterSettings(), environ)
    cluster = {"name": "here", "cluster": {"server": "https://x", "certificate-authority": "gone.pem"}}
    kubeconfig(tmp_path / "config", clusters=[cluster])
    with pytest.raises(EngineError, match=r"File does not exist: .*gone\.pem"):
        connect(ClusterSettings(), environ)


def test_login_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login program's token is used, asked for again near its end only, and anew after a refusal."""
    file = kubeconfig(tmp_path / "config", user=login(program(tmp_path / "login", ANSWER)))
    monkeypatch.setenv("ENDS", (dt.datetime.now(tz=dt.UTC) + dt.timedelta(hours=1)).isoformat())
    found = connect(ClusterSettings(), {"KUBECONFIG": str(file)})
    first = found.headers()
    assert first["authorization"].startswith("Bearer token-")
    assert found.headers() == first
    found.renew()
    second = found.headers()
    assert second != first
    monkeypatch.setenv("ENDS", (dt.datetime.now(tz=dt.UTC) + dt.timedelta(seconds=5)).isoformat())
    found.renew()
    assert found.headers() != found.headers()


def test_login_program_relative_to_the_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login program runs in the folder of its kubeconfig, with the variables and arguments written there."""
    body = "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential', 'status': "
    body += "{'token': ' '.join([os.path.basename(os.getcwd()), os.environ['PLACE'], *sys.argv[1:]])}}))"
    command = program(tmp_path / "login", body)
    user = login(command, args=["--a", "b"], env=[{"name": "PLACE", "value": "mars"}])
    file = kubeconfig(tmp_path / "config", user=user)
    found = connect(ClusterSettings(), {"KUBECONFIG": str(file)})
    assert found.headers() == {"authorization": f"Bearer {tmp_path.name} mars --a b"}


def test_login_program_missing(tmp_path: Path) -> None:
    """A login program that is not installed is named, with the kubeconfig's hint on how to get it."""
    file = kubeconfig(tmp_path / "config", user=login("no-such-login", installHint="Get it at example.com."))
    with pytest.raises(EngineError, match=r"'no-such-login'.*cannot run .*Get it at example\.com\."):
        connect(ClusterSettings(), {"KUBECONFIG": str(file)})


def test_login_program_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a failing login program says on its error output is told, and nothing goes to the log."""
    command = program(tmp_path / "cloud-login", "sys.exit('your session has expired: run cloud login')")
    file = kubeconfig(tmp_path / "config", user=login(command))
    with pytest.raises(EngineError, match=r"cloud-login' of the context 'one' failed: .*your session has expired"):
        connect(ClusterSettings(), {"KUBECONFIG": str(file)})
    assert caplog.records == []


def test_login_program_talks_nonsense(tmp_path: Path) -> None:
    """An answer that is no credential is an error, not a login without a token."""
    file = kubeconfig(tmp_path / "config", user=login(program(tmp_path / "login", "print('hello')")))
    with pytest.raises(EngineError, match="failed to decode process output"):
        connect(ClusterSettings(), {"KUBECONFIG": str(file)})


def test_login_program_with_a_certificate(tmp_path: Path) -> None:
    """A login program may answer with a certificate in place of a token."""
    status = "{'clientCertificateData': 'a certificate', 'clientKeyData': 'its key'}"
    body = "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential', "
    command = program(tmp_path / "login", f"{body}'status': {status}}}))")
    cluster = {"name": "here", "cluster": {"server": "https://127.0.0.1:1"}}
    file = kubeconfig(tmp_path / "config", user=login(command), clusters=[cluster])
    found = connect(ClusterSettings(), {"KUBECONFIG": str(file)})
    assert found.headers() == {}
    assert Path(found.configuration.cert_file).read_text(encoding="utf-8") == "a certificate"
    assert Path(found.configuration.key_file).read_text(encoding="utf-8") == "its key"


def service_account(folder: Path) -> Path:
    """Write what Kubernetes mounts into pods."""
    folder.mkdir()
    for name, text in (("token", "abc"), ("ca.crt", "a certificate"), ("namespace", "notebooks")):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def test_in_a_pod(tmp_path: Path) -> None:
    """A pod with a service account uses it, in its own namespace unless the settings name another."""
    mounted = service_account(tmp_path / "mounted")
    found = connect(ClusterSettings(), POD, mounted)
    assert (found.in_cluster, found.context, found.namespace) == (True, "", "notebooks")
    assert found.server == "https://10.96.0.1:443"
    assert found.headers() == {"authorization": "bearer abc"}
    assert connect(ClusterSettings(namespace="models"), POD, mounted).namespace == "models"


def test_a_context_in_a_pod(tmp_path: Path) -> None:
    """A pod whose settings name a context uses that, not its service account."""
    environ = {**POD, "KUBECONFIG": str(kubeconfig(tmp_path / "config"))}
    found = connect(ClusterSettings(context="two"), environ, service_account(tmp_path / "mounted"))
    assert (found.in_cluster, found.context) == (False, "two")


def test_a_pod_without_token(tmp_path: Path) -> None:
    """JupyterHub mounts no token by default: both of its settings are named."""
    environ = {**POD, "KUBECONFIG": str(tmp_path / "absent")}
    with pytest.raises(EngineError, match=r"singleuser\.serviceAccountName.*singleuser\.networkPolicy\."):
        connect(ClusterSettings(), environ, tmp_path / "mounted")
