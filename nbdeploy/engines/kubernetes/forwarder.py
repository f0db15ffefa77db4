"""The forwarder of one Endpoint on a cluster: a process of its own that listens on this machine and pipes each
connection through the API server to a ready pod. It never reads a request, and lives until the Endpoint is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from nbdeploy.engines.kubernetes.credentials import CredentialsError, fetch
from nbdeploy.engines.kubernetes.portforward import Api, ApiError, Tunnel, TunnelError
from nbdeploy.engines.kubernetes.relay import Relay, linger
from nbdeploy.engines.kubernetes.slices import Slices
from nbdeploy.engines.kubernetes.state import State
from nbdeploy.engines.loopback import problem
from nbdeploy.process import Identity

HOLD = 3.0  # seconds a connection waits for a pod that is about to be ready, before it gets a 503
FIRST = 15.0  # seconds it waits while the forwarder, just started and logged in, asks for the first time
FAREWELL = 2.0  # seconds that calls may go on after the order to stop
_AGAIN = 0.2  # seconds before pods that refused are tried again
_PING = 20.0  # seconds between signs of life asked of each tunnel
_DEAD = 60.0  # seconds without one, while its pod is not ready either, until a tunnel is given up
_LOG = 1 << 18  # bytes of the log
_UNAUTHORIZED, _FORBIDDEN = 401, 403


def main(argument: dict[str, Any]) -> None:
    """Entry of the process: {"home", "engine", "name", "fd", "context", "namespace", "service", "port"}."""
    asyncio.run(Forwarder(argument).run())
    os._exit(0)


class _Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """No pod can take a connection: what the client is told."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Forwarder:
    """Listener, pods and connections of one Endpoint."""

    def __init__(self, argument: dict[str, Any]) -> None:
        self._name: str = argument["name"]
        self._engine: str = argument["engine"]
        self._context: str | None = argument["context"]
        self._namespace: str = argument["namespace"]
        self._port: int = argument["port"]
        self._listener = socket.socket(fileno=argument["fd"])
        self._state = State(Path(argument["home"]), self._engine)
        self._target = {key: argument[key] for key in ("context", "namespace", "service", "port")}
        self._api: Api | None = None
        self._renewing = asyncio.Lock()
        self._logged_in = 0.0  # when, last
        self._slices = Slices(argument["service"], self._get_api, self._renew, self._changed)
        self._pods: dict[asyncio.Task[Any], str] = {}  # which connection is with which pod, or about to be
        self._relays: dict[asyncio.Task[Any], Relay] = {}
        self._turns: dict[str, int] = {}
        self._said = ""
        self._stopping = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Forward until told to stop, or until the Endpoint is gone."""
        _allow_many_files()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        server = await asyncio.start_server(self._accept, sock=self._listener, backlog=1024, limit=1 << 16)
        me = Identity.of(os.getpid())
        self._state.write(self._name, port=self._listener.getsockname()[1], identity=me, target=self._target)
        tasks = [loop.create_task(one) for one in (self._slices.run(), self._look_after(me), self._stopping.wait())]
        done, _pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a mistake of ours: its traceback goes to the log
        with self._state.locked() if self._slices.gone.is_set() else contextlib.nullcontext():
            server.close()
            if self._slices.gone.is_set() and self._state.forwarder(self._name) == me:
                shutil.rmtree(self._state.folder(self._name), ignore_errors=True)
            called = [task for task, relay in self._relays.items() if relay.waits]
            if called:
                await asyncio.wait(called, timeout=FAREWELL)
            os._exit(0)

    async def _look_after(self, me: Identity) -> None:
        """Ask tunnels for signs of life; return when another forwarder has taken over, or the folder was removed."""
        pinged = time.monotonic()
        while self._state.forwarder(self._name) == me:
            await asyncio.sleep(1.0)
            if time.monotonic() - pinged < _PING:
                continue
            pinged = time.monotonic()
            ready = self._slices.serving.ready if self._slices.serving else ()
            for task, relay in self._relays.items():
                relay.tunnel.ping()
                if self._pods[task] not in ready and pinged - relay.tunnel.heard > _DEAD:
                    relay.tunnel.abort()

    def _changed(self) -> None:
        """Tell of trouble, once; close what is left to pods that are gone, so that clients connect anew."""
        words = self._slices.trouble
        if words != self._said:
            self._said = words
            _say(words or "the cluster answers again")
        if not words and self._slices.serving is not None:
            for task, relay in self._relays.items():
                if self._pods[task] not in self._slices.serving.known:  # its last bytes may still be on their way
                    asyncio.get_running_loop().call_later(1.0, relay.tunnel.close)

    # -- credentials --------------------------------------------------------------------------------------------

    async def _get_api(self) -> Api:
        return self._api or await self._renew(None)

    async def _renew(self, refused: Api | None) -> Api:
        """Return an Api with credentials newer than those that were refused; many may ask at once."""
        async with self._renewing:
            if self._api is None or self._api is refused:
                self._api = Api(await fetch(self._engine, self._context), self._namespace)
                self._logged_in = time.monotonic()
            return self._api

    # -- connections --------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a client."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("not in a task")
        try:
            await self._serve(task, reader, writer)
        except OSError:
            pass  # the client is gone
        finally:
            self._pods.pop(task, None)
            writer.close()

    async def _serve(self, task: asyncio.Task[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1 << 16)  # a client that connects before it has a request needs no pod yet
        if not first:
            return
        unanswered, limit = [first], time.monotonic() + HOLD
        tried: dict[str, str] = {}
        while True:
            try:
                tunnel = await self._connect(task, tried, limit)
            except _Refused as error:
                writer.write(problem(error.status, str(error)))
                break
            self._relays[task] = relay = Relay(reader, writer, tunnel, unanswered)
            try:
                await relay.run()
                break
            except TunnelError as error:
                if not (error.unused and relay.repeatable):
                    break  # the pod may have begun to work on it
                tried[self._pods[task]] = str(error)
            finally:
                del self._relays[task], self._pods[task]
                tunnel.close()
        await linger(reader, writer)

    async def _connect(self, task: asyncio.Task[Any], tried: dict[str, str], limit: float) -> Tunnel:
        """Return a tunnel to a ready pod, trying one after the other; those that refused are added to `tried`."""
        while True:
            pod = self._pick(tried)
            if pod:
                self._pods[task] = pod  # counts at once: many may connect together
                try:
                    return await self._tunnel(pod)
                except ApiError as error:
                    del self._pods[task]
                    if error.status == 0:
                        raise _Refused(503, f"{error}: is the VPN on? {self._hint()}") from None
                    if error.status in {_UNAUTHORIZED, _FORBIDDEN}:
                        raise _Refused(502, f"{error}. The Role needs: pods/portforward: get, create.") from None
                    tried[pod] = str(error)
                    self._slices.kick()
                except CredentialsError as error:
                    raise _Refused(502, str(error)) from None
                continue
            self._refuse_without_hope(tried, limit)
            await self._slices.changed(_AGAIN)
            if self._pick(tried) is None:
                tried.clear()

    async def _tunnel(self, pod: str) -> Tunnel:
        api = await self._get_api()
        try:
            return await api.tunnel(pod, self._port)
        except ApiError as error:
            if error.status != _UNAUTHORIZED:
                raise
            return await (await self._renew(api)).tunnel(pod, self._port)

    def _pick(self, tried: dict[str, str]) -> str | None:
        """Return the ready pod with the fewest connections, those with as few in turn; None where there is none."""
        serving = self._slices.serving
        left = [pod for pod in serving.ready if pod not in tried] if serving else []
        if not left:
            return None
        held = list(self._pods.values())
        chosen = min(left, key=lambda pod: (held.count(pod), self._turns.get(pod, 0)))
        self._turns = {pod: turn for pod, turn in self._turns.items() if serving and pod in serving.known}
        self._turns[chosen] = max(self._turns.values(), default=0) + 1
        return chosen

    def _refuse_without_hope(self, tried: dict[str, str], limit: float) -> None:
        """Raise _Refused where waiting is no use, or has lasted long enough."""
        serving, trouble = self._slices.serving, self._slices.trouble
        late = time.monotonic() >= limit
        if trouble and (serving is None or late):
            status = 502 if self._slices.lasting else 503  # clients try again after a 503
            raise _Refused(status, f"The cluster cannot be asked: {trouble.rstrip('.')}. {self._hint()}")
        if serving is None:
            # Logging in has a limit and words of its own: a login program may ask a cloud, on a machine that is slow.
            since = max(limit - HOLD, self._logged_in)
            if not self._renewing.locked() and time.monotonic() >= since + FIRST:
                raise _Refused(503, f"The cluster of {self._name} has not answered yet. {self._hint()}")
        elif not serving.exists:
            raise _Refused(
                503, f"There is no Endpoint {self._name} in {self._namespace}. `nbdeploy ls` shows those there are."
            )
        elif tried and late:
            pod, words = next(iter(tried.items()))
            raise _Refused(503, f"Pod {pod} of {self._name} takes no connection: {words}. {self._hint()}")
        elif not serving.ready and not serving.starting:
            raise _Refused(
                503,
                f"No pod of {self._name} runs: it is stopped (`nbdeploy start {self._name}`), waking up, or its pods "
                f"wait for a place. {self._hint()}",
            )
        elif not serving.ready and late:
            raise _Refused(503, f"No pod of {self._name} is ready yet: it is starting or rolling out. {self._hint()}")

    def _hint(self) -> str:
        return f"`nbdeploy status {self._name}` tells more."


def _allow_many_files() -> None:
    """Each connection takes two descriptors."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say(words: str) -> None:
    """Write a line to the log, which is emptied when it is large."""
    with contextlib.suppress(OSError):
        if os.fstat(1).st_size > _LOG:
            os.ftruncate(1, 0)
    print(time.strftime("%Y-%m-%d %H:%M:%S"), words, file=sys.stdout, flush=True)  # noqa: T201 - the forwarder's log
