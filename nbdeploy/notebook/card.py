"""The card of a finished deploy: one static, self-contained piece of HTML, and the same as text.

Static, because a saved widget dies with its kernel. The HTML reads well in three ways: in the colours of JupyterLab or
VS Code where their variables are set, in colours of its own elsewhere (light or dark, always on its own ground), and
without any style, as a notebook that is not trusted shows it. So the order and the elements carry the meaning, and the
copy buttons are `hidden` until the style sheet shows them: where scripts are taken out, so is the style.

Every text comes from the user's names and values, so all of it is escaped, and clipped to keep the notebook small.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

from nbdeploy.notebook import snippets
from nbdeploy.notebook.snippets import clip
from nbdeploy.spec import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nbdeploy.spec import Status

__all__ = ["STYLE", "amount", "clip", "duration", "endpoint_html", "endpoint_text", "html", "text"]

_ROWS = 6  # of a kind in the receipt; the rest is counted
_ADVICE = "no sample was compared: call the function with one request above, or give --sample"
_BYTES = 12_000  # of a card; a notebook may hold many

# Own colours first, then the front end's where it has some. Ground and ink always come from the same source.
STYLE = """<style>
.nbd{--f:#1f2328;--m:#5b626b;--b:#fff;--l:#dcdfe3;--k:#f5f6f8;--a:#1565c0;--s:#2e7d32;
--w:#c25e00;--e:#c62828;--t:#8e2f1b;
font:13px/1.55 var(--jp-ui-font-family,var(--vscode-font-family,system-ui,-apple-system,"Segoe UI",sans-serif));
box-sizing:border-box;width:100%;max-width:720px;border:1px solid var(--nl);border-radius:4px;background:var(--nb);
color:var(--nf);margin:2px 0;overflow:hidden}
@media (prefers-color-scheme:dark){.nbd{--f:#dfe2e6;--m:#9aa2ac;--b:#17191c;--l:#34383e;--k:#202327;--a:#64b5f6;
--s:#81c784;--w:#ffb74d;--e:#ef9a9a;--t:#e8a58f}}
.nbd{--nf:var(--jp-ui-font-color1,var(--vscode-editor-foreground,var(--f)));
--nm:var(--jp-ui-font-color2,var(--vscode-descriptionForeground,var(--m)));
--nb:var(--jp-layout-color1,var(--vscode-editor-background,var(--b)));
--nl:var(--jp-border-color2,var(--vscode-widget-border,var(--l)));
--nk:var(--jp-cell-editor-background,var(--vscode-textCodeBlock-background,var(--k)));
--na:var(--jp-content-link-color,var(--vscode-textLink-foreground,var(--a)));
--ns:var(--jp-success-color1,var(--vscode-testing-iconPassed,var(--s)));
--nw:var(--jp-warn-color1,var(--vscode-editorWarning-foreground,var(--w)));
--ne:var(--jp-error-color1,var(--vscode-errorForeground,var(--e)));
--nt:var(--jp-mirror-editor-string-color,var(--t))}
.nbd *{box-sizing:border-box}
.nbd.nbd code,.nbd pre.nbd-pre{
font:12.5px/1.55 var(--jp-code-font-family,var(--vscode-editor-font-family,ui-monospace,Menlo,monospace));
background:none;color:inherit;padding:0;margin:0;border:0}
.nbd .nbd-head{display:flex;align-items:baseline;gap:8px;padding:9px 14px 0;margin:0}
.nbd .nbd-head b{font-size:15px;font-weight:600}
.nbd .nbd-m,.nbd ul.nbd-ul b{color:var(--nm);font-weight:400}
.nbd .nbd-end{margin-left:auto}
.nbd .nbd-ok{color:var(--ns)}.nbd .nbd-warn{color:var(--nw)}
.nbd .nbd-bad{color:var(--ne)}.nbd .nbd-run{color:var(--na)}
.nbd .nbd-url{display:flex;align-items:center;gap:10px;padding:2px 14px 9px;margin:0}
.nbd.nbd .nbd-url code{font-size:14px}
.nbd a.nbd-a{color:var(--na);text-decoration:none}.nbd a.nbd-a:hover{text-decoration:underline}
.nbd button.nbd-copy{display:inline-block;font:inherit;font-size:11.5px;line-height:18px;color:var(--nm);
background:none;border:1px solid var(--nl);border-radius:3px;padding:0 7px;cursor:pointer}
.nbd button.nbd-copy:hover{color:var(--nf);border-color:var(--nm)}
.nbd :focus-visible{outline:2px solid var(--na);outline-offset:1px}
.nbd .nbd-tabs{border-top:1px solid var(--nl);background:var(--nk);padding:0 14px}
.nbd .nbd-tabs summary,.nbd .nbd-more>summary{cursor:pointer;color:var(--nm);padding:5px 0}
.nbd details[open]>summary,.nbd summary:hover{color:var(--nf)}
.nbd .nbd-snip{position:relative;padding:1px 0 10px}
.nbd .nbd-snip pre.nbd-pre{white-space:pre;overflow-x:auto;padding-right:56px}
.nbd.nbd .nbd-snip code{white-space:inherit}
.nbd .nbd-snip button{position:absolute;right:0;top:0;background:var(--nk)}
.nbd .nbd-str{color:var(--nt)}
@supports selector(::details-content){
.nbd .nbd-tabs{display:grid;grid-template-columns:repeat(3,max-content) minmax(0,1fr);column-gap:18px}
.nbd .nbd-tabs details{display:contents}
.nbd .nbd-tabs details::details-content{grid-row:2;grid-column:1/-1}
.nbd .nbd-tabs details:not([open])::details-content{display:none}
.nbd .nbd-tabs summary{grid-row:1;list-style:none;padding:6px 0 4px;margin-bottom:5px;
border-bottom:2px solid transparent}
.nbd .nbd-tabs [open]>summary{border-color:var(--na)}}
.nbd ul.nbd-ul{list-style:none;margin:0;padding:9px 14px;border-top:1px solid var(--nl)}
.nbd ul.nbd-ul>li{display:grid;grid-template-columns:74px minmax(0,1fr);gap:14px;margin:0 0 2px;overflow-wrap:anywhere}
.nbd .nbd-p{border:1px solid var(--nl);border-radius:9px;padding:0 7px;font-size:12px}
.nbd .nbd-more{border-top:1px solid var(--nl);padding:1px 14px}
.nbd .nbd-more ul.nbd-ul{border:0;padding:2px 0 8px}
.nbd progress{accent-color:var(--na);height:6px;width:110px;margin:0 6px;vertical-align:middle}
.nbd ul.nbd-steps{border:0;padding:2px 14px 9px}
.nbd ul.nbd-steps>li{grid-template-columns:12px 68px minmax(0,1fr) max-content;gap:8px}
@media print{.nbd button.nbd-copy{display:none}}
</style>"""

_COPY = (
    "const b=this,n=b.ariaLabel,c=b.parentNode.querySelector('code');"
    "(navigator.clipboard?navigator.clipboard.writeText(c.textContent):new Promise(d=>{"
    "getSelection().selectAllChildren(c);d(document.execCommand('copy'))}))"
    ".then(()=>{b.ariaLabel=b.textContent='Copied';setTimeout(()=>{b.textContent='Copy';b.ariaLabel=n},1500)})"
)


def html(card: Mapping[str, Any]) -> str:
    """Return the card as HTML of at most 12 kB: where names are many and long, fewer of them are listed."""
    whole = _html(card, _ROWS)
    for rows in range(_ROWS - 1, 0, -1):
        if len(whole.encode()) <= _BYTES:
            break
        whole = _html(card, rows)
    return whole


def _html(card: Mapping[str, Any], limit: int) -> str:
    name = clip(card["name"], 63)
    parts = [
        f'<section class="nbd" aria-label="Endpoint {escape(name)}">{STYLE}',
        _head(name, _where(card), "✓", "nbd-ok", duration(card.get("seconds")), dry_run=bool(card.get("dry_run"))),
        _address(card),
    ]
    if card.get("url"):
        parts.append(_tabs(card))
    parts.append(_facts(_rows(card, limit)))
    parts.append(_receipt(card.get("receipt") or {}, limit))
    return "".join([*parts, "</section>"])


def text(card: Mapping[str, Any]) -> str:
    """Return the card as plain text, for terminals and `text/plain`."""
    took = "" if card.get("dry_run") else duration(card.get("seconds"))
    lines = [f"✓ {clip(card['name'], 63)} · {_where(card)}{_sep(took and f'ready in {took}')}"]
    if card.get("dry_run"):
        lines.append("  dry run: nothing was deployed")
    elif card.get("url"):
        lines.append(f"  {clip(card['url'], 300)}")
    if card.get("notebook_url"):
        lines.append(f"  in your browser: {clip(card['notebook_url'], 300)}")
    rows = [(label.lower(), _plain(value)) for label, value in _rows(card)]
    if card.get("url"):
        rows.append(("python", snippets.call(card)))
    rows += [(label.lower(), _plain(value)) for label, value in _receipt_rows(card.get("receipt") or {})]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join([*lines, *(f"  {label:<{width}}{value}" for label, value in rows)])


def endpoint_html(status: Status) -> str:
    """Return the compact card of an Endpoint that a later cell shows."""
    name = clip(status.name, 63)
    mark, tone = _PHASES.get(status.phase, ("●", "nbd-m"))
    card = {"name": name, "url": status.url, "public": status.public}
    phase = f'<span class="{tone}">{escape(str(status.phase))}</span>'
    reason = f" · {escape(clip(status.reason, 300))}" if status.reason else ""
    rows = [("Phase", phase + reason)]
    if status.revision:  # else nothing of it serves: it was deleted, or its first deploy is under way
        rows.append(("Replicas", f"{status.ready} of {status.desired}"))
        rows.append(("Call", _code(f'nbdeploy.connect("{name}")(…)')))
    where = _where({"engine": status.engine, "revision": status.revision})
    return (
        f'<section class="nbd" aria-label="Endpoint {escape(name)}">{STYLE}'
        f"{_head(name, where, mark, tone, '')}{_address(card)}{_facts(rows)}</section>"
    )


def endpoint_text(status: Status) -> str:
    """Return the same as plain text."""
    mark, _ = _PHASES.get(status.phase, ("●", ""))
    where = _where({"engine": status.engine, "revision": status.revision})
    head = f"{mark} {clip(status.name, 63)} · {where} · {status.phase}{_sep(clip(status.reason, 300))}"
    if not status.revision:  # nothing of it serves
        return head
    served = f"{clip(status.url, 300) or 'no URL yet'} · {status.ready} of {_count(status.desired, 'replica')}"
    return f'{head}\n  {served}\n  nbdeploy.connect("{clip(status.name, 63)}")(…)'


def amount(size: float) -> str:
    """Write bytes as people do: 120 B, 14 kB, 4.2 MB."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:  # noqa: PLR2004 - would be written as 1000
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 9.95 else f"{value:.1f} {units[0]}"  # noqa: PLR2004


def duration(seconds: float | None) -> str:
    """Write seconds as people do: 4.1 ms, 0.21 s, 2.3 s, 3 min 5 s; "" for None."""
    if seconds is None:
        return ""
    if seconds < 0.1:  # noqa: PLR2004 - below, milliseconds say more
        return f"{seconds * 1000:.2g} ms"
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


_PHASES = {
    Phase.READY: ("✓", "nbd-ok"),
    Phase.STARTING: ("▸", "nbd-run"),
    Phase.PENDING: ("●", "nbd-run"),
    Phase.IDLE: ("○", "nbd-m"),
    Phase.FAILED: ("✗", "nbd-bad"),
    Phase.DELETED: ("○", "nbd-m"),
}


def _where(card: Mapping[str, Any]) -> str:
    revision = f" · revision {card['revision']}" if card.get("revision") else ""
    return clip(card.get("engine", ""), 63) + revision


def _head(name: str, where: str, mark: str, tone: str, took: str, *, dry_run: bool = False) -> str:
    end = "dry run: nothing was deployed" if dry_run else took and f"ready in {took}"
    return (
        f'<p class="nbd-head"><span class="{tone}" aria-hidden="true">{mark}</span> <b>{escape(name)}</b> '
        f'<span class="nbd-m">{escape(where)}</span> <span class="nbd-m nbd-end">{escape(end)}</span></p>'
    )


def _address(card: Mapping[str, Any]) -> str:
    """The URL with its copy button; under a hub also the one that the browser reaches."""
    if not card.get("url"):
        return ""
    url, reachable = str(card["url"])[:300], str(card.get("notebook_url") or card["url"])[:300]
    docs = f' <a class="nbd-a" href="{escape(reachable.rstrip("/"))}/docs" target="_blank" rel="noopener">docs</a>'
    docs = docs if _is_web(reachable) else ""
    parts = [f'<p class="nbd-url"><span>{_link(url)}</span> {_copy("Copy the URL")}{docs}</p>']
    if card.get("notebook_url"):
        parts.append(
            f'<p class="nbd-url"><span class="nbd-m">in your browser</span> <span>{_link(reachable)}</span> '
            f"{_copy('Copy the URL for your browser')}</p>"
        )
    return "".join(parts)


def _link(url: str) -> str:
    shown = f"<code>{escape(url)}</code>"
    return (
        f'<a class="nbd-a" href="{escape(url)}" target="_blank" rel="noopener">{shown}</a>' if _is_web(url) else shown
    )


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _copy(name: str) -> str:
    return f'<button hidden class="nbd-copy" type="button" aria-label="{escape(name)}" onclick="{_COPY}">Copy</button>'


def _code(source: str) -> str:
    return f"<code>{escape(source)}</code>"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    """A list of labels and values; the values are HTML."""
    body = "".join(f"<li><b>{escape(label)}</b> <span>{value}</span></li>" for label, value in rows)
    return f'<ul class="nbd-ul">{body}</ul>' if body else ""


def _rows(card: Mapping[str, Any], limit: int = _ROWS) -> list[tuple[str, str]]:
    """The facts of the deploy as (label, HTML)."""
    rows = [("Function", _code(clip(card.get("call", ""), 200)))]
    runs = int(card.get("runs") or 0)
    ran = f' <span class="nbd-m">· predict ran {_count(runs, "time")}</span>' if runs else ""
    if card.get("sample") is not None:
        stored = ' <span class="nbd-m">· stored with the Bundle</span>'
        rows.append(("Sample", _code(clip(card["sample"], 200)) + stored + ran))
    rows.append(("Parity", _parity(card.get("parity") or {})))
    replicas, request = card.get("replicas") or {}, card.get("request_ms")
    if not card.get("dry_run"):
        served = f"{replicas.get('ready', 0)} of {_count(replicas.get('desired', 0), 'replica')}"
        if request is not None:
            served += f" · real request {duration(request / 1000)}"
        rows.append(("Ready", escape(served)))
    if card.get("changed"):
        rows.append(("Changed", escape(clip(card["changed"], 200))))
    cost = card.get("cost") or {}
    known = [(cost.get("now_per_hour"), "now"), (cost.get("max_per_hour"), "at most")]
    spent = ", ".join(f"{value:.2f} {when}" for value, when in known if value is not None)
    if spent:
        rows.append(("Cost", f'{spent} <span class="nbd-m">· per hour</span>'))
    if not card.get("dry_run"):
        key = "public: no key is asked" if card.get("public") else _code(clip(snippets.key_command(card), 200))
        rows.append(("Key", key))
    told = (card.get("parity") or {}).get("note")
    notes = [note for note in (card.get("receipt") or {}).get("notes") or [] if note != told]
    rows += [("Note", f'<span class="nbd-warn">▲</span> {escape(clip(note, 240))}') for note in notes[:limit]]
    if len(notes) > limit:
        rows.append(("Note", f"and {len(notes) - limit} more in endpoint.receipt()"))
    return rows


def _parity(parity: Mapping[str, Any]) -> str:
    """Whether the places answered alike, as HTML."""
    state, places = parity.get("state", "unverified"), list(parity.get("places") or [])[:4]
    note = f' <span class="nbd-m">· {escape(clip(parity["note"], 240))}</span>' if parity.get("note") else ""
    difference = parity.get("max_difference")
    if state in {"equal", "differs in order"} and places:
        chain = " = ".join(f'<span class="nbd-p">{escape(clip(place, 40))}</span>' for place in places)
        delta = f' <span class="nbd-m">· max |Δ| {difference:.2g}</span>' if difference is not None else ""
        order = "" if state == "equal" else f' <span class="nbd-m">· {state}</span>'
        return f'<span class="nbd-ok">✓</span> {chain}{delta}{order}{note}'
    advice = "" if note or state != "unverified" else f' <span class="nbd-m">· {_ADVICE}</span>'
    return f'<span class="nbd-warn">▲</span> {escape(clip(state, 60))}{advice}{note}'


def _receipt(receipt: Mapping[str, Any], limit: int) -> str:
    rows = _receipt_rows(receipt, limit)
    if not rows:
        return ""
    whole = _whole(receipt)
    size = f' <span class="nbd-m">· {amount(whole)}</span>' if whole else ""
    return f'<details class="nbd-more"><summary>What travelled{size}</summary>{_facts(rows)}</details>'


def _whole(receipt: Mapping[str, Any]) -> float:
    return float((receipt.get("blobs") or {}).get("bytes") or 0) + float(receipt.get("skeleton_bytes") or 0)


def _receipt_rows(receipt: Mapping[str, Any], limit: int = _ROWS) -> list[tuple[str, str]]:
    """What travelled and what did not, as (label, HTML)."""
    rows: list[tuple[str, str]] = []
    model, blobs = receipt.get("model"), receipt.get("blobs") or {}
    if model:
        rows.append(("Model", _sized(model.get("name"), model.get("kind"), model.get("bytes"))))
    if blobs.get("count"):
        new = f"{blobs.get('new', 0)} new"
        new += f", {amount(blobs['new_bytes'])}" if blobs.get("new_bytes") else ""
        rows.append(("Weights", f"{_count(blobs['count'], 'blob')}, {amount(blobs.get('bytes', 0))} ({new})"))
    rows += _listed(limit, "Functions", [_code(clip(f, 80)) for f in receipt.get("functions") or []])
    rows += _listed(limit, "Modules", [_sized(m["name"], None, m.get("bytes")) for m in receipt.get("modules") or []])
    rows += _listed(
        limit,
        "Globals",  # but for the model, which has its own row
        [
            _sized(g["name"], g.get("kind"), g.get("bytes"))
            for g in receipt.get("globals") or []
            if not model or g["name"] != model.get("name")
        ],
    )
    if receipt.get("skeleton_bytes"):
        rows.append(("Code", f"{amount(receipt['skeleton_bytes'])} skeleton"))
    if receipt.get("distributions"):
        rows.append(("Packages", f"{_count(receipt['distributions'], 'distribution')}, versions locked"))
    rows += _listed(limit, "Files", [_code(clip(file, 80)) for file in receipt.get("files") or []])
    rows += _listed(limit, "Variables", [_code(clip(name, 80)) for name in receipt.get("variables") or []])
    rows += _listed(
        limit, "Secrets", [_code(clip(name, 80)) for name in receipt.get("secrets") or []], "by name, never by value"
    )
    rows += _listed(limit, "Left behind", [escape(clip(name, 120)) for name in receipt.get("left_behind") or []])
    return rows


def _listed(limit: int, label: str, items: list[str], remark: str = "") -> list[tuple[str, str]]:
    """One row of the first items; no row for none."""
    if not items:
        return []
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    tail = f' <span class="nbd-m">· {escape(remark)}</span>' if remark else ""
    return [(label, ", ".join(items[:limit]) + more + tail)]


def _sized(name: object, kind: object, size: float | None) -> str:
    """A name, what it is and how big, as HTML."""
    about = ([escape(clip(kind, 60))] if kind else []) + ([amount(size)] if size else [])
    return _code(clip(name, 80)) + (f' <span class="nbd-m">({", ".join(about)})</span>' if about else "")


def _tabs(card: Mapping[str, Any]) -> str:
    """The three snippets; where the browser can, side by side as tabs, else one under the other."""
    group = re.sub(r"[^-a-z0-9]", "", f"nbd-{card['name']}-{card.get('engine', '')}-{card.get('revision', 0)}")
    codes = (
        ("Python", snippets.python(card)),
        ("curl", snippets.curl(card)),
        ("JavaScript", snippets.javascript(card)),
    )
    body = "".join(
        f'<details name="{group}"{" open" * (title == "Python")}><summary>{title}</summary><div class="nbd-snip">'
        f'<pre class="nbd-pre"><code>{snippets.coloured(code)}</code></pre>'
        f"{_copy(f'Copy the {title} snippet')}</div></details>"
        for title, code in codes
    )
    return f'<div class="nbd-tabs">{body}</div>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _sep(text_: str) -> str:
    return f" · {text_}" if text_ else ""


def _plain(value: str) -> str:
    """Return a row's HTML as text; it was escaped here, so what looks like a tag is one of ours."""
    from html import unescape

    return unescape(re.sub(r"<[^>]*>", "", value))
