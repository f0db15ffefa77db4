"""Login programs of kubeconfigs that hang, fail or answer with what has ended: told in words, and soon."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbdeploy.engines.kubernetes import login
from nbdeploy.engines.kubernetes.connecting import connect
from nbdeploy.engines.kubernetes.credentials import CredentialsError, fetch
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError

VERSION = "client.authentication.k8s.io/v1"
ANSWER = (
    f"import json, os, sys; say = lambda **status: print(json.dumps(dict(apiVersion='{VERSION}', status=status)))\n"
)


def logs_in(folder: Path, body: str, **more: Any) -> dict[str, str]:
    """Write a kubeconfig whose user logs in through a program of this body; return the variables that lead to it."""
    program, file = folder / "cloud-login", folder / "config"
    program.write_text(f"#!{sys.executable}\n{ANSWER}{body}\n", encoding="utf-8")
    program.chmod(0o755)
    user = {"exec": {"apiVersion": VERSION, "command": str(program), "interactiveMode": "IfAvailable", **more}}
    content = {
        "clusters": [{"name": "here", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "me", "user": user}],
        "contexts": [{"name": "one", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "one",
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    return {"KUBECONFIG": str(file)}


def test_a_program_that_waits_for_somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that hangs is ended after a while; what it asked for is told, and where it can be answered."""
    import kubernetes.config  # noqa: F401 - with all that it imports, which is not part of what is timed

    monkeypatch.setattr(login, "LOGIN_SECONDS", 5.0)  # for an interpreter to start, and to print
    asks = "print('To sign in, open https://login.example.com and enter ABC', file=sys.stderr, flush=True)\n"
    environ = logs_in(tmp_path, f"{asks}import signal; signal.pause()")
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        connect(ClusterSettings(), environ)
    assert time.monotonic() - began < 30
    words = str(caught.value)
    assert "cloud-login' of the context 'one' has not answered for 5 s" in words
    assert "open https://login.example.com and enter ABC" in words
    assert "kubectl --context one get pods in a terminal" in words


def test_a_program_that_reads(tmp_path: Path) -> None:
    """A program that asks on its standard input hears at once that nobody is there, and does not take the kernel's."""
    environ = logs_in(tmp_path, "sys.exit(f'no password, got {sys.stdin.read()!r}')")
    with pytest.raises(EngineError, match=r"failed: .*no password, got ''"):
        connect(ClusterSettings(), environ)


def test_what_a_program_is_told(tmp_path: Path) -> None:
    """A program hears which version is spoken, that nobody is there and, where it wants that, of which cluster."""
    environ = logs_in(tmp_path, "say(token=os.environ['KUBERNETES_EXEC_INFO'])", provideClusterInfo=True)
    told = json.loads(connect(ClusterSettings(), environ).headers()["authorization"].removeprefix("Bearer "))
    assert (told["apiVersion"], told["kind"]) == (VERSION, "ExecCredential")
    assert told["spec"] == {"interactive": False, "cluster": {"server": "http://127.0.0.1:1"}}


def test_a_program_of_another_version(tmp_path: Path) -> None:
    """An answer in another version than the kubeconfig names is an error, not a guess."""
    environ = logs_in(tmp_path, "print(json.dumps(dict(apiVersion='v9', status=dict(token='a'))))")
    with pytest.raises(EngineError, match=f"answers in v9, not in {VERSION}"):
        connect(ClusterSettings(), environ)


def test_a_token_that_has_ended(tmp_path: Path) -> None:
    """A token that had ended when it came is used all the same: the clock here may be wrong."""
    ended = dt.datetime.now(tz=dt.UTC) - dt.timedelta(hours=1)
    environ = logs_in(tmp_path, f"say(token='old', expirationTimestamp='{ended.isoformat()}')")
    assert connect(ClusterSettings(), environ).headers() == {"authorization": "Bearer old"}


def test_a_forwarder_hears_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login that fails where a forwarder logs in again reaches it in the program's own words."""
    environ = logs_in(tmp_path, "sys.exit('your session has expired: run cloud login')")
    monkeypatch.setenv("KUBECONFIG", environ["KUBECONFIG"])
    with pytest.raises(CredentialsError, match=r"cloud-login' .* your session has expired: run cloud login"):
        asyncio.run(fetch("kubernetes", None))
