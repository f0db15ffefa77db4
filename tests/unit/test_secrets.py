"""Values of secrets that would travel are found wherever they stand, and never shown."""

from __future__ import annotations

import functools
import types
from typing import Any

import cloudpickle
import pytest

from nbdeploy.capture.secrets import Text, scan
from nbdeploy.errors import SecretError

VALUE = "sk-0123456789abcdef"
VALUES = {"OPENAI_API_KEY": VALUE}


def found(**roots: Any) -> str:
    """Return the message for a secret in these objects."""
    with pytest.raises(SecretError) as caught:
        scan(cloudpickle.dumps(roots), VALUES, roots)
    assert VALUE not in str(caught.value)
    return str(caught.value)


def cell(source: str) -> Any:
    """Run a cell that knows the secret; returns its predict."""
    namespace: dict[str, Any] = {"__name__": "__main__", "VALUE": VALUE}
    exec(source, namespace)  # noqa: S102 - a cell of the test
    return namespace["predict"]


def test_the_path_is_told_and_the_next_step() -> None:
    """The variable's name, the way through the objects, and --secret."""
    holder = types.SimpleNamespace(headers={"auth": f"Bearer {VALUE}"}, tries=[1, 2])
    assert found(model=holder) == (
        "The value of $OPENAI_API_KEY stands in what predict needs: model → headers['auth']. It would be stored in the "
        'Bundle. Deploy with --secret OPENAI_API_KEY, and read os.environ["OPENAI_API_KEY"] inside predict, or in a '
        "function that makes the object and is given with --setup."
    )


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("client = {'key': VALUE}\ndef predict(x): return client", "predict → globals[\"client\"]['key']"),
        ("def predict(x, key=VALUE): return key", "predict → a default"),
        (f"def predict(x): return '{VALUE}'", "predict → a constant in its code"),
        (
            "def make(k):\n    def predict(x): return k\n    return predict\npredict = make(VALUE)",
            'predict → closure "k"',
        ),
    ],
)
def test_wherever_it_stands(source: str, path: str) -> None:
    """Globals, defaults, constants and closures."""
    assert path in found(predict=cell(source))


def test_bytes_and_places_without_a_path() -> None:
    """Bytes count as texts; where no path is found, that is said too."""
    assert "a string in reach of predict" in found(model=functools.partial(print, VALUE.encode()))


@pytest.mark.parametrize("skeleton", [b"", cloudpickle.dumps({"predict": len})])
def test_other_texts(skeleton: bytes) -> None:
    """Cells, files, variables and the sample are looked at too, each with its own next step."""
    text = Text("the file utils.py", "Take ${name} from --secret {name}.", f"KEY = '{VALUE}'")
    with pytest.raises(SecretError) as caught:
        scan(skeleton, VALUES, {}, [Text("the sample", "", "nothing"), text])
    assert str(caught.value) == (
        "The value of $OPENAI_API_KEY stands in the file utils.py. Take $OPENAI_API_KEY from --secret OPENAI_API_KEY."
    )


def test_nothing_to_find() -> None:
    """Without secrets nothing is read, and clean objects pass."""
    scan(b"no pickle at all", {}, {})
    scan(cloudpickle.dumps({"a": ["text"]}), VALUES, {"a": ["text"]})
