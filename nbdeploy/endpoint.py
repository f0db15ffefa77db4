"""Endpoint: the handle on something deployed, and how other notebooks find it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nbdeploy import changes
from nbdeploy.client import Client
from nbdeploy.config import home
from nbdeploy.engines.base import Engine, HasHistory, HasKey, HasReach, HasRemains
from nbdeploy.errors import EndpointNotFoundError, EngineError, NbdeployError, UsageError
from nbdeploy.jobs import all_jobs, last_job, running_job
from nbdeploy.spec import Revision, Status
from nbdeploy.survey import engine_named, find, survey


class Endpoint:
    """A deployed model: call it like the function it came from.

    An Endpoint holds a name, an engine and a URL. It can be pickled (so another predict may call it); its key then
    travels with it.
    """

    def __init__(
        self, *, name: str, engine: str, url: str, key: str = "", timeout: float = 60.0, idempotent: bool = False
    ) -> None:
        self._name = name
        self._engine_name = engine
        self._url = url
        self._key = key
        self._timeout = timeout
        self._idempotent = idempotent
        self._client: Client | None = None
        self._held: Engine | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Endpoint {self._name or self._url} on {self._engine_name or 'elsewhere'}: {self._url}>"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in {"_client", "_held", "_lock"}}
        if not state["_key"]:
            with contextlib.suppress(NbdeployError):  # its engine is out of reach from here
                state["_key"] = self._find_key()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _client=None, _held=None, _lock=threading.Lock())

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The Endpoint's name."""
        return self._name

    @property
    def url(self) -> str:
        """The base URL, without /predict."""
        return self._url

    @property
    def revision(self) -> int:
        """Number of the Revision that serves now."""
        return self.status().revision

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine_name

    # -- calls --------------------------------------------------------------------------------------------------

    def __call__(self, /, *values: Any, **arguments: Any) -> Any:
        """Return what predict returns; raises RemoteError and its kinds. Values without a name go by place."""
        client = self._connected()
        return client.call({**self._named(client, values), **arguments} if values else arguments)

    def stream(self, /, *values: Any, **arguments: Any) -> Iterator[Any]:
        """Yield what a generator function yields, as it comes."""
        client = self._connected()
        return client.stream({**self._named(client, values), **arguments} if values else arguments)

    def _named(self, client: Client, values: tuple[Any, ...]) -> dict[str, Any]:
        """Give values their parameters' names, as a call of the function itself would."""
        names = client.parameters()
        if len(values) > len(names):
            raise UsageError(
                f"{len(values)} values were given, but the Endpoint takes {', '.join(names) or 'none'}. "
                f"Name them: endpoint({', '.join(f'{name}=…' for name in names)})"
            )
        return dict(zip(names, values, strict=False))

    def map(self, items: Iterable[Mapping[str, Any]], /, *, concurrency: int | None = None) -> list[Any]:
        """Call for each dict of arguments; results in order. Concurrency follows the Replicas (twice their number)."""
        if concurrency is None:
            concurrency = 4
            with contextlib.suppress(NbdeployError):  # connected by URL, or its engine is out of reach
                concurrency = 2 * max(1, self.status().ready)
        return self._connected().map(items, concurrency)

    async def call_async(self, /, *values: Any, **arguments: Any) -> Any:
        """As a call, for async code."""
        client = self._connected()
        return await client.call_async({**self._named(client, values), **arguments} if values else arguments)

    def _connected(self) -> Client:
        if self._client is None and self._engine_name:
            self._reach()
        with self._lock:
            if self._client is None:
                if not self._url:
                    raise EngineError(
                        f"{self._name} has no URL yet: `nbdeploy status {self._name}` tells how far it is."
                    )
                self._client = Client(
                    self._url,
                    self._key or self._find_key(),
                    timeout=self._timeout,
                    idempotent=self._idempotent,
                    revive=self._revived if self._engine_name else None,
                )
            return self._client

    def _reach(self) -> None:
        """Learn the URL, and have the engine bring up what it needs on this machine."""
        try:
            engine = self._engine()
            if isinstance(engine, HasReach):
                self._url = engine.reach(self._name)
            elif not self._url:
                self.status()  # a deploy that nobody waited for has come to its URL meanwhile
        except NbdeployError:
            if not self._url:  # else it travelled into another predict, where the engine is out of reach
                raise

    def _revived(self) -> str:
        """Have the engine bring up again what stood at the URL, such as a forwarder that was killed; return the URL."""
        self._reach()
        return self._url

    def _find_key(self) -> str:
        if not self._engine_name:
            return ""
        engine = self._engine()
        return engine.key(self._name) if isinstance(engine, HasKey) else ""

    # -- state --------------------------------------------------------------------------------------------------

    def _engine(self) -> Engine:
        if not self._engine_name:
            raise UsageError(
                f"{self._url} was connected by URL: only calls are possible. connect(NAME) gives one that can do more."
            )
        if self._held is None:
            self._held = engine_named(self._engine_name)  # a cluster's login program may take seconds
        return self._held

    def status(self) -> Status:
        """Return what the Engine knows of it now."""
        status = self._engine().status(self._name)
        self._moved(status)
        return status

    def _moved(self, status: Status) -> None:
        """Go to another URL if there is one now."""
        if status.url and status.url != self._url:
            self._disconnect()
            self._url = status.url

    def _disconnect(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def metrics(self) -> dict[str, float]:
        """Return the sum over Replicas of each metric, by its Prometheus name (histograms as _sum and _count)."""
        return summed(self._engine().scrape(self._name))

    def logs(self, *, follow: bool = False) -> str | Iterator[str]:
        """Return what the Replicas printed; with `follow`, an iterator of lines that goes on."""
        lines = self._engine().logs(self._name, follow=follow)
        return lines if follow else "\n".join(lines)

    def history(self) -> list[Revision]:
        """Return its Revisions, oldest first."""
        engine = self._engine()
        return engine.revisions(self._name) if isinstance(engine, HasHistory) else []

    def receipt(self) -> dict[str, Any]:
        """Return the card of its last deploy on this machine as data: what travelled, parity, times."""
        for job in all_jobs(home()):
            if job.spec["name"] == self._name and job.spec["engine"] == self._engine_name:
                done = [event for event in job.events() if event.ends and event.state == "done"]
                if done and not done[-1].data["card"]["dry_run"]:
                    return dict(done[-1].data["card"])
        raise EndpointNotFoundError(f"There is no record of a deploy of {self._name!r} on this machine.")

    # -- changes ------------------------------------------------------------------------------------------------

    def scale(self, *, min_replicas: int | None = None, max_replicas: int | None = None) -> Status:
        """Change the number of Replicas; none is restarted."""
        return self._apply(changes.scaled(self._last(), min_replicas, max_replicas))

    def rollback(self, revision: int | None = None) -> Status:
        """Serve an earlier Revision again; it becomes a new Revision.

        By default it is the newest with other code, model or settings, for a scale or stop is nothing to go back
        from; or what serves, if the deploy of a later one was killed.
        """
        current = self._last()
        job = last_job(home(), self._name, self._engine_name)
        if revision is None and job is not None and job.half_way(current.number):
            target = current  # what served before the Revision whose deploy was killed
        else:
            target = changes.earlier(self.history(), revision)
        return self._apply(dataclasses.replace(target, stopped=False))

    def stop(self) -> Status:
        """Take all Replicas away; the name, key and URL stay."""
        return self._apply(dataclasses.replace(self._last(), stopped=True))

    def start(self) -> Status:
        """Bring the Replicas back after a stop, or after a restart of the machine."""
        return self._apply(dataclasses.replace(self._last(), stopped=False))

    def remains(self) -> list[str]:
        """Name what `delete` leaves elsewhere: Images in a registry."""
        engine = self._engine()
        return engine.remains(self._name) if isinstance(engine, HasRemains) else []

    def delete(self) -> None:
        """Remove the Endpoint: no process, object or file of it is left. `remains` names what stays elsewhere."""
        engine = self._engine()
        job = running_job(home(), self._name, self._engine_name)
        if job is not None:
            job.cancel()
        try:
            engine.delete(self._name)
        except EndpointNotFoundError:
            if job is None:  # else its first deploy was under way, and that is undone
                raise
        self._disconnect()

    def _last(self) -> Revision:
        history = self.history()
        if not history:
            raise EndpointNotFoundError(
                f"No Revision of {self._name} serves yet: its first deploy is under way, or was ended half-way. "
                f"nbdeploy status {self._name} tells which; deploy it again, or nbdeploy delete {self._name}."
            )
        return history[-1]

    def _apply(self, revision: Revision) -> Status:
        number = self._last().number + 1
        fresh = dataclasses.replace(revision, number=number, created=time.time())
        status = self._engine().apply(fresh, None, _silent)
        self._moved(status)
        return status


def _silent(_words: str, _data: Mapping[str, Any]) -> None:
    """Take progress that nobody watches."""


def endpoints(engine: str | None = None) -> list[Endpoint]:
    """Return the Endpoints of one engine, or of all; of an engine that does not answer it is told in a warning."""
    found, silent = survey(engine)
    if silent and not found:
        raise silent[0][1]
    for name, error in silent:
        warnings.warn(f"The engine {name} did not answer: {error}", stacklevel=2)
    return [Endpoint(name=status.name, engine=name, url=status.url) for name, status in found]


def connect(
    name: str | None = None,
    /,
    *,
    url: str | None = None,
    key: str | None = None,
    engine: str | None = None,
    timeout: float = 60.0,
    idempotent: bool = False,
) -> Endpoint:
    """Return an Endpoint by name (of this user on this machine, or of a cluster), or by URL from anywhere.

    Args:
        name: of the Endpoint.
        url: its base URL, instead of a name.
        key: with a URL; default: the variable NBDEPLOY_KEY.
        engine: where to look, if two engines have the name.
        timeout: seconds for a call, retries included.
        idempotent: calls may be sent again after a broken connection.

    Raises:
        EndpointNotFoundError, UsageError.
    """
    if (name is None) == (url is None):
        raise UsageError('Give a name, connect("sentiment"), or a URL, connect(url="https://…").')
    if url is not None:
        base = url.rstrip("/").removesuffix("/predict")
        key = os.environ.get("NBDEPLOY_KEY", "") if key is None else key
        return Endpoint(name="", engine="", url=base, key=key, timeout=timeout, idempotent=idempotent)
    engine_name, status = find(str(name), engine)
    return Endpoint(
        name=status.name, engine=engine_name, url=status.url, key=key or "", timeout=timeout, idempotent=idempotent
    )


def summed(texts: Mapping[str, str]) -> dict[str, float]:
    """Add up the metrics of Replicas; labels are kept in the name, buckets are left out."""
    from prometheus_client.parser import text_string_to_metric_families

    total: dict[str, float] = {}
    for text in texts.values():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    continue
                labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                name = sample.name + (f"{{{labels}}}" if labels else "")
                latest = sample.name.endswith(("_timestamp_seconds", "_ready_seconds", "_loop_lag_seconds"))
                total[name] = max(total.get(name, 0.0), sample.value) if latest else total.get(name, 0.0) + sample.value
    return total
