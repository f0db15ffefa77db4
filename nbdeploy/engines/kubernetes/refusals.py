"""What the API server's refusals mean, in words; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nbdeploy.engines.kubernetes.connecting import JUPYTERHUB
from nbdeploy.engines.kubernetes.role import role_yaml, rule_for
from nbdeploy.errors import EngineError

_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _CONFLICT, _TOO_LARGE, _INVALID = 401, 403, 404, 409, 413, 422
BUSY = frozenset({429, 500, 502, 503, 504})  # what may pass by itself
_RBAC = re.compile(r'User "(?P<user>[^"]*)" cannot \w+ resource')


class ForbiddenError(EngineError):
    """The Role lacks a rule."""


class ConflictError(EngineError):
    """Another program owns a field that we would change."""


class ChangedError(EngineError):
    """The object is another than the one we read: somebody changed it meanwhile."""


class UnavailableError(EngineError):
    """The API server gave no answer, or none that it stands by, for as long as we tried."""


@dataclass(frozen=True)
class Asked:
    """One request, as rights are told.

    Attributes:
        verb: "get", "list", "watch", "create", "patch", "delete".
        group: of the API; "" for the core group.
        resource: plural, with its subresource, like "pods/log".
        name: of the object, "" for many.
        namespace: "" for what has none.
    """

    verb: str
    group: str
    resource: str
    name: str = ""
    namespace: str = ""

    def __str__(self) -> str:
        place = f" in the namespace {self.namespace!r}" if self.namespace else ""
        return f"{self.verb} {' '.join(filter(None, [self.resource, self.name]))}{place}"


def refused(status: int, body: bytes, asked: Asked, *, server: str, context: str) -> EngineError:
    """Return the error that tells of an answer of 400 or above.

    Args:
        status: of the answer.
        body: of the answer: a Status in JSON, or a text of something on the way.
        asked: what for.
        server: URL of the API server.
        context: of the kubeconfig, "" in a pod.
    """
    told = status_of(body)
    message = str(told.get("message", "")) or body[:300].decode(errors="replace").strip() or f"HTTP {status}"
    details = told.get("details") or {}
    if status == _UNAUTHORIZED:
        return EngineError(_unauthorized(server, context))
    if status == _FORBIDDEN:
        return _forbidden(message, asked)
    if status == _NOT_FOUND and details.get("kind") == "namespaces":
        return EngineError(
            f"The namespace {asked.namespace!r} does not exist at {server}. Have it made (kubectl create namespace "
            f'{asked.namespace}), or name another: namespace = "…" in the settings of the engine.'
        )
    if status == _NOT_FOUND and not details:
        return EngineError(
            f"The cluster at {server} does not know {asked.resource} ({asked.group or 'core'}): {message}"
        )
    if status == _CONFLICT:
        return _conflict(message, details, asked)
    if status == _TOO_LARGE:
        return EngineError(f"{asked.resource} {asked.name} is too large for the API server: {message}")
    if status == _INVALID:
        return EngineError(f"The cluster finds {asked.resource} {asked.name} invalid: {message}")
    if status in BUSY:
        return UnavailableError(f"The API server at {server} could not {asked}: {message} (HTTP {status}).")
    return EngineError(f"The cluster could not {asked}: {message} (HTTP {status}).")


def hopeful(error: Exception, *, repeatable: bool) -> bool:
    """Tell whether a request that got no answer is to be sent again."""
    from urllib3 import exceptions

    if isinstance(error, exceptions.SSLError | exceptions.ProxyError | exceptions.NameResolutionError):
        return False  # these stay as they are
    return repeatable or isinstance(error, exceptions.NewConnectionError | exceptions.ConnectTimeoutError)


def unreachable(error: Exception, server: str, *, proxy: str, in_cluster: bool) -> str:
    """Return in words why no answer came from the API server.

    Args:
        error: of urllib3.
        server: its URL.
        proxy: that is asked first, "" for none.
        in_cluster: we are in a pod.
    """
    from urllib3 import exceptions

    through = f" through the proxy {proxy}" if proxy else ""
    where = f"The API server {server} cannot be reached{through}"
    if isinstance(error, exceptions.ProxyError):
        return f"{where}: {error}. Put the server's host into NO_PROXY if it needs none."
    if isinstance(error, exceptions.SSLError):
        return (
            f"The certificate of the API server {server} is not trusted{through}: {error}. The kubeconfig's "
            "certificate-authority does not fit this server, or something on the way opens TLS; get a new kubeconfig, "
            "or put the server's host into NO_PROXY."
        )
    if isinstance(error, exceptions.NameResolutionError):
        return f"{where}: the name {urlsplit(server).hostname} is not known here. Is the company's VPN on?"
    if isinstance(error, exceptions.ReadTimeoutError):
        return f"{where}: it took the request and did not answer in time."
    late = isinstance(error, exceptions.ConnectTimeoutError) and not isinstance(error, exceptions.NewConnectionError)
    reason = "no answer in time" if late else _reason(error)
    if in_cluster:
        return f"{where}: {reason}. {JUPYTERHUB}"
    hint = "" if proxy else ", and whether a proxy is needed (HTTPS_PROXY)"
    return f"{where}: {reason}. Check that the cluster runs, the VPN{hint}."


def _reason(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(getattr(cause, "strerror", "") or error).lower().rstrip(".")


def unreadable(server: str, body: bytes) -> EngineError:
    """Return the error that tells of an answer that no API server gives."""
    start = body[:100].decode(errors="replace").strip()
    return EngineError(
        f"{server} answered, but not as an API server does ({start!r}): it is no API server, or a login page or a "
        "proxy stands before it."
    )


def status_of(body: bytes) -> Mapping[str, Any]:
    """Return the Status object of a refusal, {} where the answer is none."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("kind") == "Status" else {}


def _unauthorized(server: str, context: str) -> str:
    if not context:
        return (
            f"The cluster at {server} does not accept this pod's service account (401): its token has ended or was "
            "withdrawn. Restart the notebook's server."
        )
    return (
        f"The cluster at {server} does not accept the login of the context {context!r} (401): it has ended or was "
        f"withdrawn. Log in again as you did at first; kubectl --context {context} get pods shows when it works."
    )


def _forbidden(message: str, asked: Asked) -> EngineError:
    found = _RBAC.search(message)
    if found is None:  # refused by an admission rule: quota, Pod Security, a webhook
        return EngineError(f"The cluster refused to {asked}: {message}")
    user = found["user"]
    words = f"{user} may not {asked.verb} {asked.resource}"
    if not asked.namespace:
        return ForbiddenError(f"{words} (of the whole cluster).")
    role = role_yaml(asked.namespace, [rule_for(asked.verb, asked.group, asked.resource)], subject=user)
    return ForbiddenError(
        f"{words} in the namespace {asked.namespace!r}. "
        f"Whoever runs the cluster allows it with kubectl apply -f - and:\n{role}"
    )


def _conflict(message: str, details: Mapping[str, Any], asked: Asked) -> EngineError:
    causes = [cause for cause in details.get("causes") or () if cause.get("reason") == "FieldManagerConflict"]
    if not causes:
        return ChangedError(f"{asked.resource} {asked.name} was changed by somebody else meanwhile: {message}")
    fields = [f"{cause.get('field', '?')} (set by {_manager(str(cause.get('message', '')))})" for cause in causes]
    return ConflictError(
        f"{asked.resource} {asked.name} is also looked after by another program: {', '.join(fields)}. Stop "
        "that program from setting it, or leave the field to it."
    )


def _manager(message: str) -> str:
    found = re.search(r'conflict with "([^"]*)"', message)
    return found[1] if found else message
