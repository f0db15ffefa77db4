"""What one pod's server printed: read whole, or followed through every break, no line twice and none lost."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nbdeploy.engines.kubernetes.kinds import KINDS, path_of
from nbdeploy.engines.kubernetes.refusals import Asked, UnavailableError
from nbdeploy.engines.kubernetes.workload import CONTAINER

if TYPE_CHECKING:
    from nbdeploy.engines.kubernetes.client import Client
    from nbdeploy.engines.kubernetes.streaming import Stream

SILENCE_SECONDS = 20.0  # after which a followed log is asked for anew: something on the way may have stalled it
PAUSE_SECONDS = 1.0  # between two answers
_GONE = "unable to retrieve container logs for"  # a kubelet's words for one that was removed meanwhile
_SECOND = 19  # characters of a time up to its second


def whole(
    client: Client, pod: str, *, tail: int | None = None, previous: bool = False
) -> Generator[tuple[str, str], None, None]:
    """Yield (time, line) of what is there now; see Client.logs."""
    query = {"previous": "true" if previous else "", "tailLines": "" if tail is None else str(tail)}
    last = ""
    for line in client.text(_path(client, pod), _asked(client, pod), query=_query(query)).split("\n"):
        if not line or line.startswith(_GONE):  # what is behind the last newline; each other one has its time
            continue
        when, text = _parted(line)
        last = when or last
        yield last, text


def followed(client: Client, pod: str) -> Generator[tuple[str, str], None, None]:
    """Yield (time, line) from the first line on until the pod has ended, or the client is closed."""
    place, over = _Place(), False
    while not client.closed:
        last_answer, cut = over, False
        query = _query({"follow": "true", "sinceTime": place.since()})
        try:
            stream = client.stream(_path(client, pod), _asked(client, pod), query=query, read=SILENCE_SECONDS)
            if stream is not None:
                yield from place.fresh(stream)
                cut = stream.cut
            over = over or _over(client, pod)
        except UnavailableError:  # who follows asks for more than logs, and hears of it there if it lasts
            cut = True
        if last_answer and not cut:
            yield from place.rest()
            return
        if not over or cut:
            time.sleep(PAUSE_SECONDS)


class _Place:
    """How far a log has been read."""

    def __init__(self) -> None:
        self._last = ""  # time of the last line
        self._same = 0  # how many lines had that time
        self._held: tuple[str, str] | None = None  # a last line without an end; the next answer may have it whole
        self._said: set[str] = set()

    def since(self) -> str:
        """Return the time to ask from, in whole seconds as the API knows them; "" for the beginning."""
        return f"{self._last[:_SECOND]}Z" if self._last else ""

    def fresh(self, stream: Stream) -> Iterator[tuple[str, str]]:
        """Yield of an answer from `since` on the lines that were not read before."""
        began, repeated = self._last, self._same
        try:
            for line in stream.lines():
                when, text = _parted(line.decode(errors="replace"))
                if not when:
                    yield from self._remark(text)
                elif when < began:
                    continue
                elif when == began and repeated:
                    repeated -= 1
                else:
                    yield from self._next(when, text)
        finally:
            stream.stop()
        when, text = _parted(stream.rest.decode(errors="replace"))
        if not when:
            yield from self._remark(text)
        elif when > began or (when == began and not repeated):
            self._held = when, text

    def rest(self) -> Iterator[tuple[str, str]]:
        """Yield the last line where it never got an end."""
        if self._held is not None:
            yield self._held
        self._held = None

    def _next(self, when: str, text: str) -> Iterator[tuple[str, str]]:
        if self._held is not None and self._held[0] != when:  # it is not repeated: it was all there is
            yield self._held
        self._held = None
        self._same = self._same + 1 if when == self._last else 1
        self._last = max(when, self._last)
        yield when, text

    def _remark(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield words of the node's own, such as "failed to create fsnotify watcher: too many open files", once."""
        if text[:1].isalpha() and text not in self._said and not text.startswith(_GONE):  # else a time that was cut
            self._said.add(text)
            yield self._last, text


def _parted(line: str) -> tuple[str, str]:
    """Return (time, text) of a line; the time in UTC with nine digits, so that times compare, "" where it has none."""
    stamp, _, text = line.partition(" ")
    seconds, _, rest = stamp.partition(".")
    fraction = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        time_of = datetime.fromisoformat(seconds + rest[len(fraction) :])
    except ValueError:
        return "", line
    if time_of.tzinfo is None:
        return "", line
    return f"{time_of.astimezone(UTC).isoformat()[:_SECOND]}.{fraction:0<9}Z", text


def _query(more: dict[str, str]) -> dict[str, str]:
    return {"container": CONTAINER, "timestamps": "true", **more}


def _path(client: Client, pod: str) -> str:
    return f"{path_of(KINDS['Pod'], client.namespace, pod)}/log"


def _asked(client: Client, pod: str) -> Asked:
    return Asked("get", "", "pods/log", pod, client.namespace)


def _over(client: Client, pod: str) -> bool:
    """Tell whether a pod will print no more."""
    found = client.get("Pod", pod)
    return found is None or found.get("status", {}).get("phase") in {"Succeeded", "Failed"}
