"""What a verification means, in the user's words; pure.

Parity compares three places: the notebook (live), a clean process, a Replica. Where they differ, the reason is sought:
a random or train-mode predict, an order that depends on the hash seed, or state outside the captured objects.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification.

    Attributes:
        state: "equal", "unverified" (no sample, or skipped), "not compared" (no live answer), "not deterministic",
            "differs in order", "different" or "failed".
        max_difference: largest absolute difference of numbers between the places.
        places: where the sample was answered.
        note: one sentence, or "".
        error: message of the failure, or "".
        random: predict's answer changes with the random seed.
        needs_second_process: the difference can be explained only by another clean process.
    """

    state: str
    max_difference: float = 0.0
    places: tuple[str, ...] = ()
    note: str = ""
    error: str = ""
    random: bool = False
    needs_second_process: bool = False

    @property
    def words(self) -> str:
        """The line of the step "verified"."""
        if self.state == "equal":
            note = f" · {self.note}" if self.note else ""
            who = " and ".join(self.places[1:]) or "clean process"
            return f"{who} answered the sample: equal, max |Δ| {self.max_difference:.3g}{note}"
        if self.state == "unverified":
            return self.note or "loads in a clean process; no sample, so no answer was compared"
        if self.state == "not compared":
            return "clean process answered the sample; there is no live answer to compare with"
        return f"clean process answered the sample: {self.note or self.state}"

    @property
    def notes(self) -> list[str]:
        """Notes for the receipt."""
        return [self.note] if self.note else []

    def reached(self, place: str, difference: float) -> Verdict:
        """Return the verdict with one more place that answered equally."""
        return dataclasses.replace(
            self, places=(*self.places, place), max_difference=max(self.max_difference, difference)
        )

    def with_note(self, note: str) -> Verdict:
        """Return the verdict with a sentence added."""
        return dataclasses.replace(self, note="; ".join(part for part in (self.note, note) if part))


_STATE_OUTSIDE = (
    "Something that predict needs does not travel with it: state outside its objects, such as a registry, an extension "
    "or a global of a library that a cell of this notebook changed. Do it inside predict, in a module that predict "
    "imports, or in the function for --setup."
)
_EACH_TIME = "predict answers the same sample differently each time"


def judge(report: Mapping[str, Any], *, has_sample: bool, second: Mapping[str, Any] | None = None) -> Verdict:
    """Judge the report of a clean process; `second` is that of another one, where the first was unclear."""
    if not report["ok"]:
        return Verdict("failed", error=_failure(report))
    model = report.get("model") or {}
    train = "; the model is in train mode (model.eval() ends that)" if model.get("train_mode") else ""
    if not has_sample:
        return Verdict("unverified", places=("clean process",))
    random = not report.get("deterministic", True)
    same = report.get("same_seed_same_answer", True)
    how = "predict's answer changes with the random seed" if same else _EACH_TIME
    random_note = f"not deterministic: {how}{train}" if random else ""
    found = report.get("parity")
    if found is None:
        return Verdict("not compared", places=("clean process",), note=random_note, random=random)
    if found["equal"]:
        note = random_note
        return Verdict("equal", found["max_difference"] or 0.0, ("live", "clean process"), note, random=random)
    order = "order" in found["reason"]
    if not same:
        return Verdict(
            "not deterministic",
            places=("live", "clean process"),
            note=f"not deterministic: {_EACH_TIME}{train}",
            random=True,
        )
    if second is None:
        return Verdict("different", needs_second_process=True)
    again = second.get("parity") or {}
    if second["ok"] and again.get("actual") != found["actual"]:
        words = (
            "the items come in another order in each process: predict iterates over a set, whose order depends on the "
            "hash seed (sort it to have one order)"
            if order
            else "the answer changes from process to process: it depends on the hash seed, the time or the process"
        )
        return Verdict(
            "differs in order" if order else "not deterministic", places=("live", "clean process"), note=words
        )
    if second["ok"] and order:
        words = "the items come in another order than in the notebook: the order of a set depends on the hash seed"
        return Verdict("differs in order", places=("live", "clean process"), note=words)
    where = f"answer{found['path']}"
    return Verdict(
        "different",
        error=(
            f"The clean process answered the sample otherwise than the notebook ({found['reason']}, at {where}): the "
            f"notebook gave {found['expected']}, the clean process {found['actual']}. {_STATE_OUTSIDE}"
        ),
    )


def _failure(report: Mapping[str, Any]) -> str:
    reason = str(report.get("reason", "it gave no reason")).rstrip(".")
    lines = "\n  ".join(report.get("lines") or ())
    tail = f"\n  {lines}" if lines else ""
    if report["stage"] in {"open", "load"}:
        return f"The Bundle does not load in a clean process: {reason}. {_hint(reason)}{tail}"
    return f"predict works in the notebook but fails in a clean process: {reason}. {_hint(reason)}{tail}"


def _hint(reason: str) -> str:
    if "ModuleNotFoundError" in reason or "No module named" in reason or "cannot import name" in reason:
        return (
            "The module was found in the notebook but not outside it: put its file beside the notebook and import it "
            "by name in predict, or install it."
        )
    if "FileNotFoundError" in reason or "No such file" in reason:
        return "Files travel only if they are named: deploy with --file PATH, and open them by that relative path."
    if re.search(r"KeyError: '[A-Z][A-Z0-9_]+'", reason):  # as variables of the environment are named
        return "Environment variables travel only if they are named: --env NAME, or --secret NAME for a secret."
    return _STATE_OUTSIDE
