"""Where logins are found, and what is made of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from nbdeploy.errors import RegistryError
from nbdeploy.oci.credentials import Credentials, find

HOST = "registry.example.com"
ADA = Credentials("ada", "pa:ss")
AUTH = {"auth": base64.b64encode(b"ada:pa:ss").decode()}


def write(path: Path, content: Any) -> Path:
    """Write a file of JSON, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def helper(environ: dict[str, str], folder: Path, name: str, script: str) -> None:
    """Put a real credential helper into PATH."""
    folder.mkdir(exist_ok=True)
    program = folder / f"docker-credential-{name}"
    program.write_text(f'#!/bin/sh\n[ "$1" = get ] || exit 9\nread host\n{script}\n', encoding="utf-8")
    program.chmod(0o755)
    environ["PATH"] = f"{folder}:{environ['PATH']}"


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [
        ("DOCKER_CONFIG", "d", "d/config.json"),
        ("DOCKER_CONFIG", "d", "d/.dockerconfigjson"),
        ("REGISTRY_AUTH_FILE", "any.json", "any.json"),
        ("REGISTRY_AUTH_FILE", "secret", "secret/.dockerconfigjson"),
        ("XDG_RUNTIME_DIR", "run", "run/containers/auth.json"),
        ("XDG_CONFIG_HOME", "c", "c/containers/auth.json"),
        ("HOME", "h", "h/.docker/config.json"),
        ("HOME", "h", "h/.config/containers/auth.json"),
    ],
)
def test_every_place_is_looked_at(
    variable: str, value: str, file: str, environ: dict[str, str], tmp_path: Path
) -> None:
    """Docker's, podman's and mounted files are found where their variables say."""
    write(tmp_path / file, {"auths": {HOST: AUTH}})
    environ[variable] = str(tmp_path / value)
    assert find(HOST, environ) == ADA
    assert find("other.example.com", environ) is None


def test_the_first_place_that_knows_the_host_wins(environ: dict[str, str], tmp_path: Path) -> None:
    """A file that does not know the host leaves it to the next."""
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "a", {"auths": {"ghcr.io": AUTH}}))
    environ["DOCKER_CONFIG"] = str(tmp_path / "d")
    write(tmp_path / "d" / "config.json", {"auths": {HOST: AUTH, "ghcr.io": {"username": "eve", "password": "x"}}})
    assert find(HOST, environ) == ADA
    assert find("ghcr.io", environ) == ADA


@pytest.mark.parametrize(
    ("key", "host", "entry", "expected"),
    [
        (HOST, HOST, {"username": "ada", "password": "pa:ss"}, ADA),
        (f"https://{HOST}/v2/", HOST, AUTH, ADA),
        ("https://index.docker.io/v1/", "docker.io", AUTH, ADA),
        ("docker.io", "registry-1.docker.io", AUTH, ADA),
        (HOST, HOST, {**AUTH, "identitytoken": "t"}, Credentials("ada", "pa:ss", "t")),
        (HOST, HOST, {}, None),
        (f"{HOST}/team", HOST, AUTH, None),
        (HOST, f"{HOST}:5000", AUTH, None),
    ],
)
def test_entries_of_a_file(
    key: str, host: str, entry: dict[str, str], expected: Credentials | None, environ: dict[str, str], tmp_path: Path
) -> None:
    """Each spelling of a key and of an entry is understood, and another host's entry is never used."""
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "auth", {"auths": {key: entry}}))
    assert find(host, environ) == expected


def test_helpers_go_before_the_file(environ: dict[str, str], tmp_path: Path) -> None:
    """A helper for the host goes before the one for all, that before the file; <token> means an identity token."""
    helper(environ, tmp_path / "bin", "one", 'echo "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"s1\\"}"')
    helper(environ, tmp_path / "bin", "all", 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"s2\\"}"')
    content = {"auths": {HOST: AUTH, "ghcr.io": AUTH}, "credHelpers": {HOST: "one"}, "credsStore": "all"}
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "auth", content))
    assert find(HOST, environ) == Credentials(HOST, "s1")
    assert find("ghcr.io", environ) == Credentials(identity_token="s2")
    content = {"credHelpers": {"docker.io": "one"}}
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "auth", content))
    assert find("docker.io", environ) == Credentials("https://index.docker.io/v1/", "s1")


def test_a_helper_that_knows_nothing_leaves_it_to_the_file(environ: dict[str, str], tmp_path: Path) -> None:
    """What helpers say for an unknown host is no failure."""
    helper(environ, tmp_path / "bin", "none", "echo credentials not found in native keychain; exit 1")
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "auth", {"auths": {HOST: AUTH}, "credsStore": "none"}))
    assert find(HOST, environ) == ADA
    assert find("ghcr.io", environ) is None


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'token has expired' >&2; exit 1", "failed: token has expired. Log in again"),
        ("echo no json", "no JSON object"),
        (None, "docker-credential-bad, which .* is not installed here: install it, or"),
    ],
)
def test_a_broken_helper_is_told(script: str | None, words: str, environ: dict[str, str], tmp_path: Path) -> None:
    """A missing or failing helper is named, with the file that wants it and what to do."""
    if script is not None:
        helper(environ, tmp_path / "bin", "bad", script)
    environ["REGISTRY_AUTH_FILE"] = str(write(tmp_path / "auth", {"credHelpers": {HOST: "bad"}}))
    with pytest.raises(RegistryError, match=words):
        find(HOST, environ)


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": {"registry.example.com": {"auth": "%%%"}}}'])
def test_a_damaged_file_is_named(text: str, environ: dict[str, str], tmp_path: Path) -> None:
    """A file that cannot be understood is named, with what mends it."""
    path = tmp_path / "auth"
    path.write_text(text, encoding="utf-8")
    environ["REGISTRY_AUTH_FILE"] = str(path)
    with pytest.raises(RegistryError, match=f"{path}.*log in again"):
        find(HOST, environ)


def test_passwords_do_not_show() -> None:
    """Printing Credentials shows no secret."""
    assert "pa:ss" not in repr(ADA)
    assert "secret-token" not in repr(Credentials(identity_token="secret-token"))
