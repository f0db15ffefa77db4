"""When a roll-out is given up, and what is told meanwhile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy.engines.kubernetes import rollout
from nbdeploy.engines.kubernetes.diagnosis import Snapshot
from nbdeploy.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 0.05
RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> Snapshot:
    """Return a Snapshot as a real cluster gave it, before the Deployment's own deadline was over."""
    data: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    status = data["deployment"]["status"]
    status["conditions"] = [row for row in status.get("conditions", ()) if row["type"] != "Progressing"]
    rows = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    return Snapshot(deployment=data["deployment"], **rows)


def complete(snapshot: Snapshot) -> Snapshot:
    """Return the Snapshot of the same Deployment once all is there."""
    deployment = json.loads(json.dumps(snapshot.deployment))
    wanted = deployment["spec"].get("replicas", 1)
    generation = deployment["metadata"].get("generation", 1)
    counts = dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas"), wanted)
    done = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
    deployment["status"] = {"observedGeneration": generation, **counts, "conditions": [done]}
    return dataclasses.replace(snapshot, deployment=deployment)


def test_a_wait_that_has_just_begun_is_not_given_up() -> None:
    """Patience is for an unbroken wait for a node, however long the roll-out took before it."""
    waits = recorded("no-gpu")
    starts = dataclasses.replace(waits, pods=(), events=())
    said: list[str] = []

    def snapshots() -> Iterator[Snapshot]:
        limit = time.monotonic() + 3 * PATIENCE
        while time.monotonic() < limit:
            yield starts
        yield waits
        yield complete(waits)

    rollout.follow(snapshots(), said.append, patience=PATIENCE)
    assert any("GPU" in words for words in said)


def test_a_wait_without_end_is_given_up() -> None:
    """A node that fits does not come: the roll-out ends with how long was waited, for what, and what to do."""
    waits = recorded("no-gpu")
    with pytest.raises(EngineError, match=r"Given up after 0 s .* GPUs? .*Deploy again asking for less"):
        rollout.follow(itertools.repeat(waits), lambda _words: None, patience=PATIENCE)


def test_last_lines_are_added_to_a_crash() -> None:
    """What a Replica printed stands below the reason; its traceback does not, where the words say it all."""
    crash = recorded("exit7")
    with pytest.raises(EngineError) as caught:
        rollout.follow([crash], lambda _words: None, last_lines=lambda _pod: ["looking for weights", "bye"])
    assert "looking for weights" in str(caught.value)


def test_a_watch_that_ends_is_an_error() -> None:
    """Whoever follows hears that it did not come to an end."""
    with pytest.raises(EngineError, match="did not come to an end"):
        rollout.follow([recorded("readiness")], lambda _words: None)
