"""What a verification means: a table of reports and the words for them."""

from __future__ import annotations

from typing import Any

import pytest

from nbdeploy.verdict import Verdict, judge


def report(**changes: Any) -> dict[str, Any]:
    """Return the report of a clean process that answered equally."""
    parity = {"equal": True, "max_difference": 0.0, "path": "", "expected": "1", "actual": "1", "reason": ""}
    parity.update(changes.pop("parity", {}))
    return {"ok": True, "stage": "done", "deterministic": True, "parity": parity, "runs": 2, "model": {}, **changes}


def different(reason: str = "other numbers", actual: str = "2", **changes: Any) -> dict[str, Any]:
    """Return the report of one that answered otherwise."""
    parity = {"equal": False, "reason": reason, "actual": actual, "path": '["score"]', "max_difference": None}
    return report(parity=parity, same_seed_same_answer=True, **changes)


TABLE = [
    ("equal", report(), None, "equal", "equal, max |Δ| 0"),
    ("nearly", report(parity={"max_difference": 3e-7}), None, "equal", "max |Δ| 3e-07"),
    ("random", report(deterministic=False), None, "equal", "changes with the random seed"),
    (
        "dropout",
        report(deterministic=False, model={"train_mode": True}),
        None,
        "equal",
        "the model is in train mode",
    ),
    ("no live answer", report() | {"parity": None}, None, "not compared", "no live answer"),
    (
        "differs from itself",
        different(deterministic=False) | {"same_seed_same_answer": False},
        None,
        "not deterministic",
        "differently each time",
    ),
    (
        "differs from process to process",
        different(actual="2"),
        different(actual="3"),
        "not deterministic",
        "from process to process",
    ),
    (
        "order of a set",
        different(reason="the same items in another order", actual="[2, 1]"),
        different(reason="the same items in another order", actual="[1, 2]"),
        "differs in order",
        "hash seed",
    ),
    (
        "another order, the same in both",
        different(reason="the same items in another order", actual="[2, 1]"),
        different(reason="the same items in another order", actual="[2, 1]"),
        "differs in order",
        "hash seed",
    ),
]


@pytest.mark.parametrize(
    ("given", "second", "state", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_table(given: dict[str, Any], second: dict[str, Any] | None, state: str, words: str) -> None:
    """Each report has its verdict; none of these stops the deploy."""
    verdict = judge(given, has_sample=True)
    if second is not None:
        assert verdict.needs_second_process
        verdict = judge(given, has_sample=True, second=second)
    assert (verdict.state, verdict.error) == (state, "")
    assert words in verdict.words
    assert not verdict.needs_second_process


def test_no_sample() -> None:
    """Without a sample the Bundle was only loaded."""
    verdict = judge(report(), has_sample=False)
    assert (verdict.state, verdict.places) == ("unverified", ("clean process",))
    assert "no sample" in verdict.words


def test_different() -> None:
    """The same other answer in two clean processes is an error: where, both values, and the next step."""
    verdict = judge(different(), has_sample=True, second=different())
    assert verdict.state == "different"
    assert not verdict.needs_second_process
    for word in ('answer["score"]', "gave 1", "clean process 2", "--setup"):
        assert word in verdict.error


@pytest.mark.parametrize(
    ("stage", "reason", "words"),
    [
        ("load", "ModuleNotFoundError: No module named 'helpers'", ["does not load", "helpers", "install it"]),
        ("predict", "ImportError: cannot import name 'x' from 'y'", ["fails in a clean process", "install it"]),
        ("predict", "FileNotFoundError: [Errno 2] No such file or directory: 'a.txt'", ["a.txt", "--file"]),
        ("predict", "KeyError: 'TOKEN'", ["TOKEN", "--env", "--secret"]),
        ("predict", "AttributeError: module 'm' has no attribute 'x'", ["state outside its objects", "--setup"]),
        ("open", "the blob sha256:12 is damaged.", ["does not load", "damaged"]),
    ],
)
def test_failures_have_a_next_step(stage: str, reason: str, words: list[str]) -> None:
    """What fails only in the clean process is told with the likeliest remedy and the notebook's lines."""
    given = {"ok": False, "stage": stage, "reason": reason, "lines": ["cell 1, line 2: x"]}
    verdict = judge(given, has_sample=True)
    assert verdict.state == "failed"
    for word in [*words, "cell 1, line 2: x"]:
        assert word in verdict.error
    assert ".." not in verdict.error


def test_a_failing_second_process() -> None:
    """Where the other clean process dies, the difference stands."""
    broken = {"ok": False, "stage": "predict", "reason": "x", "lines": []}
    assert judge(different(), has_sample=True, second=broken).state == "different"


def test_reached() -> None:
    """A further place that answers equally is added, with the larger difference."""
    verdict = Verdict("equal", 1e-6, ("live",)).reached("replica", 1e-5).with_note("a").with_note("b")
    assert (verdict.places, verdict.max_difference, verdict.note) == (("live", "replica"), 1e-5, "a; b")
    assert verdict.notes == ["a; b"]
    assert Verdict("equal").notes == []
