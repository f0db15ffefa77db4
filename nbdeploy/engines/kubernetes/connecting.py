"""Where the cluster is and who we are there: the pod's own service account, or a context of a kubeconfig."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdeploy.engines.kubernetes.login import log_in
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError

MOUNTED = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_EARLY = 60.0  # seconds before its end that a token is renewed
JUPYTERHUB = (
    "On JupyterHub (zero-to-jupyterhub) two settings are needed: singleuser.serviceAccountName with the service "
    "account that may deploy (its token must be mounted: automountServiceAccountToken), and "
    "singleuser.networkPolicy.egressAllowRules.privateIPs: true, so that notebooks may reach the API server."
)


@dataclass
class Connection:
    """Address, rights and place in one cluster.

    Attributes:
        server: URL of the API server.
        context: of the kubeconfig; "" in a pod.
        namespace: of the Endpoints.
        in_cluster: this process runs in a pod of that cluster.
        configuration: of the `kubernetes` package: certificates, proxies, tokens.
        expires: when a login program's token ends; 0 for never, or where the `kubernetes` package renews it.
    """

    server: str
    context: str
    namespace: str
    in_cluster: bool
    configuration: Any
    _settings: ClusterSettings
    _environ: Mapping[str, str]
    _mounted: Path
    expires: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def headers(self) -> dict[str, str]:
        """Return the header that says who we are; a token near its end is renewed first."""
        with self._lock:
            if self.expires and time.time() > self.expires - _EARLY:
                self._load()
            found = self.configuration.auth_settings().get("BearerToken", {})
            return {"authorization": str(found["value"])} if found.get("value") else {}

    def renew(self) -> None:
        """Read everything again: tokens and certificates change while a deploy runs."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        again = connect(self._settings, self._environ, self._mounted)
        self.configuration, self.expires = again.configuration, again.expires


def connect(settings: ClusterSettings, environ: Mapping[str, str] = os.environ, mounted: Path = MOUNTED) -> Connection:
    """Return the connection that the settings name; nothing is sent to the cluster yet.

    Without a context in the settings a pod uses its own service account, everything else the kubeconfig's current
    context. Raises EngineError, in words, for a kubeconfig that is missing or damaged, an unknown context (the others
    are listed), and a login program that is missing or fails.
    """
    if settings.context is None and environ.get("KUBERNETES_SERVICE_HOST") and (mounted / "token").is_file():
        return _in_cluster(settings, environ, mounted)
    return _kubeconfig(settings, environ)


def _in_cluster(settings: ClusterSettings, environ: Mapping[str, str], mounted: Path) -> Connection:
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException
    from kubernetes.config.incluster_config import InClusterConfigLoader

    configuration = Configuration()
    try:
        InClusterConfigLoader(str(mounted / "token"), str(mounted / "ca.crt"), environ=environ).load_and_set(
            configuration
        )
    except (ConfigException, OSError) as error:
        raise EngineError(f"The service account of this pod cannot be used: {error} {JUPYTERHUB}") from error
    own = mounted / "namespace"
    namespace = settings.namespace or (own.read_text(encoding="utf-8").strip() if own.is_file() else "") or "default"
    return Connection(configuration.host, "", namespace, True, configuration, settings, environ, mounted)


def _kubeconfig(settings: ClusterSettings, environ: Mapping[str, str]) -> Connection:
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException
    from kubernetes.config.kube_config import KubeConfigLoader

    named = environ.get("KUBECONFIG", "")
    paths = [Path(part).expanduser() for part in (named or "~/.kube/config").split(os.pathsep) if part]
    merger = _read(paths, environ)
    name = _context(merger, paths, settings)
    configuration = Configuration()
    try:
        expires = log_in(merger, name, _told(paths))
        loader = KubeConfigLoader(
            merger.config, active_context=name, config_base_path=None, config_persister=merger.save_changes
        )
        loader.load_and_set(configuration)
    except (ConfigException, OSError, ValueError, TypeError, KeyError) as error:
        raise EngineError(
            f"The context {name!r} of {_told(paths)} cannot be used: {_plain(error)}. Check it with: "
            f"kubectl --context {name} get pods"
        ) from error
    entry = loader.current_context["context"]
    namespace = settings.namespace or entry.get("namespace") or "default"
    return Connection(configuration.host, name, namespace, False, configuration, settings, environ, MOUNTED, expires)


def _read(paths: list[Path], environ: Mapping[str, str]) -> Any:
    """Return the kubeconfigs as the package merges them."""
    import yaml  # type: ignore[import-untyped]
    from kubernetes.config import ConfigException
    from kubernetes.config.kube_config import KubeConfigMerger

    there = [path for path in paths if path.is_file()]
    if not there:
        if environ.get("KUBERNETES_SERVICE_HOST"):
            raise EngineError(
                f"This notebook runs in a cluster, but has no service account there and no {_told(paths)}. {JUPYTERHUB}"
            )
        raise EngineError(
            f"There is no kubeconfig: {_told(paths)} is missing. Get one from whoever runs the cluster (cloud "
            "providers have a command for it) and put it there, or set KUBECONFIG to its path."
        )
    try:
        merger = KubeConfigMerger(os.pathsep.join(map(str, there)))
    except (ConfigException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise EngineError(f"The kubeconfig {_told(there)} cannot be read: {_plain(error)}") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise EngineError(
            f"The kubeconfig {_told(there)} is none: it must hold clusters, contexts and users"
        ) from error
    return merger


def _context(merger: Any, paths: list[Path], settings: ClusterSettings) -> str:
    """Return the name of the context to use: as kubectl has it, the first file that names a current one wins."""
    known = sorted(str(entry.value["name"]) for entry in merger.config.value["contexts"] if "name" in entry)
    current = next(
        (file["current-context"] for file in merger.config_files.values() if file.get("current-context")), ""
    )
    name = settings.context or current
    listed = f"There is {', '.join(known)}" if known else "There is none"
    if not name:
        raise EngineError(
            f"{_told(paths)} names no current context. {listed}: say which with "
            f'context = "…" in [engines.{settings.name}], or kubectl config use-context.'
        )
    if name not in known:
        where = f"engines.{settings.name}.context" if settings.context else "the current context"
        raise EngineError(f"{where} is {name!r}, which {_told(paths)} does not know. {listed}.")
    return str(name)


def _told(paths: list[Path]) -> str:
    return " and ".join(map(str, paths))


def _plain(error: BaseException) -> str:
    return str(error).strip().removeprefix("exec: ").rstrip(".")
