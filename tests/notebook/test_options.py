"""The `%deploy` line: every option of the interface, expressions to their end, mistakes with their place."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdeploy.errors import UsageError
from nbdeploy.notebook.options import Options, help_text, parse

_TABLE = """
--name --engine --sample --setup --model-from --gpu --gpu-type --cpu --memory --min --max --target-in-flight
--concurrency --scaling --max-batch --batch --lane --timeout --queue --spot --secret --env --pip --file --base-image
--port --cors --public --pass-model --no-pass-model --replace --no-verify --no-wait --dry-run
"""

TEXTS = st.text(
    alphabet=st.sampled_from(list("ab '\"#\\{}$-")) | st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12
)
VALUES = st.recursive(
    TEXTS
    | st.integers()
    | st.booleans()
    | st.none()
    | st.sampled_from([" --max 3", "# no", "it's --name x", "\\", '"']),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def test_one_or_two_names() -> None:
    """PREDICT alone, or MODEL PREDICT; dotted names allowed."""
    assert parse("predict") == Options(predict="predict")
    assert parse(" lab.clf  lab.predict ") == Options(predict="lab.predict", model="lab.clf")


@pytest.mark.parametrize("line", ["", "   ", "# only a comment", "--max 2", "a b c", "a, b", "f(x)", "1x"])
def test_other_than_names_is_refused(line: str) -> None:
    """Anything else than one or two names is told, with how to write it."""
    with pytest.raises(UsageError, match=r"%deploy"):
        parse(line)


def test_every_value_lands_in_its_field() -> None:
    """All valued options are read, with `=` or a space, and numbers become numbers."""
    options = parse(
        "m p --name=x --engine gpu --setup lab.load --model-from hf:a/b@main --gpu 1 --gpu-type t4 --cpu .5 "
        "--memory 8Gi --min 0 --max=4 --target-in-flight 2 --concurrency 3 --scaling cortex --max-batch 8 "
        "--batch rows --lane process --timeout 2.5 --queue 7 --base-image r.io/i:1 --port 8080"
    )
    assert options == Options(
        predict="p", model="m", name="x", engine="gpu", setup="lab.load", model_from="hf:a/b@main", gpu=1,
        gpu_type="t4", cpu=0.5, memory="8Gi", min=0, max=4, target_in_flight=2, concurrency=3, scaling="cortex",
        max_batch=8, batch="rows", lane="process", timeout=2.5, queue=7, base_image="r.io/i:1", port=8080,
    )  # fmt: skip


def test_flags_and_repeatable_options() -> None:
    """Flags set what they say; --secret --env --pip --file --cors add up in order."""
    options = parse(
        'p --spot --public --pass-model --replace --no-verify --no-wait --dry-run --secret A --secret B=s/k --env C '
        '--pip "torch >= 2" --pip \'uvicorn[standard]\' --file "my labels.txt" --cors https://a --cors *'
    )  # fmt: skip
    assert (options.spot, options.public, options.pass_model, options.replace) == (True, True, True, True)
    assert (options.verify, options.wait, options.dry_run) == (False, False, True)
    assert options.secrets == ("A", "B=s/k")
    assert options.variables == ("C",)
    assert options.pip == ("torch >= 2", "uvicorn[standard]")
    assert options.files == ("my labels.txt",)
    assert options.cors == ("https://a", "*")
    assert parse("p --no-pass-model").pass_model is False


@pytest.mark.parametrize(
    ("tail", "sample"),
    [
        ('{"text": "a b"}', '{"text": "a b"}'),
        ('("x", [1, 2])', '("x", [1, 2])'),
        ('"it\'s --max 3"', '"it\'s --max 3"'),
        ("X[0]", "X[0]"),
        ("-1", "-1"),
        ("--1", "--1"),
        ("x if a else b", "x if a else b"),
        ("[i for i in {x}]", "[i for i in {x}]"),
        ("a - -b", "a - -b"),
        ('f"{x!r} $y"', 'f"{x!r} $y"'),
        ("'''a\" --name b'''", "'''a\" --name b'''"),
    ],
)
def test_an_expression_ends_where_python_ends(tail: str, sample: str) -> None:
    """--sample takes the whole expression; at the end of the line, before an option or a comment, also with `=`."""
    assert parse(f"m p --sample {tail}").sample == sample
    both = parse(f"m p --sample {tail} --max 2 --name a")
    assert (both.sample, both.max, both.name) == (sample, 2, "a")
    assert parse(f"m p --sample={tail}  # --max 9, later").sample == sample


@given(VALUES)
def test_any_literal_is_read_whole(value: object) -> None:
    """Whatever quotes, dashes and hashes a literal holds, its text comes back and the option behind it counts."""
    options = parse(f"m p --sample {value!r} --max 2 # done")
    assert (options.sample, options.max) == (repr(value), 2)


@given(st.text(max_size=60))
def test_no_line_breaks_the_parser(line: str) -> None:
    """Any line gives Options or a UsageError, never another exception."""
    with contextlib.suppress(UsageError):
        assert isinstance(parse(line), Options)


def test_a_bad_expression_shows_its_place() -> None:
    """The mark stands under the place of the mistake."""
    with pytest.raises(UsageError, match="no Python expression") as caught:
        parse('m p --sample {"a": "x --max 3", b c} --max 2')
    _, line, mark = str(caught.value).splitlines()
    assert line[mark.index("^") :].startswith("b c")


@pytest.mark.parametrize("line", ["m p --sample", "m p --sample --max 2", "m p --name --max 2", "m p --max"])
def test_a_missing_value_is_told(line: str) -> None:
    """An option without its value says what it takes."""
    with pytest.raises(UsageError, match="needs a value"):
        parse(line)


def test_names_behind_an_expression_get_a_hint() -> None:
    """Names go before the options, because an expression has no end of its own there."""
    with pytest.raises(UsageError, match="Names go first: %deploy clf predict --sample"):
        parse("--sample X[0] clf predict")


@pytest.mark.parametrize(
    ("line", "near"),
    [("p --smaple 1", "--sample"), ("p --gpus 1", "--gpu"), ("p --dry_run", "--dry-run"), ("p -name a", "--name")],
)
def test_an_unknown_option_offers_the_nearest(line: str, near: str) -> None:
    """A typing error costs one look."""
    with pytest.raises(UsageError, match=rf"Did you mean .*{near}"):
        parse(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("p --max two", "a whole number"),
        ("p --cpu x", "a number"),
        ("p --scaling slow", "fast or cortex"),
        ("p --setup f()", "name of a function"),
        ("p --public=yes", "takes no value"),
        ("p --max 2 --max 3", "twice"),
        ("p --pass-model --no-pass-model", "twice"),
        ("p --name 'x", "never closed"),
    ],
)
def test_a_wrong_value_is_told(line: str, words: str) -> None:
    """Each message names the option and what it takes."""
    with pytest.raises(UsageError, match=words):
        parse(line)


@pytest.mark.parametrize("flag", ["--secret", "--env"])
def test_a_secret_value_is_never_repeated(flag: str) -> None:
    """Whoever writes the value on the line is told how to do it, without the value in the stored output."""
    with pytest.raises(UsageError, match=r"os\.environ") as caught:
        parse(f"p {flag} TOKEN=sk-12345")
    assert "12345" not in str(caught.value)


def test_a_backslash_goes_on_in_the_next_line() -> None:
    """A long line may be broken."""
    assert parse("m p --max 2 \\\n  --name a") == parse("m p --max 2 --name a")


def test_the_help_names_every_option() -> None:
    """The help and the interface list the same options."""
    assert sorted(re.findall(r"^  (--[a-z-]+)", help_text(), re.MULTILINE)) == sorted(_TABLE.split())
    assert max(map(len, help_text().splitlines())) <= 120
