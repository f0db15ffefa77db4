"""The `%deploy` line as data: one table of options gives both the parser and the help of `%deploy?`.

Not argparse, because `--sample` takes a Python expression that has spaces, quotes and dashes of its own: it is read to
the end of the expression, which is the first place before ` --option`, a comment or the line's end where it compiles.
"""

from __future__ import annotations

import difflib
import re
import textwrap
import warnings
from dataclasses import dataclass, field
from typing import Any

from nbdeploy.errors import UsageError

__all__ = ["Options", "help_text", "parse"]

_WIDTH = 100  # columns of the help
_WINDOW = 70  # characters of the line shown on each side of a mistake

_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""")
_FLAG = re.compile(r"--?[A-Za-z][\w-]*")
_EXPRESSION_ENDS = re.compile(r"\s+(?=--[A-Za-z])|\s*(?=#)|\s*$")
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_SECRET = re.compile(r"[A-Za-z_]\w*(?:=[a-z0-9][-a-z0-9.]*/[-\w.]+)?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Options:
    """One `%deploy` line; None means "not said", so that defaults stand in one place (`deploy()` and spec.py).

    Attributes:
        predict, model: names of the notebook, dotted names allowed; model is None for `%deploy PREDICT`.
        sample: source of the expression.
        setup: name of a function.
        secrets: each "ENV" or "ENV=SECRET/KEY".
        variables: names of environment variables.
        pass_model: None leaves the choice to the capture.
    """

    predict: str
    model: str | None = None
    name: str | None = None
    engine: str | None = None
    sample: str | None = None
    setup: str | None = None
    model_from: str | None = None
    gpu: int | None = None
    gpu_type: str | None = None
    cpu: float | None = None
    memory: str | None = None
    spot: bool = False
    min: int | None = None
    max: int | None = None
    target_in_flight: int | None = None
    concurrency: int | None = None
    scaling: str | None = None
    max_batch: int | None = None
    batch: str | None = None
    lane: str | None = None
    timeout: float | None = None
    queue: int | None = None
    secrets: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    base_image: str | None = None
    port: int | None = None
    cors: tuple[str, ...] = ()
    public: bool = False
    pass_model: bool | None = None
    replace: bool = False
    verify: bool = True
    wait: bool = True
    dry_run: bool = False


@dataclass(frozen=True)
class _Option:
    """One row of the table: how the option is written, what it takes and where it lands in Options."""

    flag: str
    group: str
    help: str
    metavar: str = ""  # "" for a flag
    kind: str = "text"  # text | int | number | name | expression
    to: str = ""  # field of Options; default: the flag's own name
    value: Any = True  # what a flag sets
    choices: tuple[str, ...] = ()
    repeatable: bool = False
    pattern: re.Pattern[str] | None = field(default=None, compare=False)
    advice: str = ""  # said where the pattern does not fit; the value is not repeated, for it may be a secret

    @property
    def field(self) -> str:
        return self.to or self.flag.removeprefix("--").replace("-", "_")

    @property
    def usage(self) -> str:
        return f"{self.flag} {self.metavar}".strip()


_GROUPS = ("Endpoint", "What travels", "Replicas", "Requests", "Access", "This deploy")

_OPTIONS = (
    _Option(
        "--name", "Endpoint",
        "DNS label. Default: the function's name, else the model's, else the notebook's file name, made a label; "
        "generic names (model, clf, net, pipe, m, predict, predict_fn, …) are passed over",
        "NAME",
    ),
    _Option(
        "--engine", "Endpoint",
        "local, kubernetes, or a named engine of the config. Default: from the config, else local",
        "NAME",
    ),
    _Option("--port", "Endpoint", "fixed local port, kept across Revisions. Default: free, then kept", "N", "int"),
    _Option(
        "--base-image", "Endpoint",
        "image that the Endpoint's image is based on. Default: by the kernel's Python",
        "REF",
    ),
    _Option(
        "--replace", "Endpoint",
        "take over an Endpoint of another notebook or owner",
    ),
    _Option(
        "--sample", "What travels",
        "ONE request, evaluated in the notebook: a dict of arguments, a tuple, or the one argument. "
        "Default: the arguments of the last call of PREDICT in this notebook",
        "EXPR", "expression",
    ),
    _Option(
        "--setup", "What travels",
        "zero-argument function run once in each Replica; its result is the model (clients, locks, anything that "
        "can't travel)",
        "FUNC", "name",
    ),
    _Option(
        "--model-from", "What travels",
        "hf:ORG/NAME@REV or a folder: content-addressed, never through kernel memory",
        "SRC",
    ),
    _Option("--pass-model", "What travels", "the model is an argument of PREDICT. Default: found out from PREDICT"),
    _Option(
        "--no-pass-model", "What travels",
        "PREDICT reaches the model by itself. Default: found out from PREDICT",
        to="pass_model", value=False,
    ),
    _Option("--pip", "What travels", "added requirement, repeatable", "REQ", repeatable=True),
    _Option("--file", "What travels", "file that travels, repeatable", "PATH", to="files", repeatable=True),
    _Option(
        "--secret", "What travels",
        "secret, repeatable: locally from the kernel's environment, in the cluster a Secret",
        "ENV[=SECRET/KEY]", to="secrets", repeatable=True, pattern=_SECRET,
        advice="--secret takes the NAME of an environment variable, or NAME=SECRET/KEY in a cluster, never the value: "
        'set os.environ["NAME"] first, then write --secret NAME.',
    ),
    _Option(
        "--env", "What travels",
        "environment variable that is passed on, repeatable",
        "NAME", to="variables", repeatable=True, pattern=_VARIABLE,
        advice="--env takes the NAME of an environment variable, and its value comes from this kernel: "
        'set os.environ["NAME"] first, then write --env NAME.',
    ),
    _Option("--gpu", "Replicas", "GPUs per Replica. Default: none", "N", "int"),
    _Option("--gpu-type", "Replicas", "as the cluster labels it. Default: any", "TYPE"),
    _Option("--cpu", "Replicas", "CPUs per Replica. Default: 1", "N", "number"),
    _Option("--memory", "Replicas", "per Replica, like 8Gi. Default: from the measured load", "SIZE"),
    _Option("--spot", "Replicas", "prefer spot nodes, fall back to on-demand"),
    _Option("--min", "Replicas", "Replicas at least; 0 scales to zero. Default: 1", "N", "int"),
    _Option("--max", "Replicas", "Replicas at most. Default: 1", "N", "int"),
    _Option(
        "--target-in-flight", "Replicas",
        "requests in flight per Replica that scaling aims at. Default: the concurrency",
        "N", "int",
    ),
    _Option(
        "--scaling", "Replicas",
        "autoscaling behaviour. Default: fast", "fast|cortex", choices=("fast", "cortex"),
    ),
    _Option(
        "--concurrency", "Requests",
        "calls that run at once per Replica. Default: thread lane 1, process lane = CPUs, async 32",
        "N", "int",
    ),
    _Option("--max-batch", "Requests", "put up to N waiting requests into one call. Default: no batching", "N", "int"),
    _Option(
        "--batch", "Requests",
        "items: each required parameter arrives as a list; rows: joined on axis 0. Default: items, rows for frames",
        "items|rows", choices=("items", "rows"),
    ),
    _Option(
        "--lane", "Requests",
        "how calls run. Default: by the kind of function and a probe",
        "thread|process|async", choices=("thread", "process", "async"),
    ),
    _Option("--timeout", "Requests", "seconds per request. Default: 60", "S", "number"),
    _Option("--queue", "Requests", "requests that may wait per Replica. Default: 32", "N", "int"),
    _Option("--cors", "Access", "allowed origin, repeatable. Default: none", "ORIGIN", repeatable=True),
    _Option("--public", "Access", "no key is asked. Default: every Endpoint has a key"),
    _Option("--no-verify", "This deploy", "skip the clean-process check", to="verify", value=False),
    _Option("--no-wait", "This deploy", "return at once; the deploy goes on in the background", to="wait", value=False),
    _Option("--dry-run", "This deploy", "capture, verify and report, deploy nothing"),
)  # fmt: skip
_BY_FLAG = {option.flag: option for option in _OPTIONS}


def parse(line: str) -> Options:
    """Read what stands behind `%deploy`.

    Raises:
        UsageError: a name or an option is wrong; the message shows the place.
    """
    reader = _Reader(re.sub(r"\\\r?\n", " ", line).strip())
    names: list[tuple[str, int]] = []
    values: dict[str, Any] = {}
    while not reader.at_end():
        if reader.text[reader.place] == "-":
            _read_option(reader, values)
        else:
            start = reader.place
            names.append((reader.word(), start))
    words = _check_names(reader, names)
    values["predict"] = words[-1]
    if len(words) > 1:
        values["model"] = words[0]
    return Options(**values)


def help_text() -> str:
    """Return the help of `%deploy?`: usage, then the options in groups."""
    parts = [
        "Make a production API of a model and its predict function.\n",
        "    %deploy MODEL PREDICT [options]    two names of the live namespace; dotted names allowed",
        "    %deploy PREDICT [options]          a function that reaches all it needs by itself",
        '    endpoint = %deploy MODEL PREDICT   keeps the Endpoint: endpoint(text="fine"), endpoint.logs(), …\n',
        "Example:\n",
        '    %deploy clf predict --name sentiment --sample {"text": "fine"} --max 4\n',
        "Nothing is expanded by IPython: {x} and $x stay as they are. A long line may end in a backslash and go on.",
    ]  # fmt: skip
    for group in _GROUPS:
        parts.append(f"\n{group}:")
        for option in (option for option in _OPTIONS if option.group == group):
            body = textwrap.wrap(option.help, _WIDTH - 30)
            head = f"  {option.usage:<27} "
            if len(option.usage) > 27:  # noqa: PLR2004 - the column above
                parts.append(head.rstrip())
                head = " " * 30
            parts.append(head + body[0])
            parts += [" " * 30 + more for more in body[1:]]
    return "\n".join(parts) + "\n"


@dataclass
class _Reader:
    """The line and how far it has been read."""

    text: str
    place: int = 0

    def at_end(self) -> bool:
        """Skip white space; whether only a comment or nothing follows."""
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1
        return self.place >= len(self.text) or self.text[self.place] == "#"

    def word(self) -> str:
        """Read to the next white space outside quotes, and take the quotes off."""
        match = _WORD.match(self.text, self.place)
        end = match.end() if match else self.place
        if end < len(self.text) and self.text[end] in "\"'":
            raise self.error("This quote is never closed.", end)
        self.place = end
        return re.sub(
            r"\"([^\"]*)\"|'([^']*)'", lambda m: m[1] if m[1] is not None else m[2], match[0] if match else ""
        )

    def expression(self, flag: str) -> str:
        """Read the shortest Python expression that ends before an option, a comment or the end of the line."""
        start = self.place
        first: tuple[str, int] | None = None
        wrong: tuple[str, int] | None = None
        for boundary in _EXPRESSION_ENDS.finditer(self.text, start):
            source = self.text[start : boundary.start()]
            if not source.strip():
                continue
            mistake = _mistake(source)
            if mistake is None:
                self.place = boundary.end()
                return source
            first = first or mistake
            # A prefix cut inside a string or bracket is only unfinished: the user's real mistake is another one.
            if wrong is None and not re.search(r"never closed|unterminated|EOF", mistake[0]):
                wrong = mistake
        reason, offset = wrong or first or ("it is empty", 0)
        names_last = _names_behind(self.text[start:])
        hint = f" Names go first: %deploy {names_last} {flag} …" if names_last else ""
        raise self.error(f"The value of {flag} is no Python expression: {reason}.{hint}", start + offset)

    def error(self, message: str, place: int) -> UsageError:
        """Make an error that shows the line with a mark under the place."""
        left = max(0, place - _WINDOW)
        lead = "%deploy " if left == 0 else "… "
        shown = self.text[left : place + _WINDOW].replace("\n", " ")
        tail = " …" if place + _WINDOW < len(self.text) else ""
        return UsageError(f"{message}\n  {lead}{shown}{tail}\n  {' ' * (len(lead) + place - left)}^")


def _read_option(reader: _Reader, values: dict[str, Any]) -> None:
    start = reader.place
    match = _FLAG.match(reader.text, start)
    flag = match[0] if match else reader.text[start:].split(maxsplit=1)[0]
    option = _BY_FLAG.get(flag)
    if match is None or option is None:
        raise reader.error(f"There is no option {flag}.{_did_you_mean(flag)}", start)
    reader.place = match.end()
    inline = reader.text[reader.place : reader.place + 1] == "="
    if inline:
        reader.place += 1
    elif reader.text[reader.place : reader.place + 1].strip():
        raise reader.error(f"A space or '=' is missing after {flag}.", reader.place)
    if not option.metavar:
        if inline:
            raise reader.error(f"{flag} takes no value.", start)
        _store(reader, option, option.value, values, start)
        return
    empty = reader.at_end() or (reader.text[reader.place] == "-" and reader.text[reader.place + 1 :][:1] == "-")
    if empty and not (option.kind == "expression" and re.match(r"--?[^-\sA-Za-z]", reader.text[reader.place :])):
        raise reader.error(f"{flag} needs a value: {option.usage}.", start)
    place = reader.place
    value = reader.expression(flag) if option.kind == "expression" else _convert(reader, option, reader.word(), place)
    _store(reader, option, value, values, start)


def _convert(reader: _Reader, option: _Option, word: str, place: int) -> Any:
    """Turn a word into the option's value, or say what it has to be."""
    if option.kind in {"int", "number"}:
        try:
            return int(word) if option.kind == "int" else float(word)
        except ValueError:
            wanted = "a whole number" if option.kind == "int" else "a number"
            raise reader.error(f"{option.flag} takes {wanted}, not {word!r}.", place) from None
    if option.choices and word not in option.choices:
        raise reader.error(f"{option.flag} is {' or '.join(option.choices)}, not {word!r}.", place)
    if option.kind == "name" and not _DOTTED.fullmatch(word):
        raise reader.error(f"{option.flag} takes the name of a function, not {word!r}.", place)
    if option.pattern is not None and not option.pattern.fullmatch(word):
        raise UsageError(option.advice)
    return word


def _store(reader: _Reader, option: _Option, value: Any, values: dict[str, Any], start: int) -> None:
    if option.repeatable:
        values[option.field] = (*values.get(option.field, ()), value)
        return
    if option.field in values:
        other = [o.flag for o in _OPTIONS if o.field == option.field and o is not option]
        also = f" (or {other[0]} beside it)" if other else ""
        raise reader.error(f"{option.flag} is given twice{also}: keep one.", start)
    values[option.field] = value


def _check_names(reader: _Reader, names: list[tuple[str, int]]) -> list[str]:
    if not names:
        raise UsageError("Which function? Write %deploy MODEL PREDICT, or %deploy PREDICT. All options: %deploy?")
    for word, place in names:
        if not _DOTTED.fullmatch(word):
            raise reader.error(
                f"{word!r} is no name. %deploy takes names of this notebook: %deploy MODEL PREDICT.", place
            )
    if len(names) > 2:  # noqa: PLR2004 - MODEL and PREDICT
        raise reader.error("%deploy takes MODEL PREDICT, or PREDICT alone; this is one name too many.", names[2][1])
    return [word for word, _ in names]


def _mistake(source: str) -> tuple[str, int] | None:
    """Return why a source is no expression and where (index into it), or None if it is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's own literals ("\d"); they come again when it is evaluated
        try:
            compile(source, "<--sample>", "eval")
        except SyntaxError as error:
            return error.msg, min(max((error.offset or 1) - 1, 0), len(source))
        except ValueError as error:  # a NUL character, up to Python 3.11
            return str(error), 0
    return None


def _names_behind(text: str) -> str:
    """Return the names that stand behind an expression, where `text` is an expression and then one or two names."""
    words = text.split()
    for count in (2, 1):
        names = words[-count:]
        behind = r"\s+".join(map(re.escape, names))
        before = re.fullmatch(rf"(.*\S)\s+{behind}\s*", text)
        if before and all(_DOTTED.fullmatch(name) for name in names) and _mistake(before[1]) is None:
            return " ".join(names)
    return ""


def _did_you_mean(flag: str) -> str:
    tidy = "--" + flag.lower().lstrip("-").replace("_", "-")
    near = [f for f in _BY_FLAG if f == tidy] or difflib.get_close_matches(tidy, list(_BY_FLAG), n=2, cutoff=0.7)
    return f" Did you mean {' or '.join(near)}?" if near else " All options: %deploy?"
