"""Engines are asked all at once; where was looked is told, and one that is silent hides no other."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy import survey
from nbdeploy.config import settings
from nbdeploy.deploying import deploy
from nbdeploy.endpoint import connect, endpoints
from nbdeploy.errors import EngineError, NbdeployError

if TYPE_CHECKING:
    from pathlib import Path

    from nbdeploy.engines.base import Engine


def predict() -> Any:
    """Return a function of a cell."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def predict(x: int) -> int:\n    return x + 1\n", namespace)  # noqa: S102 - the cell is the test's own
    return namespace["predict"]


@pytest.fixture
def cluster_at(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Configure engines whose cluster is at an address."""

    def configure(address: str, *names: str) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": address}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "models"}}],
            "current-context": "c",
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        file = tmp_path / "config" / "nbdeploy" / "config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f'[engines.{name}]\nkind = "kubernetes"\n' for name in names), encoding="utf-8")

    return configure


def test_a_cluster_that_is_down(cluster_at: Any) -> None:
    """An unknown name: where it is not, and who did not answer and why. What this machine has is found all the same."""
    cluster_at("https://127.0.0.1:1", "far", "farther")
    with pytest.raises(EngineError) as caught:
        connect("nobody")
    told = str(caught.value)
    assert told.startswith("There is no Endpoint 'nobody' on this machine, but not all engines were heard. ")
    assert "far did not answer: The API server https://127.0.0.1:1 cannot be reached" in told
    assert "farther did not answer" in told
    deploy(predict(), name="here", verify=False)
    with pytest.warns(UserWarning, match="did not answer"):
        assert [one.name for one in endpoints()] == ["here"]
    assert connect("here")(x=1) == 2


def test_engines_that_hang_are_given_up(cluster_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many do not answer, the time is one bound for all; what the others said is there."""
    monkeypatch.setattr(survey, "ANSWER_SECONDS", 5.0)
    cluster_at("https://127.0.0.1:1", "far", "farther")
    end = threading.Event()

    def question(engine: Engine) -> str:
        return "here" if engine.name == "local" else str(end.wait(60))

    began = time.monotonic()
    answers = survey._ask(settings(), None, question)
    took = time.monotonic() - began
    end.set()
    assert took < 20.0
    assert answers.found == {"local": "here"}
    assert list(answers.silent) == ["far", "farther"]
    assert "no answer within 5 s" in str(answers.silent["far"])


def test_wrong_settings_of_one_engine(home: Path, tmp_path: Path) -> None:
    """They hide no other engine, and are told with their file; who asks for that engine hears of nothing else."""
    file = tmp_path / "config" / "nbdeploy" / "config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('[engines.far]\nkind = "kubernetes"\nplatform = "linux/riscv"\n', encoding="utf-8")
    found, [(name, error)] = survey.survey()
    assert (found, name) == ([], "far")
    assert str(file) in str(error)
    with pytest.raises(NbdeployError, match="linux/riscv"):
        survey.survey("far")
