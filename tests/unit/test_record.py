from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from nbdeploy.engines.kubernetes.record import KEPT, SUMMARY, Kept, Record, read, read_summary, root, summary
from nbdeploy.errors import EngineError
from nbdeploy.spec import Autoscaling, Resources, Revision, Serving

DIGEST = "sha256:" + "0" * 64
NAME = "sentiment"


def _kept(number: int, *, image: str = "r.test/a@sha256:1", **fields: Any) -> Kept:
    first = Revision(NAME, number, DIGEST, owner="Ada Lovelace <ada@x>", notebook="/home/ada/ü.ipynb")
    return Kept(dataclasses.replace(first, **fields), image, memory=1 << 30, secrets_object="nbd-sentiment-env-1")


def _served(*rows: Kept) -> Record:
    record = Record(NAME)
    for row in rows:
        record = record.with_revision(row).committed(row.revision.number)
    return record


def test_round_trip() -> None:
    """What is written to the ConfigMap is read back, whatever the owner and the paths are called."""
    full = dataclasses.replace(
        _kept(1, resources=Resources(2.5, "4Gi", 1, "NVIDIA-L4", spot=True), serving=Serving(cors=("https://a",))),
        foreign_secrets={"TOKEN": ("team", "token")},
        variables={"MODE": "ünïcode $(X)"},
    )
    record = _served(full).with_revision(_kept(2, image="r.test/a@sha256:2"))
    configmap = root(record, "models", uid="u-1", resource_version="17")
    assert read(json.loads(json.dumps(configmap))) == record
    assert configmap["metadata"]["resourceVersion"] == "17"
    assert "resourceVersion" not in root(record, "models")["metadata"]


def test_summary_needs_metadata_alone() -> None:
    """A listing reads the annotation and nothing else; it tells of the Revision that is to be."""
    record = _served(_kept(1, autoscaling=Autoscaling(0, 3), stopped=True)).with_revision(_kept(2))
    metadata = {"metadata": root(record, "models")["metadata"]}
    read_back = read_summary(metadata)
    assert read_back == summary(record)
    assert (read_back.serving, read_back.under_way, read_back.stopped) == (1, 2, True)
    assert read_back.autoscaling == Autoscaling(0, 3)
    assert read_back.owner == "Ada Lovelace <ada@x>"


def test_only_the_number_of_replicas_keeps_the_template() -> None:
    """Scale, stop and start keep the Replicas and all they are made of; anything else makes new ones."""
    record = _served(_kept(1))
    scaled = dataclasses.replace(_kept(2, autoscaling=Autoscaling(2, 5)), memory=7 << 30)
    record = record.with_revision(scaled).committed(2)
    assert record.current is not None
    assert (record.current.template, record.current.memory) == (1, 1 << 30)
    record = record.with_revision(_kept(3, autoscaling=Autoscaling(2, 5), stopped=True)).committed(3)
    assert record.current is not None
    assert record.current.template == 1


@pytest.mark.parametrize(
    "other",
    [
        _kept(2, image="r.test/a@sha256:2"),
        _kept(2, bundle="sha256:" + "1" * 64),
        _kept(2, serving=Serving(timeout=5)),
        _kept(2, resources=Resources(2)),
        dataclasses.replace(_kept(2), secrets_object="nbd-sentiment-env-2"),
        dataclasses.replace(_kept(2), variables={"A": "1"}),
        dataclasses.replace(_kept(2), foreign_secrets={"A": ("b", "c")}),
    ],
    ids=["image", "bundle", "serving", "resources", "secrets", "variables", "foreign"],
)
def test_another_make_is_another_template(other: Kept) -> None:
    """A change that Replicas must see gives them a template of their own."""
    current = _served(_kept(1), other).current
    assert current is not None
    assert current.template == 2


def test_a_failed_revision_leaves_the_record_as_it_was() -> None:
    """A Revision that never served is gone, as if it had not been, and the owner is who serves."""
    before = _served(_kept(1))
    record = before.with_revision(_kept(2, image="r.test/a@sha256:2", owner="Bob", notebook="b"))
    assert (record.under_way, record.serving, record.owner) == (2, 1, "Bob")
    after = record.without(2)
    assert after == before
    assert [revision.number for revision in after.revisions()] == [1]


def test_revisions() -> None:
    """The one under way is not yet history, and never is if the deploy that made it was killed."""
    killed = Record(NAME).with_revision(_kept(1))
    assert killed.revisions() == []
    assert [one.number for one in killed.with_revision(_kept(2)).committed(2).revisions()] == [2]
    assert [one.number for one in _served(_kept(1)).with_revision(_kept(2)).revisions()] == [1]
    assert Record(NAME).current is None


def test_prune() -> None:
    """The newest Revisions are kept, and with them the Secrets they need; the others are to be deleted."""
    rows = [dataclasses.replace(_kept(n, image=f"i@{n}"), secrets_object=f"s-{n}") for n in range(1, KEPT + 4)]
    record = _served(*rows)
    assert [one.number for one in record.revisions()] == list(range(4, KEPT + 4))
    assert record.secrets_objects() == {f"s-{n}" for n in range(4, KEPT + 4)}
    assert record.find(3) is None


def test_a_thousand_variables_fit() -> None:
    """Ten Revisions with a long environment stay below the megabyte of a ConfigMap."""
    variables = {f"NAME_{n}": "x" * 40 for n in range(1000)}
    rows = [dataclasses.replace(_kept(n, image=f"i@{n}"), variables=variables) for n in range(1, KEPT + 1)]
    assert len(json.dumps(root(_served(*rows), "models"))) < 1_000_000


def test_unreadable_content_names_the_object() -> None:
    """What somebody else made, changed, or a newer nbdeploy wrote is an error that names the ConfigMap."""
    whole = root(_served(_kept(1)), "models")
    foreign = {**whole, "metadata": {**whole["metadata"], "labels": {"app": "x"}}}
    with pytest.raises(EngineError, match="nbd-sentiment in the namespace models was not made by nbdeploy"):
        read(foreign)
    with pytest.raises(EngineError, match="was not made by nbdeploy"):
        read_summary(foreign)
    for data in ({}, {"record.json": "{"}, {"record.json": "[]"}, {"record.json": '{"format": 1}'}, None):
        with pytest.raises(EngineError, match=r"nbd-sentiment .* cannot be read .* nbdeploy delete sentiment"):
            read({**whole, "data": data})
    newer = json.dumps({**json.loads(whole["data"]["record.json"]), "format": 2})
    with pytest.raises(EngineError, match="newer nbdeploy"):
        read({**whole, "data": {"record.json": newer}})
    spoiled = {**whole["metadata"], "annotations": {SUMMARY: "x"}}
    with pytest.raises(EngineError, match="cannot be read"):
        read_summary({**whole, "metadata": spoiled})
