"""Access to an API server as plain data, read from the kubeconfig by a process of its own that ends at once.

Reading a kubeconfig (exec plugins, OIDC, token files) takes the `kubernetes` package: 0.7 s and 30 MB. A forwarder
lives for weeks, so another process reads it, at the start and whenever the API server no longer knows the token.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nbdeploy.engines.kubernetes import connecting
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.errors import EngineError
from nbdeploy.process import ends_within, kernel_path, launch

READ_TIMEOUT = 60.0  # seconds; an exec plugin may ask a cloud
_PREFIXES = ("KUBE", "AWS_", "GOOGLE_", "CLOUDSDK_", "AZURE_", "AAD_", "XDG_")


class CredentialsError(Exception):
    """There is no way to log in; the message is for the user."""


@dataclass(frozen=True)
class Access:
    """How an API server is reached: PEM texts, the value of the Authorization header, a proxy's URL; "" where none."""

    server: str
    authority: str = ""
    certificate: str = ""
    private_key: str = ""
    authorization: str = ""
    verify: bool = True
    server_name: str = ""
    proxy: str = ""

    def tls(self) -> ssl.SSLContext | None:
        """Return how connections are encrypted; None for plain HTTP. Raises CredentialsError, ssl.SSLError."""
        if not self.server.startswith("https:"):
            return None
        context = ssl.create_default_context(cadata=self.authority or None)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # authorities of clusters often lack a key identifier
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate:
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # 0600; load_cert_chain reads files only
                file.write(f"{self.certificate}\n{self.private_key}\n")
                file.flush()
                context.load_cert_chain(file.name)
        return context


def main(argument: Mapping[str, Any]) -> None:
    """Entry of the process: {"engine", "context", "fd"}; writes an Access, or {"error"}, to the descriptor as JSON."""
    try:
        answer = asdict(load(ClusterSettings(name=argument["engine"], context=argument["context"])))
    except EngineError as error:
        answer = {"error": str(error)}
    with os.fdopen(argument["fd"], "w", encoding="utf-8") as pipe:
        json.dump(answer, pipe)


def load(settings: ClusterSettings) -> Access:
    """Read the context of the settings; raises EngineError."""
    connection = connecting.connect(settings)
    configuration = connection.configuration
    return Access(
        server=connection.server,
        authority=_text(configuration.ssl_ca_cert),
        certificate=_text(configuration.cert_file),
        private_key=_text(configuration.key_file),
        authorization=connection.headers().get("authorization", ""),
        verify=bool(configuration.verify_ssl),
        server_name=configuration.tls_server_name or "",
        proxy=_proxy(configuration),
    )


def _text(path: str | None) -> str:
    return Path(path).read_text(encoding="utf-8") if path else ""


def _proxy(configuration: Any) -> str:
    """Return the proxy's URL unless the API server is among the hosts that go without."""
    host = urlsplit(configuration.host).hostname or ""
    without = [one.strip().lstrip("*.") for one in (configuration.no_proxy or "").split(",")]
    if any(one and (host == one or host.endswith(f".{one}")) for one in without) or "*" in (
        configuration.no_proxy or ""
    ):
        return ""
    return configuration.proxy or ""


async def fetch(engine: str, context: str | None) -> Access:
    """Have a process read the kubeconfig; raises CredentialsError."""
    return await asyncio.to_thread(_fetch, engine, context)


def _fetch(engine: str, context: str | None) -> Access:
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as pipe:
        told: list[str] = []
        # read while it runs: certificates may be more than a pipe holds
        reader = threading.Thread(target=lambda: told.append(pipe.read()), name="nbdeploy-login", daemon=True)
        try:
            process = launch(
                "nbdeploy.engines.kubernetes.credentials:main",
                {"engine": engine, "context": context, "fd": writing},
                path=kernel_path(),
                environment=os.environ,
                folder=Path.cwd(),
                output=subprocess.DEVNULL,
                descriptors=(writing,),
            )
        finally:
            os.close(writing)
        reader.start()
        ended = ends_within(process, READ_TIMEOUT)
        if not ended:
            process.kill()
        reader.join(1.0)
        if not ended:
            raise CredentialsError(f"logging in took more than {READ_TIMEOUT:.0f} s")
        answer = json.loads("".join(told) or '{"error": "the process that reads the kubeconfig died"}')
    if "error" in answer:
        raise CredentialsError(answer["error"])
    return Access(**answer)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what logging in may need of an environment: kubeconfig, exec plugins and clouds; paths made absolute."""
    kept = {name: value for name, value in environ.items() if name.startswith(_PREFIXES)}
    if kept.get("KUBECONFIG"):
        parts = kept["KUBECONFIG"].split(os.pathsep)
        kept["KUBECONFIG"] = os.pathsep.join(str(Path(part).expanduser().absolute()) for part in parts if part)
    return kept
