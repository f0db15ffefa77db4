"""What a cell shows while a deploy runs: one block that is updated in place, and at the end replaced by the card.

It is given to `deploy()` as `on_event`. In a notebook it uses a display with an id, which works without ipywidgets and
survives the kernel; anywhere else it prints a line when a step ends.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar

import click

from nbdeploy.jobs import STEPS
from nbdeploy.notebook import card
from nbdeploy.notebook.card import STYLE, amount, clip, duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdeploy.jobs import Event

__all__ = ["Progress", "in_notebook"]

_SENTENCE = re.compile(r"(?<=\.) (?=[A-Z][a-z])|; ")  # between two sentences
_INTERVAL = 0.1  # seconds between updates of a running step whose words stay
_MARKS = {
    "running": ("▸", "nbd-run"),
    "done": ("✓", "nbd-ok"),
    "failed": ("✗", "nbd-bad"),
    "cancelled": ("✗", "nbd-warn"),
    "note": ("▲", "nbd-warn"),
}


@dataclass
class _Step:
    """A line of the block."""

    name: str
    state: str
    detail: str
    seconds: float = 0.0
    amount: tuple[float, float, float] | None = None  # bytes, total, bytes per second


class Progress:
    """Shows the events of one deploy; call it with each of them.

    Args:
        name, engine: of the Endpoint, "" where not known yet.
        notebook: whether there is a front end that updates displays; None finds out.

    Attributes:
        card: what the last event brought, or None.
        latest: the cell's number and the Endpoint's name of the block shown last, so that no cell shows both it and
            the Endpoint that its deploy returned.
    """

    latest: ClassVar[tuple[int, str] | None] = None

    def __init__(self, name: str = "", engine: str = "", *, notebook: bool | None = None) -> None:
        self.card: Mapping[str, Any] | None = None
        self._name, self._engine = name, engine
        self._notebook = in_notebook() if notebook is None else notebook
        self._steps: dict[str, _Step] = {}
        self._notes: list[str] = []
        self._failure = ""
        self._handle: Any = None
        self._shown_at = 0.0
        self._shown_words: dict[str, str] = {}
        self._printed: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Take one event and show it."""
        if event.step == "job":
            self._take_end(event)
        else:
            self._take_step(event)
        if not self._notebook:
            self._print()
        elif event.state != "running" or self._due(event):
            self._show()

    def note(self, words: str) -> None:
        """Add a remark under the steps."""
        self._note(words)
        if self._notebook:
            self._show()
        else:
            self._print()

    def fail(self, message: str) -> None:
        """Show in place that the deploy ended with an error that no event told; nothing if nothing was shown yet."""
        if self._failure or self.card is not None or not self._steps:
            return
        self._end(message, "failed")
        if self._notebook:
            self._show()
        else:
            self._print()

    def html(self) -> str:
        """Return the block, or the card once there is one."""
        if self.card is not None:
            return card.html(self.card)
        title = self._title()
        rows = "".join(_row(step) for step in self._steps.values())
        notes = "".join(
            f'<li><span class="nbd-warn">▲</span> <b></b> <span>{escape(n)}</span></li>' for n in self._notes
        )
        tone = "nbd-bad" if self._failure else "nbd-run"
        first, *rest = title
        return (
            f'<section class="nbd" aria-label="Deploying {escape(first)}">{STYLE}'
            f'<p class="nbd-head"><span class="{tone}" aria-hidden="true">{"✗" if self._failure else "●"}</span> '
            f'<b>{escape(first)}</b> <span class="nbd-m">{escape(" · ".join(rest))}</span></p>'
            f'<ul class="nbd-ul nbd-steps">{rows}{notes}{self._way_back()}</ul></section>'
        )

    def _way_back(self) -> str:
        """What helps whoever finds this block in a notebook whose kernel is gone: nothing updates it any more."""
        if self._failure or self._notes or not self._name or not self._steps.keys() - {STEPS[0]}:
            return ""
        words = f"goes on without this kernel: <code>nbdeploy status {escape(clip(self._name, 63))}</code>"
        return f'<li><span></span> <b></b> <span class="nbd-m">{words}</span></li>'

    def text(self) -> str:
        """Return the same as plain text."""
        if self.card is not None:
            return card.text(self.card)
        head = f"{'✗' if self._failure else '●'} {' · '.join(self._title())}"
        return "\n".join([head, *map(_line, self._steps.values()), *(f"  ▲ {note}" for note in self._notes)])

    def _title(self) -> list[str]:
        return [part for part in (clip(self._name or "deploy", 63), clip(self._engine, 63)) if part]

    def _take_step(self, event: Event) -> None:
        self._name = str(event.data.get("name") or self._name)
        self._engine = str(event.data.get("engine") or self._engine)
        if event.state == "note":
            self._note(event.detail)
            return
        known = self._steps.get(event.step)
        # A late "running" must not undo an end, and an end without words keeps those of the way.
        if known is not None and known.state != "running" and event.state == "running":
            return
        detail = clip(event.detail, 300) or (known.detail if known else "")
        total = float(event.data.get("total") or 0)
        size = (float(event.data.get("bytes") or 0), total, float(event.data.get("rate") or 0)) if total > 0 else None
        self._steps[event.step] = _Step(event.step, event.state, detail, event.seconds, size)

    def _take_end(self, event: Event) -> None:
        if event.state == "note":
            self._note(event.detail)
        elif event.state == "done":
            self.card = event.data.get("card")
        elif event.ends:
            self._end(event.detail, event.state)

    def _end(self, message: str, state: str) -> None:
        """Mark the step that was running, or the one that would have come, as the one that ended it all."""
        # One sentence: the error under the block tells all of it.
        self._failure = clip(_SENTENCE.split(message.partition("\n")[0], maxsplit=1)[0], 200) or state
        running = [step for step in self._steps.values() if step.state == "running"]
        for step in running:
            step.state, step.detail, step.amount = state, self._failure, None
        if not running and not any(step.state == state for step in self._steps.values()):
            following = [
                name for name in STEPS if name not in self._steps and name != "pushed"
            ]  # not every engine pushes
            name = following[0] if following else "job"
            self._steps[name] = _Step(name, state, self._failure)

    def _note(self, detail: str) -> None:
        note = clip(detail, 300)
        if note and note not in self._notes:
            self._notes.append(note)

    def _due(self, event: Event) -> bool:
        """Whether a running step is to be shown now: new words at once, numbers ten times a second at most.

        Words may be the last for minutes ("No node takes …"), so none may be dropped.
        """
        step = self._steps.get(event.step)
        new = step is not None and self._shown_words.get(event.step) != step.detail
        return new or time.monotonic() - self._shown_at >= _INTERVAL

    def _show(self) -> None:
        from IPython import get_ipython
        from IPython.display import display

        self._printed.update(self._steps)
        self._shown_words = {name: step.detail for name, step in self._steps.items()}
        self._shown_at = time.monotonic()
        bundle = {"text/html": self.html(), "text/plain": self.text()}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
            Progress.latest = (getattr(get_ipython(), "execution_count", 0), self._name)
        else:
            self._handle.update(bundle, raw=True)

    def _print(self) -> None:
        """Print the lines that have become final and were not printed yet."""
        if self.card is not None:
            self._say("card", "\n" + self.text() if self._printed else self.text())
            return
        self._say("title", f"● {' · '.join(self._title())}")
        for step in self._steps.values():
            if step.state != "running":
                self._say(step.name, _line(step))
            elif step.detail.endswith("."):  # a sentence tells what is in the way, perhaps for minutes
                self._say(f"{step.name} {step.detail}", _line(step))
        for note in self._notes:
            self._say(f"note {note}", f"  ▲ {note}")

    def _say(self, what: str, line: str) -> None:
        if what not in self._printed:
            self._printed.add(what)
            click.echo(line)


def in_notebook() -> bool:
    """Whether this process is a kernel, whose front end can update a display."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def _row(step: _Step) -> str:
    mark, tone = _MARKS.get(step.state, _MARKS["running"])
    bar = ""
    if step.amount is not None and step.state == "running":
        done, total, _ = step.amount
        bar = f' <progress max="{total:.0f}" value="{done:.0f}" aria-label="{escape(step.name)}"></progress>'
        bar += f" {_sizes(step)}"
    took = duration(step.seconds) if step.seconds and step.state != "running" else ""
    return (
        f'<li><span class="{tone}" title="{escape(step.state)}">{mark}</span> <b>{escape(step.name)}</b> '
        f'<span>{escape(step.detail)}{bar}</span> <span class="nbd-m">{took}</span></li>'
    )


def _line(step: _Step) -> str:
    mark, _ = _MARKS.get(step.state, _MARKS["running"])
    parts = [step.detail]
    if step.amount is not None and step.state == "running":
        filled = round(20 * min(1.0, step.amount[0] / step.amount[1]))
        parts.append(f"{'━' * filled}{'─' * (20 - filled)} {_sizes(step)}")
    if step.seconds and step.state != "running":
        parts.append(duration(step.seconds))
    return f"  {mark} {step.name:<10} {' · '.join(part for part in parts if part)}".rstrip()


def _sizes(step: _Step) -> str:
    done, total, rate = step.amount or (0.0, 0.0, 0.0)
    return f"{amount(done)} of {amount(total)}" + (f" · {amount(rate)}/s" if rate else "")
