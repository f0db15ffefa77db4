"""A registry's refusals, in the user's words. Pure."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from nbdeploy.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Mapping

_FULL = ("no space left", '"err":28', "enospc", "disk full", "storagefull", "insufficient storage")
_SHOWN = 300  # characters of a registry's own words


class RefusedError(RegistryError):
    """The registry answered, and its answer was no.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.status = status


def refusal(host: str, action: str, status: int, body: bytes, *, known: bool) -> RefusedError:
    """Return the error for an answer of this status.

    Args:
        host: the registry.
        action: what was asked of it, like "push to team/iris".
        status: HTTP status.
        body: the answer's body, in which registries say more.
        known: whether this machine has credentials for the registry.
    """
    said = _said(body)
    return RefusedError(_words(host, action, status, full=is_full(status, body), known=known) + said, status)


def _words(host: str, action: str, status: int, *, full: bool, known: bool) -> str:
    if full:
        return f"the disk of the registry {host} is full: it could not {action}. Ask its admin for space."
    if status == HTTPStatus.UNAUTHORIZED and known:
        return (
            f"{host} does not let the user that this machine is logged in as {action}: "
            f"log in as one who may (docker login {host}), or ask its admin for the right."
        )
    found = {
        401: f"{host} wants to know who you are before it lets you {action}: run docker login {host} (or podman), "
        "or set REGISTRY_AUTH_FILE to a file that holds its password.",
        403: f"{host} does not allow you to {action}: ask its admin for the right to push and pull there.",
        404: f"{host} cannot {action}: it has no such repository, and some registries (Amazon ECR) want it made first.",
        405: f"{host} does not know how to {action}: is this a registry's address, and is it writable?",
        413: f"{host}, or a proxy before it, takes no request so large as to {action}: ask its admin to allow "
        "bodies of 100 MB or more (nginx: client_max_body_size).",
        429: f"{host} has had too many requests for now: log in, if you did not, or deploy again later.",
    }.get(status)
    if found is None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"{host} failed ({status}) when it was to {action}: deploy again, or ask its admin."
    return found or f"{host} answered {status} when it was to {action}."


def is_full(status: int, body: bytes) -> bool:
    """Tell whether the registry has no space left: trying again would only send it all again."""
    text = body.decode("utf-8", "replace").lower().replace(": ", ":")
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return False
    return status == HTTPStatus.INSUFFICIENT_STORAGE or any(mark in text for mark in _FULL)


def codes(body: bytes) -> frozenset[str]:
    """Return the error codes of a registry's answer, like "BLOB_UNKNOWN"."""
    return frozenset(str(error.get("code", "")) for error in _errors(body))


def _said(body: bytes) -> str:
    found = []
    for error in _errors(body):
        detail = error.get("detail")
        words = [str(error.get("message") or error.get("code") or ""), json.dumps(detail) if detail else ""]
        found.append(" ".join(word for word in words if word))
    return f" It says: {'; '.join(found)[:_SHOWN]}" if found else ""


def _errors(body: bytes) -> list[Mapping[str, object]]:
    try:
        content = json.loads(body)
        errors = content["errors"]
    except (ValueError, TypeError, KeyError):
        return []
    return [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
