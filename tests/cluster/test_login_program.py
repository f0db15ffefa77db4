"""Login programs (exec plugins) before a real API server, which alone knows whether a token is good."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from nbdeploy.engines.kubernetes.client import Client
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.running import Namespace

VERSION = "client.authentication.k8s.io/v1"
PROGRAM = f"""#!{sys.executable}
import json, pathlib
tokens = pathlib.Path(__file__).with_name("tokens")
first, *left = tokens.read_text().split()
tokens.write_text(" ".join(left or [first]))
status = {{"token": first, "expirationTimestamp": "2099-01-01T00:00:00Z"}}
print(json.dumps({{"apiVersion": "{VERSION}", "kind": "ExecCredential", "status": status}}))
"""


def logged_in(namespace: Namespace, folder: Path, monkeypatch: pytest.MonkeyPatch, *tokens: str) -> Client:
    """Return a client whose login program answers with one token after the other, then with the last for ever."""
    program = folder / "cloud-login"
    program.write_text(PROGRAM, encoding="utf-8")
    program.chmod(0o755)
    (folder / "tokens").write_text(" ".join(tokens), encoding="ascii")
    config = json.loads(namespace.kubeconfig.read_text(encoding="utf-8"))
    config["users"][0]["user"] = {"exec": {"apiVersion": VERSION, "command": str(program), "interactiveMode": "Never"}}
    namespace.kubeconfig.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(namespace.kubeconfig))
    return Client.connect(ClusterSettings())


def test_a_token_that_the_server_no_longer_takes(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that was withdrawn before its time is asked for anew, without an error."""
    right = json.loads(namespace.kubeconfig.read_text(encoding="utf-8"))["users"][0]["user"]["token"]
    client = logged_in(namespace, tmp_path, monkeypatch, "withdrawn", right)
    assert client.list("Pod") == []
    assert client.requests == 2
    client.close()


def test_tokens_that_are_never_good(namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers with refused tokens only is asked once more, then the login is said to have ended."""
    client = logged_in(namespace, tmp_path, monkeypatch, "one", "two", "three")
    with pytest.raises(EngineError, match=r"does not accept the login of the context 'test' \(401\)"):
        client.list("Pod")
    assert (tmp_path / "tokens").read_text(encoding="ascii") == "three"
    client.close()
