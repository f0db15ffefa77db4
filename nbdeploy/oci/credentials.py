"""Who the user is for a registry: what `docker login`, podman and mounted secrets left on this machine.

Places, the first that knows the host wins: the file $REGISTRY_AUTH_FILE; $DOCKER_CONFIG; podman's
$XDG_RUNTIME_DIR/containers/auth.json and ~/.config/containers/auth.json; ~/.docker. $DOCKER_CONFIG and
$REGISTRY_AUTH_FILE may also name a mounted pull secret or its folder (`.dockerconfigjson`). In one file a helper
for the host goes before the helper for all, and that before what the file itself holds: Docker's order.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdeploy.errors import RegistryError
from nbdeploy.oci.reference import DOCKER_HUB, normal_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HUB_KEY = "https://index.docker.io/v1/"  # what Docker calls Docker Hub in files and to helpers
_TOKEN_USER = "<token>"  # noqa: S105 - by this name helpers say that the secret is an identity token
_NAMES = ("config.json", ".dockerconfigjson", "auth.json")
_SECONDS = 60.0  # a helper may ask a cloud for a token


@dataclass(frozen=True)
class Credentials:
    """A user name and password, or an identity token that a token server takes instead."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


def find(host: str, environ: Mapping[str, str] = os.environ) -> Credentials | None:
    """Return what this machine knows for the registry `host`, or None.

    Raises RegistryError where a file cannot be read or a credential helper fails.
    """
    host = normal_host(host)
    for path in _files(environ):
        found = _of_file(path, host, environ)
        if found is not None:
            return found
    return None


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    runtime = environ.get("XDG_RUNTIME_DIR")
    places = [Path(environ[name]).expanduser() for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG") if environ.get(name)]
    if runtime:
        places.append(Path(runtime) / "containers" / "auth.json")
    places.append(Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json")
    if not environ.get("DOCKER_CONFIG"):
        places.append(home / ".docker")
    for place in places:
        choices = [place / name for name in _NAMES] if place.is_dir() else [place]
        yield from (choice for choice in choices if choice.is_file())


def _of_file(path: Path, host: str, environ: Mapping[str, str]) -> Credentials | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RegistryError(f"{path} with the registries' passwords cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RegistryError(
            f"{path} is no JSON ({error}): mend it, or log in again with docker login {host}"
        ) from error
    if not isinstance(content, dict):
        raise RegistryError(f"{path} is no JSON object: mend it, or log in again with docker login {host}")
    helper = _entry(content.get("credHelpers"), host) or content.get("credsStore")
    found = _of_helper(str(helper), host, path, environ) if helper else None
    return found or _of_entry(_entry(content.get("auths"), host), host, path)


def _entry(table: Any, host: str) -> Any:
    """Return the entry whose key means this host: keys may hold a scheme and a version of the API."""
    if not isinstance(table, dict):
        return None
    if host in table:
        return table[host]
    for key, value in table.items():
        bare = key.partition("://")[2] or key
        name, _, path = bare.partition("/")
        if normal_host(name) == host and path.strip("/") in {"", "v1", "v2"}:
            return value
    return None


def _of_entry(entry: Any, host: str, path: Path) -> Credentials | None:
    if not isinstance(entry, dict) or not entry:
        return None
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        try:
            text = base64.b64decode(entry["auth"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, TypeError, ValueError) as error:
            words = f"the entry for {host} in {path} is damaged: log in again with docker login {host}"
            raise RegistryError(words) from error
        username, _, password = text.partition(":")
    identity = str(entry.get("identitytoken") or "")
    if not (identity or (username and password)):
        return None
    return Credentials(username, password.rstrip("\0"), identity)


def _of_helper(name: str, host: str, path: Path, environ: Mapping[str, str]) -> Credentials | None:
    """Ask a credential helper; None where it does not know the host."""
    program = shutil.which(f"docker-credential-{name}", path=environ.get("PATH"))
    who = f"docker-credential-{name}, which {path} names for {host},"
    if program is None:
        raise RegistryError(
            f"{who} is not installed here: install it, or take its line out of that file and log in again"
        )
    server = _HUB_KEY if host == DOCKER_HUB else host
    try:
        done = subprocess.run(
            [program, "get"],
            input=server,
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RegistryError(
            f"{who} did not answer in {_SECONDS:.0f} s: run it by hand to see what it waits for"
        ) from error
    except OSError as error:
        raise RegistryError(f"{who} cannot be started: {error.strerror}") from error
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        if "credentials not found" in said.lower():  # the protocol knows this by its text alone
            return None
        raise RegistryError(f"{who} failed: {said}. Log in again with docker login {host}")
    try:
        answer = json.loads(done.stdout)
        username, secret = str(answer.get("Username") or ""), str(answer.get("Secret") or "")
    except (ValueError, AttributeError) as error:
        raise RegistryError(f"{who} gave an answer that is no JSON object") from error
    if not secret:
        return None
    return Credentials(identity_token=secret) if username == _TOKEN_USER else Credentials(username, secret)
