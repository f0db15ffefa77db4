"""The nouns: they check themselves, and go through JSON unchanged."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdeploy.errors import UsageError
from nbdeploy.spec import Autoscaling, Phase, Resources, Revision, Serving, Status, check_name, label, memory_bytes


@pytest.mark.parametrize("name", ["a", "sentiment", "a-b", "0", "x" * 63])
def test_good_names(name: str) -> None:
    """A DNS label is a name."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "proposal"),
    [
        ("Sentiment", "sentiment"),
        ("my_model", "my-model"),
        ("-a-", "a"),
        ("x" * 64, "x" * 63),
        ("a.b", "a-b"),
        ("", ""),
    ],
)
def test_bad_names(name: str, proposal: str) -> None:
    """Another is refused with one that would do."""
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert ("--name " + proposal in str(caught.value)) if proposal else ("--name" not in str(caught.value))


@given(st.text())
def test_a_label_is_a_name(text: str) -> None:
    """Whatever it is made of, a label is a good name or nothing."""
    made = label(text)
    assert made == "" or check_name(made) == made
    assert label(made) == made


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("512Mi", 512 << 20),
        ("8Gi", 8 << 30),
        ("2G", 2 * 10**9),
        ("1k", 1000),
        ("1K", 1000),
        ("1Ki", 1024),
        ("1.5Gi", 3 << 29),
        ("100", 100),
        ("2GB", 2 * 10**9),
        ("1 Ti", 1 << 40),
    ],
)
def test_memory(size: str, count: int) -> None:
    """Kubernetes' notation, in bytes."""
    assert memory_bytes(size) == count


@pytest.mark.parametrize("size", ["", "lots", "8Xi", "-1Gi", "Gi", "1e3"])
def test_bad_memory(size: str) -> None:
    """Anything else is told with examples."""
    with pytest.raises(UsageError, match="512Mi, 8Gi or 2G"):
        Resources(memory=size)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: Resources(cpus=0), "--cpu"),
        (lambda: Resources(gpus=-1), "--gpu"),
        (lambda: Autoscaling(min_replicas=-1), "--min"),
        (lambda: Autoscaling(max_replicas=0), "--max"),
        (lambda: Autoscaling(min_replicas=3, max_replicas=2), "--max"),
        (lambda: Autoscaling(target_in_flight=0), "--target-in-flight"),
        (lambda: Autoscaling(scaling="slow"), "--scaling"),
        (lambda: Serving(concurrency=-1), "--concurrency"),
        (lambda: Serving(queue=-1), "--queue"),
        (lambda: Serving(timeout=0), "--timeout"),
        (lambda: Serving(timeout=float("nan")), "--timeout"),
        (lambda: Serving(port=70000), "--port"),
    ],
)
def test_values_are_checked(make: Any, option: str) -> None:
    """A value that cannot be is told by its option."""
    with pytest.raises(UsageError, match=option):
        make()


FULL = Revision(
    "one",
    3,
    "sha256:00",
    resources=Resources(2, "8Gi", 1, "nvidia-t4", spot=True),
    autoscaling=Autoscaling(0, 4, 2, "cortex"),
    serving=Serving(2, 5, 3.5, 8080, ("https://a", "*"), public=True),
    owner="ada",
    notebook="/n.ipynb",
    created=1.5,
    secrets=("A",),
    variables=("B",),
    stopped=True,
)


@pytest.mark.parametrize("revision", [FULL, Revision("one", 1, "sha256:00")])
def test_a_revision_goes_through_json(revision: Revision) -> None:
    """What is written is read as the same."""
    assert Revision.from_json(json.loads(json.dumps(revision.to_json()))) == revision


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"number": 9}, True),
        ({"created": 9.0}, True),
        ({"autoscaling": Autoscaling(2, 2)}, True),
        ({"bundle": "sha256:11"}, False),
        ({"serving": Serving(queue=1)}, False),
        ({"resources": Resources(cpus=2)}, False),
        ({"secrets": ("C",)}, False),
        ({"variables": ("C",)}, False),
    ],
)
def test_what_needs_new_replicas(changes: dict[str, Any], same: bool) -> None:  # noqa: FBT001 - a parameter
    """Only numbers of Replicas and of the Revision itself leave running Replicas as they are."""
    assert FULL.same_replicas(dataclasses.replace(FULL, **changes)) is same


def test_status_as_json() -> None:
    """Plain data, with the rows of the interface."""
    row = Status("one", "local", phase=Phase.IDLE, ready=1, desired=2, in_flight=3).to_json()
    assert json.loads(json.dumps(row)) == row
    assert (row["phase"], row["replicas"], row["autoscaling"]["in_flight"]) == ("idle", {"ready": 1, "desired": 2}, 3)
