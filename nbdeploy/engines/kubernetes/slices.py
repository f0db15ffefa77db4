"""Which pods of an Endpoint serve, as its Service's EndpointSlices tell, followed by a watch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nbdeploy.engines.kubernetes.credentials import CredentialsError
from nbdeploy.engines.kubernetes.portforward import Api, ApiError

_GROUP = "apis/discovery.k8s.io/v1"
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _TOO_OLD = 401, 403, 404, 410
_PAUSE, _LONGEST = 0.5, 30.0  # seconds between tries while the API server cannot be asked, doubled up to the second
_APART = 0.5  # seconds between two lists, however many doubt the first
_ABSENT = 3.0  # seconds without any slice before the Service is looked for
_ABSENT_UNSEEN = 15.0  # seconds of the same where the Service may not be looked at
_NO_RIGHT = 3600.0  # seconds without the right to look: the namespace or the Role is gone for good


@dataclass(frozen=True)
class Serving:
    """Names of pods: those that take requests, those that may soon, and all that are there, dying ones included."""

    ready: tuple[str, ...] = ()
    starting: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    exists: bool = False


def read(slices: Iterable[dict[str, Any]]) -> Serving:
    """Return what EndpointSlices say. `exists` is whether there are any: a Service without pods has an empty one."""
    ready, starting, known, exists = set(), set(), set(), False
    for piece in slices:
        exists = True
        for endpoint in piece.get("endpoints") or ():
            pod = (endpoint.get("targetRef") or {}).get("name", "")
            conditions = endpoint.get("conditions") or {}
            if not pod:
                continue
            known.add(pod)
            if conditions.get("ready") is not False:  # unknown counts as ready
                ready.add(pod)
            elif not conditions.get("terminating"):
                starting.add(pod)
    return Serving(tuple(sorted(ready)), tuple(sorted(starting - ready)), frozenset(known), exists)


class Slices:
    """The EndpointSlices of one Service.

    Args:
        service: its name.
        api: gives the API server; raises CredentialsError.
        renew: has the credentials of this Api read anew, because it refused them.
        on_change: called after each change.

    Attributes:
        serving: None until the API server was first asked.
        trouble: why it cannot be asked at present, for the user; "".
        lasting: whether somebody has to do something about that.
        gone: set once there is no such Service.
    """

    def __init__(
        self,
        service: str,
        api: Callable[[], Awaitable[Api]],
        renew: Callable[[Api], Awaitable[Api]],
        on_change: Callable[[], None],
    ) -> None:
        self.serving: Serving | None = None
        self.trouble = ""
        self.lasting = False
        self.gone = asyncio.Event()
        self._service = service
        self._selector = f"kubernetes.io/service-name={service}"
        self._api = api
        self._renew = renew
        self._on_change = on_change
        self._objects: dict[str, dict[str, Any]] = {}
        self._absent = self._forbidden = 0.0  # since when
        self._listed = 0.0
        self._news = asyncio.Event()
        self._kicked = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Wait for the next change, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def kick(self) -> None:
        """Ask again at once, without a pause: what is known does not seem to be true."""
        self._kicked.set()

    async def run(self) -> None:
        """Follow the slices for as long as the Service is there."""
        pause = _PAUSE
        while not self.gone.is_set():
            try:
                api = await self._api()
                await self._follow(api)
                pause = _PAUSE
            except ApiError as error:
                if error.status == _TOO_OLD:
                    continue
                self._tell(error)
                if self.trouble and error.status in {0, _UNAUTHORIZED}:  # the cluster may have got another address
                    with contextlib.suppress(CredentialsError):
                        await self._renew(api)
            except CredentialsError as error:
                self._trouble(str(error), lasting=True)
            if self.trouble:
                self._kicked.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._kicked.wait()
                pause = min(_LONGEST, pause * 2)

    async def _follow(self, api: Api) -> None:
        """List, then watch, until the watch ends or somebody doubts it."""
        await asyncio.sleep(self._listed + _APART - time.monotonic())
        self._listed = time.monotonic()
        self._kicked.clear()
        try:
            listed = await api.get(_GROUP, "endpointslices", labelSelector=self._selector)
        except ApiError as error:
            if error.status != _UNAUTHORIZED:
                raise
            api = await self._renew(api)  # a token lives for minutes: no reason for words or a pause
            listed = await api.get(_GROUP, "endpointslices", labelSelector=self._selector)
        self._forbidden = 0.0
        self._objects = {one["metadata"]["name"]: one for one in listed["items"]}
        self._update()
        tasks = [
            asyncio.ensure_future(self._watch(api, listed["metadata"]["resourceVersion"])),
            asyncio.ensure_future(self._kicked.wait()),
            asyncio.ensure_future(self._until_absent(api)),
        ]
        try:
            done, _pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, api: Api, version: str) -> None:
        events = api.watch(_GROUP, "endpointslices", labelSelector=self._selector, resourceVersion=version)
        async with contextlib.aclosing(events):
            async for event in events:
                if event["type"] == "ERROR":
                    raise ApiError(int(event["object"].get("code", 0)), str(event["object"].get("message", "")))
                if event["type"] == "BOOKMARK":
                    continue
                name = event["object"]["metadata"]["name"]
                if event["type"] == "DELETED":
                    self._objects.pop(name, None)
                else:
                    self._objects[name] = event["object"]
                self._update()

    def _update(self) -> None:
        self.trouble = ""
        self.serving = read(self._objects.values())
        if self.serving.exists:
            self._absent = 0.0
        elif not self._absent:
            self._absent = time.monotonic()
        self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
        self._on_change()

    async def _until_absent(self, api: Api) -> None:
        """Return once there is no such Service: its slices went, and it is not there when asked for."""
        while True:
            await asyncio.sleep(1.0)
            absent = time.monotonic() - self._absent if self._absent else 0.0
            if absent < _ABSENT:
                continue
            try:
                await api.get("api/v1", f"services/{self._service}")
            except ApiError as error:
                if error.status == _NOT_FOUND or (error.status == _FORBIDDEN and absent > _ABSENT_UNSEEN):
                    self.gone.set()
                    return

    def _tell(self, error: ApiError) -> None:
        if error.status == _FORBIDDEN:
            self._forbidden = self._forbidden or time.monotonic()
            if time.monotonic() - self._forbidden > _NO_RIGHT:
                self.gone.set()
            self._trouble(f"{error}. The Role needs: endpointslices (discovery.k8s.io): get, list, watch", lasting=True)
        elif error.status == _UNAUTHORIZED:
            self._trouble("the cluster no longer accepts your credentials: log in to it again", lasting=True)
        else:
            self._trouble(str(error))

    def _trouble(self, words: str, *, lasting: bool = False) -> None:
        self.trouble, self.lasting = words, lasting
        self._announce()
