"""What a rollback means, and what changes in words."""

from __future__ import annotations

import dataclasses

import pytest

from nbdeploy.changes import earlier, scaled, told
from nbdeploy.errors import UsageError
from nbdeploy.spec import Autoscaling, Resources, Revision

A, B = "sha256:a", "sha256:b"


def history(*rows: Revision) -> list[Revision]:
    """Return Revisions with numbers from 1."""
    return [dataclasses.replace(row, number=number) for number, row in enumerate(rows, 1)]


def revision(bundle: str = A, replicas: int = 1, memory: str | None = None, *, stopped: bool = False) -> Revision:
    """Return a Revision with a fixed number of Replicas."""
    scaling = Autoscaling(replicas, replicas)
    return Revision("one", 0, bundle, Resources(memory=memory), scaling, stopped=stopped)


def test_a_rollback_means_other_code_or_settings() -> None:
    """Scales and stops are passed over, on the way back and as what is gone back to."""
    assert earlier(history(revision(A), revision(B), revision(B, 2), revision(B, stopped=True))).number == 1
    assert earlier(history(revision(A), revision(A, memory="2Gi"), revision(A, 3, memory="2Gi"))).number == 1
    assert earlier(history(revision(A), revision(A, 2), revision(B))).number == 2
    assert earlier(history(revision(A), revision(B), revision(A))).number == 2


def test_nothing_to_go_back_to() -> None:
    """Where only the number of Replicas ever changed, that is said, and what changes it."""
    with pytest.raises(UsageError, match=r"no earlier Revision to go back to\.$"):
        earlier(history(revision()))
    with pytest.raises(UsageError, match=r"the 3 that are kept differ in the number of Replicas alone.*nbdeploy scale"):
        earlier(history(revision(), revision(replicas=2), revision(stopped=True)))


def test_a_revision_by_its_number() -> None:
    """A number means that very Revision, whatever differs; an unknown one is told with those that are kept."""
    rows = history(revision(), revision(replicas=2))
    assert earlier(rows, 1) == rows[0]
    assert earlier(rows, 2) == rows[1]
    with pytest.raises(UsageError, match="no Revision 7; kept are 1, 2"):
        earlier(rows, 7)


def test_what_changes_is_told() -> None:
    """Code, settings, stops and numbers, each in words; nothing for nothing."""
    assert told(revision(A, 2), revision(B)) == "other code, model or packages, 1 replica instead of 2"
    assert told(revision(), revision(memory="2Gi")) == "other resources"
    assert told(revision(), revision(stopped=True)) == "stopped"
    assert told(revision(), revision()) == ""


def test_scaling_keeps_what_was_not_named() -> None:
    """A fixed number stays fixed, a range grows only as far as it must."""
    assert scaled(revision(replicas=2), 3, None).autoscaling == Autoscaling(3, 3)
    ranged = dataclasses.replace(revision(), autoscaling=Autoscaling(1, 4))
    assert scaled(ranged, 2, None).autoscaling == Autoscaling(2, 4)
    assert scaled(ranged, 6, None).autoscaling == Autoscaling(6, 6)
    assert scaled(ranged, None, 8).autoscaling == Autoscaling(1, 8)
