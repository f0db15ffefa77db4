"""Which environment variables travel, and which stay home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdeploy.capture import variables


def test_only_what_changed_travels() -> None:
    """New and changed variables, sorted; what the kernel sets itself and our own settings are not the notebook's."""
    start = {"A": "1", "SAME": "x", "GONE": "y"}
    now = {"A": "2", "SAME": "x", "NEW": "z", "NBDEPLOY_HOME": "/h", "MPLBACKEND": "inline", "COLUMNS": "80"}
    found = variables.changed(now, start)
    assert found == variables.Variables({"A": "2", "NEW": "z"}, ())
    assert list(found.changed) == ["A", "NEW"]


SECRET = [
    "OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "MYSQL_PWD", "GOOGLE_APPLICATION_CREDENTIALS",
    "api_key", "KAGGLE_KEY", "OPENAIKEY", "GITHUB_TOKENS", "SSH_PRIVATE", "MY_PASSPHRASE",
]  # fmt: skip
PLAIN = [
    "TOKENIZERS_PARALLELISM", "KERAS_BACKEND", "CUDA_VISIBLE_DEVICES", "KEYBOARD_LAYOUT", "PWDX", "OMP_NUM_THREADS",
    "TOKENIZER_PATH",
]  # fmt: skip


def test_names_that_tell_a_secret() -> None:
    """Whole words count: TOKENIZERS_PARALLELISM, set in half of all notebooks, is no token."""
    assert [name for name in SECRET if not variables.looks_secret(name)] == []
    assert [name for name in PLAIN if variables.looks_secret(name)] == []


def test_secrets_stay_home_and_are_named() -> None:
    """A variable that looks like a secret is withheld, unless --secret hands it over another way."""
    now = {"HF_TOKEN": "hf_12345678", "BACKEND": "torch"}
    assert variables.changed(now, {}) == variables.Variables({"BACKEND": "torch"}, ("HF_TOKEN",))
    assert variables.changed(now, {}, secrets=("HF_TOKEN",)) == variables.Variables({"BACKEND": "torch"}, ())
    assert variables.changed(now, {}, secrets=("BACKEND",)).changed == {}


def test_values_that_must_not_travel() -> None:
    """Values of secrets by name, and of those given by --secret; short ones and paths stand in texts by chance."""
    environ = {"A_KEY": "0123456789", "B_KEY": "short", "C_KEY": "/etc/ssl/key.pem", "PLAIN": "abcdefghij"}
    assert variables.secret_values(environ) == {"A_KEY": "0123456789"}
    assert variables.secret_values(environ, named=("PLAIN",)) == {"A_KEY": "0123456789", "PLAIN": "abcdefghij"}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_start_is_that_of_the_process_not_of_the_import() -> None:
    """A first cell that sets a variable before importing nbdeploy is noticed."""
    code = (
        "import os; os.environ['EARLY'] = 'yes'\nfrom nbdeploy.capture import variables\n"
        "print(variables.changed().changed, 'GIVEN' in variables.at_start())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "GIVEN": "1"}
    )
    assert done.stdout == "{'EARLY': 'yes'} True\n"
