"""Login programs of kubeconfigs (exec plugins): run within a limit of time, and what goes wrong in words."""

from __future__ import annotations

import base64
import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nbdeploy.errors import EngineError

LOGIN_SECONDS = 50.0  # a program may ask a cloud; less than a forwarder waits for all of its login


def log_in(merger: Any, context: str, files: str) -> float:
    """Run the login program of the context's user, if it has one; return when its token ends, Unix seconds, or 0.

    The `kubernetes` package runs it too, but swallows its failure and waits for ever; so what it answers is put where
    the package looks first.

    Args:
        merger: the package's KubeConfigMerger; its user is changed.
        context: that exists.
        files: the kubeconfig's, for words.

    Raises EngineError in words where it is missing, fails, talks nonsense or does not answer in time.
    """
    from kubernetes.config.dateutil import parse_rfc3339
    from kubernetes.config.kube_config import ConfigNode

    entry = merger.config["contexts"].get_with_name(context)["context"]
    users = merger.config.value["users"]
    at = next((i for i, user in enumerate(users) if user.value.get("name") == entry.safe_get("user")), None)
    if at is None or not (users[at].value.get("user") or {}).get("exec"):
        return 0.0
    user = users[at]["user"]
    cluster = merger.config["clusters"].get_with_name(entry["cluster"])["cluster"]
    status = _asked(user, cluster, context, files)
    given = {key: value for key, value in user.value.items() if key != "exec"}
    if "token" in status:
        given["token"] = status["token"]
    if "clientCertificateData" in status:
        given["client-certificate-data"] = base64.b64encode(status["clientCertificateData"].encode()).decode()
        given["client-key-data"] = base64.b64encode(status["clientKeyData"].encode()).decode()
    users[at] = ConfigNode(users[at].name, {"name": users[at].value["name"], "user": given}, users[at].path)
    ends = status.get("expirationTimestamp")
    when: dt.datetime | None = parse_rfc3339(ends) if ends else None
    return when.timestamp() if when else 0.0


def _asked(user: Any, cluster: Any, context: str, files: str) -> dict[str, Any]:
    """Return what the program of a user answers."""
    from kubernetes.config import ConfigException
    from kubernetes.config.exec_provider import ExecProvider

    command = str(user.value["exec"].get("command", ""))
    folder = str(Path(user.path).resolve().parent) if user.path else ""
    again = f"Run kubectl --context {context} get pods in a terminal: it asks what the program wants to know."
    try:
        provider = ExecProvider(user["exec"], folder, cluster)
        if sys.stdout is not None and sys.stdout.isatty():
            return dict(provider.run())  # a person is there: it may ask, and take its time
        return _run(provider)
    except (FileNotFoundError, PermissionError) as error:
        hint = user.value["exec"].get("installHint", "")
        raise EngineError(
            f"The context {context!r} of {files} logs in through the program {command!r}, which this machine "
            f"cannot run ({error.strerror}). Install it, and see that the notebook's PATH has it. {hint}".strip()
        ) from error
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace").strip()
        raise EngineError(
            f"The login program {command!r} of the context {context!r} has not answered for {error.timeout:.0f} s"
            f"{f', but said: {said}' if said else ''}. It may wait for somebody to log in. {again}"
        ) from error
    except ConfigException as error:
        words = str(error).strip().removeprefix("exec: ").rstrip(".")
        raise EngineError(
            f"The login program {command!r} of the context {context!r} failed: {words}. {again}"
        ) from error


def _run(provider: Any) -> dict[str, Any]:
    """Run a program that nobody can answer; raises subprocess.TimeoutExpired, OSError, ConfigException."""
    from kubernetes.config import ConfigException

    told: dict[str, Any] = {"interactive": False}
    if provider.cluster is not None:
        told["cluster"] = dict(provider.cluster.value)
        named = {one["name"]: one["extension"] for one in told["cluster"].get("extensions") or ()}
        if "client.authentication.k8s.io/exec" in named:
            told["cluster"]["config"] = named["client.authentication.k8s.io/exec"]
    info = {"apiVersion": provider.api_version, "kind": "ExecCredential", "spec": told}
    done = subprocess.run(
        provider.args,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=provider.cwd,
        env={**provider.env, "KUBERNETES_EXEC_INFO": json.dumps(info)},
        timeout=LOGIN_SECONDS,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigException(f"it ended with {done.returncode}{f': {said}' if said else ''}")
    try:
        answer = json.loads(done.stdout)
        status = answer["status"]
        if answer["apiVersion"] != provider.api_version:
            raise ConfigException(f"it answers in {answer['apiVersion']}, not in {provider.api_version}")
        return dict(status)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigException(f"failed to decode process output: {error!r}") from error
