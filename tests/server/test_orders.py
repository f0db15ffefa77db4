"""The environment variables that tell a Replica in a container what to serve, and where."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from nbdeploy_server import variables
from nbdeploy_server.errors import SettingsInvalid

from tests.server.containers import PROGRAM


def refusal(environment: dict[str, str]) -> str:
    """Run the program with these variables and return its last words."""
    done = subprocess.run(
        [sys.executable, "-I", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    return done.stderr


def test_settings_that_make_no_sense_are_told_in_words() -> None:
    """Missing variables, unknown settings, wrong types, a taken port: each with what is allowed."""
    assert "NBDEPLOY_STORE and NBDEPLOY_BUNDLE must be set" in refusal({})
    base = {"NBDEPLOY_STORE": "/nowhere", "NBDEPLOY_BUNDLE": "sha256:" + "0" * 64}
    assert "'target' , which" not in refusal({**base, "NBDEPLOY_SETTINGS": '{"queue": "many"}'})
    unknown = refusal({**base, "NBDEPLOY_SETTINGS": '{"no_such": 1}'})
    assert "'no_such'" in unknown
    assert "concurrency" in unknown
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal({**base, "NBDEPLOY_HOST": "127.0.0.1", "NBDEPLOY_PORT": str(port)})
    assert f"port {port} cannot be listened on" in said
    assert "NBDEPLOY_PORT" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NBDEPLOY_SETTINGS", "{", "no JSON"),
        ("NBDEPLOY_SETTINGS", "[]", "object"),
        ("NBDEPLOY_SETTINGS", '{"timeout": "1"}', "'timeout', which must be a float"),
        ("NBDEPLOY_SETTINGS", '{"queue": true}', "'queue', which must be a int"),
        ("NBDEPLOY_SETTINGS", '{"store": "/"}', "does not know"),
        ("NBDEPLOY_SETTINGS", '{"key_sha256": "abc"}', "64 hex digits"),
        ("NBDEPLOY_DRAIN_SECONDS", "soon", "from 0 to 3600"),
        ("NBDEPLOY_PORT", "70000", "from 0 to 65535"),
    ],
)
def test_variables_are_checked(name: str, value: str, said: str) -> None:
    """A wrong variable is an error that says which and what is allowed."""
    with pytest.raises(SettingsInvalid, match=said):
        variables.read({"NBDEPLOY_STORE": "/s", "NBDEPLOY_BUNDLE": "sha256:1", name: value})


def test_variables_make_an_order() -> None:
    """Defaults are those of an image; settings are the Replica's."""
    base = {"NBDEPLOY_STORE": "/s", "NBDEPLOY_BUNDLE": "sha256:1"}
    order = variables.read(base)
    assert (order.port, order.probes_port, order.drain_seconds, order.host) == (8080, 9090, 10.0, "")
    assert (order.settings.name, order.settings.unpacked, order.settings.any_host) == ("model", "/tmp/nbdeploy", True)  # noqa: S108 - the default
    asked = {"name": "a", "revision": 2, "timeout": 3, "cors": ["https://a"], "gpus": 1}
    settings = variables.read({**base, "NBDEPLOY_SETTINGS": json.dumps(asked)}).settings
    assert (settings.revision, settings.timeout, settings.cors, settings.gpus) == (2, 3, ("https://a",), 1)
