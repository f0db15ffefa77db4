"""Where an Endpoint on a cluster is reached: inside by its Service's name, outside by a Gateway or Ingress, else
through a forwarder, a process on this machine that outlives kernels and pods.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nbdeploy.engines.kubernetes import manifests
from nbdeploy.engines.kubernetes.credentials import environment
from nbdeploy.engines.kubernetes.settings import ClusterSettings
from nbdeploy.engines.kubernetes.state import State
from nbdeploy.engines.kubernetes.workload import USERS_PORT, object_name
from nbdeploy.engines.loopback import PortTakenError, bound
from nbdeploy.errors import EngineError, UsageError
from nbdeploy.process import Identity, clean_environment, kernel_path, launch, let_go
from nbdeploy.spec import label

START_TIMEOUT = 20.0  # seconds for a forwarder to listen, on a busy machine
_RELEASE = 0.5  # seconds to wait for a port
_LOG = 1 << 18  # bytes of a log that a next forwarder still appends to


def address(name: str, settings: ClusterSettings, *, in_cluster: bool, namespace: str) -> str:
    """Return the URL of an Endpoint that needs no forwarder; "" where it needs one."""
    if in_cluster:
        return f"http://{object_name(name)}.{namespace}.svc"
    return manifests.external_url(settings, name)


class Forwarders:
    """The forwarders of one engine on this machine.

    Args:
        home: of nbdeploy.
        settings: of the engine.
        environ: where kubeconfig and login programs are found.
    """

    def __init__(self, home: Path, settings: ClusterSettings, environ: Mapping[str, str] = os.environ) -> None:
        if settings.name in {"", ".", ".."} or "/" in settings.name:
            raise UsageError(f"engines.{settings.name}: the name of an engine names a folder, so it has no / in it.")
        self._home = home.absolute()
        self._settings = settings
        self._environ = environ
        self._state = State(self._home, settings.name)

    def url(self, name: str) -> str:
        """Return where an Endpoint is reached on this machine once its forwarder runs; "" where it never had one."""
        port = self._state.port(_checked(name))
        return f"http://127.0.0.1:{port}" if port else ""

    def alive(self, name: str) -> bool:
        """Whether the forwarder of an Endpoint runs."""
        identity = self._state.forwarder(_checked(name))
        return identity is not None and identity.alive()

    def ensure(self, name: str, namespace: str, *, port: int = 0) -> str:
        """Return the URL of the forwarder, which is started if it does not run.

        Args:
            name: of the Endpoint.
            namespace: its Service is in.
            port: a fixed one; 0 is the one it had before if that is free, else any.

        Raises:
            EngineError: the port is taken, or the process cannot be started.
        """
        state, target = self._state, self._target(_checked(name), namespace)
        with state.locked():
            identity, kept = state.forwarder(name), state.port(name)
            if identity is not None and identity.alive():
                if state.read(name).get("target") == target and port in {0, kept}:
                    return self.url(name)
                identity.end()
            state.create(name)
            with bound(port, patience=_RELEASE) if port else _bound_if_free(kept) as listener:
                listener.listen(1024)
                self._start(name, target, listener.fileno())
            return self.url(name)

    @contextlib.contextmanager
    def ahead(self, name: str, namespace: str, *, port: int = 0) -> Iterator[Callable[[], None]]:
        """Give what starts a forwarder beside other work, which is over when the block is left.

        It is for an Endpoint that is about to be reached: its process takes seconds to start. One that runs is left
        alone, and so is a URL that another port would change; whoever calls `ensure` next hears of what failed here.

        Args:
            name: of the Endpoint.
            namespace: its Service is in.
            port: as for `ensure`.
        """

        def start() -> None:
            with contextlib.suppress(EngineError, OSError):
                if not self.alive(name) and port in {0, self._state.port(name) or port}:
                    self.ensure(name, namespace, port=port)

        starter = threading.Thread(target=start, name=f"nbdeploy-forwarder-{name}", daemon=True)
        try:
            yield starter.start
        finally:
            if starter.ident is not None:
                starter.join()

    def stop(self, name: str) -> bool:
        """End the forwarder of an Endpoint: connecting is refused. Its port stays its own. False if none ran."""
        with self._state.locked():
            return self._stop(_checked(name))

    def forget(self, name: str) -> None:
        """End the forwarder of an Endpoint that is no more, and remove what is kept of it."""
        with self._state.locked():
            self._stop(_checked(name))
            self._state.remove(name)

    def _stop(self, name: str) -> bool:
        identity, port = self._state.forwarder(name), self._state.port(name)
        if identity is None or not identity.is_here():  # of another machine: it ends itself when its record changes
            return False
        alive = identity.alive()
        if alive and not identity.end():
            raise EngineError(f"The forwarder of {name} (process {identity.pid}) does not end.")
        if alive:
            _bound_if_free(port).close()  # once this returns, connecting is refused
        self._state.write(name, port=port, identity=None, target={})
        return alive

    def _target(self, name: str, namespace: str) -> dict[str, Any]:
        """Return what a forwarder forwards to; another target takes another process."""
        return {
            "context": self._settings.context,
            "namespace": namespace,
            "service": object_name(name),
            "port": USERS_PORT,
        }

    def _start(self, name: str, target: Mapping[str, Any], listener: int) -> None:
        """Start the process; return once it serves the listener."""
        folder = self._state.folder(name)
        argument = {"home": str(self._home), "engine": self._settings.name, "name": name, "fd": listener, **target}
        with _log(folder) as output:
            process = launch(
                "nbdeploy.engines.kubernetes.forwarder:main",
                argument,
                path=kernel_path(),
                environment={**clean_environment(self._environ), **environment(self._environ)},
                folder=folder,
                output=output,
                descriptors=(listener,),
            )
        let_go(process)
        if not self._started(name, process):
            Identity.of(process.pid).end_group()
            last = (folder / "forwarder.log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise EngineError(f"The forwarder of {name} did not start. Its last words:\n  " + "\n  ".join(last))

    def _started(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        limit = time.monotonic() + START_TIMEOUT
        while time.monotonic() < limit and process.returncode is None:
            identity = self._state.forwarder(name)
            if identity is not None and identity.pid == process.pid and identity.alive():
                return True
            time.sleep(0.005)
        return False


def _checked(name: str) -> str:
    """Return the name if it is one of an Endpoint; that also keeps ".." and "/" out of paths."""
    if not name or label(name) != name:
        raise UsageError(f"{name!r} is no name of an Endpoint.")
    return name


def _bound_if_free(port: int) -> socket.socket:
    try:
        return bound(port, patience=_RELEASE)
    except PortTakenError:
        return bound(0)


def _log(folder: Path) -> IO[bytes]:
    path = folder / "forwarder.log"
    if path.exists() and path.stat().st_size > _LOG:
        path.unlink()
    return path.open("ab")
