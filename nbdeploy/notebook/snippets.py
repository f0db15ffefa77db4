"""The calls that a card offers to copy: Python, curl and JavaScript, made from the Signature and the sample.

Each has to work as it is pasted, so a value that the sample does not spell out is made up in the sample's own shape.
The key is never written: the snippets ask for it by command.
"""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["call", "clip", "coloured", "curl", "javascript", "key_command", "python"]

_LITERAL = 120  # characters of a value in a snippet
_ELEMENTS = 256  # of an array that is written out in a snippet
_ARRAY = re.compile(r"(\w+)=<(?:ndarray|Tensor) \((\d+(?:, ?\d+)*),?\)")


def clip(value: object, length: int) -> str:
    """Return one line of at most `length` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def coloured(code: str) -> str:
    """Escape code; strings and comments get their colour."""
    pieces = re.split(r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|(?:^|(?<=\s))(?:#|//) .*)""", code)
    out = [escape(piece) for piece in pieces]
    for i in range(1, len(out), 2):
        tone = "nbd-str" if pieces[i][0] in "\"'" else "nbd-m"
        out[i] = f'<span class="{tone}">{out[i]}</span>'
    return "".join(out)


def key_command(card: Mapping[str, Any]) -> str:
    """Return the shell command that prints the key."""
    return str(card.get("key_command") or f"nbdeploy key {card['name']}")


def _literals(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sample's arguments where its text is all literals that JSON has."""
    try:
        call = ast.parse(f"f({card.get('sample') or ''})", mode="eval").body
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg} if isinstance(call, ast.Call) else {}
        json.dumps(given, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError):
        return {}
    return given


def _shown(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that the snippets bind: the required ones and the sample's."""
    given = _literals(card)
    parameters = [p for p in card.get("parameters") or [] if p.get("required", True) or p["name"] in given]
    return {str(p["name"]): p.get("schema") or {} for p in parameters[:12]}


def _example(schema: Mapping[str, Any], depth: int = 0) -> Any:
    """Make up a value for a JSON Schema."""
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    for key in ("examples", "enum"):
        if schema.get(key):
            return schema[key][0]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return _example(schema[key][0], depth)
    if schema.get("type") == "array" and depth < 5:  # noqa: PLR2004 - images have 4 axes with their batch
        return [_example(schema.get("items") or {}, depth + 1)]
    plain = {"string": "…", "integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    return plain.get(str(schema.get("type")))


def call(card: Mapping[str, Any]) -> str:
    """Return the call as one line of Python; what has no short literal is a variable of the parameter's name."""
    given = {name: repr(value) for name, value in _literals(card).items() if len(repr(value)) <= _LITERAL}
    shown = ", ".join(f"{name}={given.get(name, name)}" for name in _shown(card))
    return f'nbdeploy.connect("{clip(card["name"], 63)}"){".stream" if card.get("streams") else ""}({shown})'


def python(card: Mapping[str, Any]) -> str:
    """Return the call as a Python script."""
    if card.get("streams"):
        return f'import nbdeploy\n\nfor piece in {call(card)}:\n    print(piece, end="")'
    return f"import nbdeploy\n\nanswer = {call(card)}"


def _url(card: Mapping[str, Any]) -> str:
    return str(card["url"])[:300].rstrip("/") + "/predict"


def _body(card: Mapping[str, Any]) -> str:
    """Return a JSON body; what has no short literal is made up in the sample's shape, else from the schema."""
    given = {name: value for name, value in _literals(card).items() if len(repr(value)) <= _LITERAL}
    for name, shape in _ARRAY.findall(str(card.get("sample") or "")):
        sizes = [int(size) for size in shape.split(",")]
        if name not in given and 0 < math.prod(sizes) <= _ELEMENTS:
            given[name] = _zeros(sizes)
    body = {name: given.get(name, _example(schema)) for name, schema in _shown(card).items()}
    return json.dumps(body, ensure_ascii=False)


def _zeros(shape: list[int]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


def curl(card: Mapping[str, Any]) -> str:
    """Return the call as a shell command."""
    lines = [f"curl{' -N' if card.get('streams') else ''} {shlex.quote(_url(card))}"]
    if not card.get("public"):
        lines.append(f'  -H "Authorization: Bearer $({key_command(card)})"')
    lines.append('  -H "Content-Type: application/json"')
    if card.get("streams"):
        lines.append('  -H "Accept: text/event-stream"')
    return " \\\n".join([*lines, f"  -d {shlex.quote(_body(card))}"])


def javascript(card: Mapping[str, Any]) -> str:
    """Return the call as a JavaScript module."""
    streams = card.get("streams")
    headers = ['"Content-Type": "application/json"']
    lines = []
    if not card.get("public"):
        lines.append(f"// NBDEPLOY_KEY=$({key_command(card)}) node call.mjs")
        headers.insert(0, "Authorization: `Bearer ${process.env.NBDEPLOY_KEY}`")
    if streams:
        headers.append('Accept: "application/x-ndjson"')
    lines += [
        f"const response = await fetch({json.dumps(_url(card))}, {{",
        '  method: "POST",',
        "  headers: {" + ",".join(f"\n    {header}" for header in headers) + "\n  },",
        f"  body: JSON.stringify({_body(card)}),",
        "});",
    ]
    if streams:
        lines += [
            "const decoder = new TextDecoder();",
            "for await (const chunk of response.body) console.log(decoder.decode(chunk, {stream: true}));",
        ]
    else:
        lines.append("console.log(await response.json());")
    return "\n".join(lines)
