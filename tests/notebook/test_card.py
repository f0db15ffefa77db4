"""The card: complete, escaped, without a key, small, and readable as text."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from nbdeploy.notebook.card import amount, duration, endpoint_html, endpoint_text, html, text
from nbdeploy.spec import Phase, Status

EVIL = "<script>alert('x')</script><img src=x onerror=\"go()\">"
CARD: dict[str, Any] = {
    "name": "sentiment",
    "engine": "local",
    "revision": 3,
    "url": "http://127.0.0.1:40123",
    "notebook_url": None,
    "call": "predict(model ← clf, text)",
    "parameters": [{"name": "text", "required": True, "schema": {"type": "string"}}],
    "streams": False,
    "sample": "text='fine'",
    "runs": 3,
    "receipt": {
        "functions": ["predict", "clean"],
        "modules": [{"name": "utils.py", "files": 1, "bytes": 210}],
        "globals": [{"name": "LABELS", "kind": "list", "bytes": 120}],
        "model": {"name": "clf", "kind": "SVC", "bytes": 438000000},
        "blobs": {"count": 201, "new": 0, "bytes": 438000000, "new_bytes": 0},
        "skeleton_bytes": 14000,
        "distributions": 14,
        "variables": ["KERAS_BACKEND"],
        "secrets": ["OPENAI_API_KEY"],
        "files": ["labels.txt"],
        "left_behind": ["X_train (never reached by predict)"],
        "notes": ["cell edited after it ran"],
    },
    "parity": {"state": "equal", "max_difference": 0.0, "places": ["live", "clean process", "replica"], "note": ""},
    "changed": "predict changed · 0 of 201 blobs new, 14 kB",
    "request_ms": 4.1,
    "public": False,
    "key_command": "nbdeploy key sentiment",
    "replicas": {"ready": 1, "desired": 1},
    "cost": {"now_per_hour": 0.35, "max_per_hour": 0.7},
    "seconds": 2.3,
    "dry_run": False,
}


class Page(HTMLParser):
    """Reads HTML back: its text, its tags, and whether they are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"br", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def changed(**values: Any) -> dict[str, Any]:
    """The card with other values."""
    return {**copy.deepcopy(CARD), **values}


FACTS = [
    "sentiment", "local · revision 3", "http://127.0.0.1:40123", "predict(model ← clf, text)", "text='fine'",
    "stored with the Bundle", "ran 3 times", "live = clean process = replica", "max |Δ| 0", "1 of 1 replica",
    "real request 4.1 ms", "0 of 201 blobs new, 14 kB", "0.35 now, 0.70 at most", "nbdeploy key sentiment",
    "cell edited after it ran", "clf (SVC, 438 MB)", "201 blobs", "utils.py", "LABELS", "14 distributions",
    "labels.txt", "KERAS_BACKEND", "OPENAI_API_KEY", "X_train (never reached by predict)",
]  # fmt: skip


@pytest.mark.parametrize("fact", FACTS)
def test_html_and_text_tell_every_fact(fact: str) -> None:
    """What the card promises stands in both forms."""
    assert fact in Page(html(CARD)).text
    assert fact in text(CARD)


def test_the_html_is_one_static_piece() -> None:
    """Balanced tags, no script, nothing loaded from elsewhere, and at most 12 kB."""
    source = html(CARD)
    page = Page(source)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in source
    assert "url(" not in source
    assert len(source.encode()) <= 12_000


def test_without_style_and_script_nothing_is_dead() -> None:
    """Copy buttons are hidden until the style shows them: a notebook that is not trusted has neither."""
    buttons = [attributes for tag, attributes in Page(html(CARD)).tags if tag == "button"]
    assert len(buttons) == 4
    assert all("hidden" in attributes and attributes["aria-label"] for attributes in buttons)


def test_snippets_call_the_endpoint_with_the_sample() -> None:
    """curl, Python and JavaScript, each with the sample's arguments and the key by command."""
    said = Page(html(CARD)).text
    assert "nbdeploy.connect(\"sentiment\")(text='fine')" in said
    assert "curl http://127.0.0.1:40123/predict" in said
    assert '-H "Authorization: Bearer $(nbdeploy key sentiment)"' in said
    assert """-d '{"text": "fine"}'""" in said
    assert 'fetch("http://127.0.0.1:40123/predict"' in said
    assert "`Bearer ${process.env.NBDEPLOY_KEY}`" in said


def test_public_endpoints_have_no_key_in_their_snippets() -> None:
    """--public: no header, and the card says so."""
    said = Page(html(changed(public=True))).text
    assert "Bearer" not in said
    assert "public: no key is asked" in said


def test_streams_are_read_as_they_come() -> None:
    """Generators get snippets that stream."""
    said = Page(html(changed(streams=True))).text
    assert 'for piece in nbdeploy.connect("sentiment").stream(text=' in said
    assert "curl -N" in said
    assert "text/event-stream" in said


def test_what_is_no_literal_is_made_up_from_the_schema() -> None:
    """An array as sample: Python names a variable, JSON shows the shape."""
    schema = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    parameters = [
        {"name": "x", "required": True, "schema": schema},
        {"name": "k", "required": False, "schema": {"type": "integer"}},
    ]
    said = Page(html(changed(sample="x=array([[1., 2.]])", parameters=parameters))).text
    assert 'nbdeploy.connect("sentiment")(x=x)' in said
    assert """-d '{"x": [[1.0]]}'""" in said


def test_quotes_survive_the_shell() -> None:
    """A sample with quotes gives a curl line that works."""
    said = Page(html(changed(sample='text="it\'s"'))).text
    assert """-d '{"text": "it'"'"'s"}'""" in said


def test_everything_is_escaped() -> None:
    """No text of the user becomes a tag, wherever it stands."""

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return EVIL if isinstance(value, str) else value

    for card in (
        spoil(CARD),
        {**spoil(CARD), "parity": {"state": "equal", "places": [EVIL]}, "url": "javascript:go()"},
    ):
        page = Page(html(card))
        assert not {tag for tag, _ in page.tags} & {"script", "img"}
        assert not any("onerror" in attributes for _, attributes in page.tags)
        assert not any(str(attributes.get("href", "")).startswith("javascript") for _, attributes in page.tags)
        assert not page.open


def test_a_huge_receipt_stays_small() -> None:
    """Hundreds of long names are counted, not listed; text and HTML stay short."""
    long = [f"{'very' * 100}{i}" for i in range(500)]
    receipt = {
        **CARD["receipt"],
        "functions": long,
        "globals": [{"name": name, "kind": name, "bytes": 1} for name in long],
        "modules": [{"name": name, "files": 1, "bytes": 1} for name in long],
        "left_behind": long,
        "notes": long,
        "files": long,
        "variables": long,
        "secrets": long,
    }
    source = html(changed(receipt=receipt, sample=f"text='{'a' * 5000}'", changed="c" * 999, call="p" * 999))
    assert re.search(r"and 49\d more", source)
    assert len(source.encode()) <= 12_000
    assert len(text(changed(receipt=receipt))) <= 12_000


@pytest.mark.parametrize("state", ["unverified", "not compared", "not deterministic"])
def test_parity_that_is_not_shown_is_not_claimed(state: str) -> None:
    """Only an equal answer gets the chain of equals."""
    card = changed(parity={"state": state, "places": ["live", "replica"], "note": "why"}, sample=None)
    assert f"▲ {state} · why" in text(card)
    assert "live = " not in Page(html(card)).text


def test_a_dry_run_says_that_nothing_was_deployed() -> None:
    """No URL, no key, no replicas; what would travel is there."""
    card = changed(dry_run=True, url="", revision=0)
    for said in (Page(html(card)).text, text(card)):
        assert "nothing was deployed" in said
        assert "nbdeploy key" not in said
        assert "201 blobs" in said


def test_unknown_costs_are_left_out() -> None:
    """No price in the settings: no row."""
    assert "Cost" not in Page(html(changed(cost={"now_per_hour": None, "max_per_hour": None}))).text


def test_the_hub_gets_its_own_url() -> None:
    """Where 127.0.0.1 is not the user's machine, the reachable URL stands beside it."""
    card = changed(notebook_url="https://hub/user/me/nbdeploy/proxy/sentiment")
    assert 'href="https://hub/user/me/nbdeploy/proxy/sentiment/docs"' in html(card)
    assert "in your browser: https://hub/" in text(card)


def test_an_endpoint_has_a_compact_card() -> None:
    """Phase, reason, URL, replicas and how to call it."""
    status = Status("sentiment", "local", "http://127.0.0.1:1", 2, Phase.FAILED, f"out of memory {EVIL}", desired=2)
    page = Page(endpoint_html(status))
    for said in (page.text, endpoint_text(status)):
        assert re.search(r"failed.*out of memory", said, re.DOTALL)
        assert "http://127.0.0.1:1" in said
        assert "0 of 2" in said
        assert 'nbdeploy.connect("sentiment")(…)' in said
    assert "script" not in {tag for tag, _ in page.tags}


def test_sizes_and_times_read_like_a_persons() -> None:
    """Two or three digits and a unit."""
    assert [amount(n) for n in (0, 999, 1000, 14000, 438e6, 1.26e9, 5e15)] == [
        "0 B", "999 B", "1.0 kB", "14 kB", "438 MB", "1.3 GB", "5000 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (None, 0.0041, 0.21, 2.34, 185)] == ["", "4.1 ms", "0.21 s", "2.3 s", "3 min 5 s"]
