"""The front: one ASGI callable that answers predictions itself and leaves every other path to FastAPI.

FastAPI's own `/predict` route is a shell that carries the schema and calls the same `answer`, so both ways are equal
by construction. Why not FastAPI alone: measured, its machinery costs two to six times the whole of this path.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from nbdeploy_server import wire
from nbdeploy_server.admission import Admission, Headers
from nbdeploy_server.errors import RequestError
from nbdeploy_server.failure import notebook_lines
from nbdeploy_server.forms import example_of
from nbdeploy_server.lanes import Lane, Work
from nbdeploy_server.metrics import Metrics
from nbdeploy_server.predictor import Predictor
from nbdeploy_server.progress import Progress
from nbdeploy_server.settings import ReplicaSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Whole = Callable[[Any, bytes, bytes], bool]

JSON = b"application/json"
PACKED = wire.CONTENT_TYPE.encode()
PACKED_STREAM = PACKED + b"-seq"  # u8 tag (0 item, 1 error, 2 end), u32 length, payload
EVENTS = b"text/event-stream"
LINES = b"application/x-ndjson"
PROBES = {"/livez", "/readyz"}
IN_LANE = 256 * 1024  # bytes: a larger body is decoded in the lane, because the loop must stay free
SWEEP = 0.25  # seconds between looks at deadlines
_HEAD = (  # of a complete answer; milliseconds
    b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
    b"server-timing: queue;dur=%.3f, decode;dur=%.3f, predict;dur=%.3f, encode;dur=%.3f, batch;desc=1\r\n"
    b"x-nbdeploy-revision: "
)
LONGEST_EXAMPLE = 500  # characters of a sample that is shown in a message
READ_TIMEOUT = 30.0  # seconds without a byte of a body that is on its way (408)


class Front:
    """Answers requests of one Replica.

    Attributes:
        app: answers every path but POST /predict.
        whole: protocol.whole where the server has it: writes a complete answer in one go.
        draining: set when the Replica is being replaced.
        closing: set when every answer shall ask its caller to reconnect, to another Replica.
        spread: set while other Replicas could take connections of this one.
        ready: unset until the model is loaded and warm.
        progress: what /readyz tells.
        note: what a person should know of the load, as that a GPU is missing.
        on_inflight: told the number of requests in flight.
    """

    def __init__(self, predictor: Predictor, lane: Lane, settings: ReplicaSettings, metrics: Metrics) -> None:
        self.predictor = predictor
        self.lane = lane
        self.settings = settings
        self.metrics = metrics
        self.admission = Admission(settings, metrics, lane.concurrency)
        self.app: Asgi | None = None
        self.whole: Whole | None = None
        self.draining = False
        self.closing = False
        self.spread = False
        self.ready = False
        self.progress = Progress(settings.revision)
        self.note = ""
        self.on_inflight: Callable[[int], None] = lambda _count: None
        self._json = predictor.decoder.json
        self._packed = predictor.decoder.packed
        self._open: dict[Work, None] = {}  # in the order of their admission
        self._loop: asyncio.AbstractEventLoop | None = None
        self._revision = str(settings.revision).encode()
        self._head = _HEAD + self._revision + b"\r\n"
        self._target = settings.target_in_flight or lane.concurrency
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the lane and the sweeper; called on the running loop."""
        self._loop = asyncio.get_running_loop()
        self.lane.start(self._loop, self._done)
        self._keep(asyncio.create_task(self._sweep()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request."""
        if scope["type"] == "http" and scope["path"] == "/predict" and scope["method"] == "POST":
            await self.answer(scope, receive, send)
        elif scope["type"] == "http":
            await self._page(scope, receive, send)

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let FastAPI answer what is not a prediction, with the headers that every answer carries."""
        began = time.perf_counter()
        headers: Headers = dict(scope["headers"])
        request_id = self.admission.request_id(headers)

        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                timing = b"app;dur=%.3f" % ((time.perf_counter() - began) * 1e3)
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id),
                    (b"server-timing", timing),
                ]
                if self.closing:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            if scope["path"] not in PROBES:
                self.admission.check_host(headers)
            if self.app is None:
                raise RequestError(503, "The Replica is still starting.", retry_after=1)
            await self.app(scope, receive, marked)
        except RequestError as error:
            await self.problem(error, send, request_id, headers, began)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one prediction: admission, decode, lane, encode."""
        began = time.perf_counter()
        headers: Headers = dict(scope["headers"])
        request_id = self.admission.request_id(headers)
        status = 500
        try:
            self.admission.check(headers)
            if not self.ready:
                raise RequestError(503, "The Replica is still starting.", retry_after=1)
            reply = self._accepted(headers)
            body = await self._read(receive)
            work = self._admit(receive, headers, body, reply, began)
            if work.events is not None:
                status = await self._stream(work, reply, send, request_id, headers)
            else:
                await work.future
                status = await self._plain(work, reply, send, request_id, headers)
        except RequestError as error:
            status = await self.problem(error, send, request_id, headers, began)
        except Exception as error:  # noqa: BLE001 - the last line of defence: the caller gets a 500, the log the cause
            print(f"nbdeploy: {type(error).__name__} while answering: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
            told = RequestError(500, "The server failed; its log has the cause.")
            status = await self.problem(told, send, request_id, headers, began)
        if getattr(getattr(receive, "__self__", None), "disconnected", False):
            status = 499
        self.metrics.requests[status] = self.metrics.requests.get(status, 0) + 1
        self.metrics.request_seconds.observe(time.perf_counter() - began)

    async def _read(self, receive: Receive) -> bytes:
        """Return the whole body; one that is here already, as most are, is taken without a timer."""
        if getattr(getattr(receive, "__self__", None), "more_body", True):
            message = await self._more(receive)
        else:
            message = await receive()
        body: bytes = message.get("body", b"")
        parts, size = [body], len(body)
        while size <= self.settings.max_body and message.get("more_body"):
            message = await self._more(receive)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        if size > self.settings.max_body:
            raise self.admission.too_large()
        if message["type"] == "http.disconnect":
            raise RequestError(499, "The caller left.")
        return body if len(parts) == 1 else b"".join(parts)

    async def _more(self, receive: Receive) -> MutableMapping[str, Any]:
        try:
            return await asyncio.wait_for(receive(), READ_TIMEOUT)
        except TimeoutError:
            raise RequestError(408, f"No byte of the body came for {READ_TIMEOUT:.0f} s.") from None

    def _admit(self, receive: Receive, headers: Headers, body: bytes, reply: bytes, began: float) -> Work:
        self.admission.check_queue()  # once more: others were admitted while this body came
        decode = self._decoder(headers)
        loop = self._loop or asyncio.get_running_loop()
        work = Work(loop.create_future(), getattr(receive, "__self__", None), began + self.settings.timeout)
        if len(body) > IN_LANE:
            work.prepare = lambda: decode(body)
        else:
            work.arguments = decode(body)
        work.encode = wire.pack if reply in {PACKED, PACKED_STREAM} else wire.to_json
        if self.predictor.streams and reply in {EVENTS, LINES, PACKED_STREAM}:
            encode, frame = work.encode, _FRAMES[reply]
            work.encode = lambda item: frame(encode(item))
            work.stream()
        work.admitted = time.perf_counter()
        self._open[work] = None
        self.metrics.last_request = time.time()
        self.on_inflight(self.metrics.change(+1))
        self.lane.submit(work)
        return work

    def _decoder(self, headers: Headers) -> Callable[[bytes], dict[str, Any]]:
        content_type = headers.get(b"content-type", JSON)
        if content_type == JSON:
            return self._json
        kind = content_type.partition(b";")[0].strip().lower()
        if kind == JSON:
            return self._json
        if kind in {PACKED, b"application/msgpack", b"application/x-msgpack"}:
            return self._packed
        said = kind.decode("latin-1")
        raise RequestError(415, f"Bodies of type {said!r} are not read here. Try: {self._curl(headers)}")

    def _accepted(self, headers: Headers) -> bytes:
        accept = headers.get(b"accept", b"*/*")
        reply, have = _chosen(accept, streams=self.predictor.streams)
        if not reply:
            said = accept.decode("latin-1")
            raise RequestError(406, f"There is no answer of type {said!r}; there is {have}. Try: {self._curl(headers)}")
        return reply

    def _curl(self, headers: Headers) -> str:
        """Return a command that works on this machine; the caller has shown the key, so the sample may stand in it."""
        body = ""
        if self.predictor.sample is not None:
            body = wire.to_json(wire.unpack(self.predictor.sample)["arguments"]).decode()
        if not body or len(body) > LONGEST_EXAMPLE:
            body = json.dumps(example_of(self.predictor.signature.schema()))
        key = f'-H "Authorization: Bearer $(nbdeploy key {self.settings.name})" ' if self.settings.key_sha256 else ""
        url = shlex.quote(f"http://{headers.get(b'host', b'HOST').decode('latin-1')}/predict")
        return f"curl -H 'Content-Type: application/json' {key}-d {shlex.quote(body)} {url}"

    def _done(self, work: Work) -> None:
        """Release the slot: only now is the work really done, whoever waited for it."""
        self._open.pop(work, None)
        self.on_inflight(self.metrics.change(-1))
        if work.abandoned:
            self.metrics.abandoned[work.abandoned] = self.metrics.abandoned.get(work.abandoned, 0) + 1
            if work.error is not None and not isinstance(work.error, asyncio.CancelledError):
                _failure(work.error)  # nobody waits for it any more: the log is the only reader
            return
        self.metrics.queue_seconds.observe(work.started - work.admitted)
        self.metrics.predict_seconds.observe(work.predicted - work.started)
        self.metrics.batch_size.observe(1)
        self.admission.observe(work.ended - work.started)

    async def _plain(self, work: Work, reply: bytes, send: Send, request_id: bytes, headers: Headers) -> int:
        body = self._result(work)
        admitted, started, predicted = work.admitted, work.started, work.predicted
        head = self._head % (
            reply,
            len(body),
            request_id,
            (started - admitted) * 1e3,
            (admitted - work.deadline + self.settings.timeout) * 1e3,
            (predicted - started) * 1e3,
            (work.ended - predicted) * 1e3,
        )
        plain = self.whole is not None and b"origin" not in headers and not self.spread and not self.closing
        if plain and self.whole is not None and self.whole(work.cycle, head, body):
            return 200
        pairs = [(name, value) for name, _, value in (line.partition(b": ") for line in head.splitlines())]
        await send({"type": "http.response.start", "status": 200, "headers": self._finish(pairs, headers)})
        await send({"type": "http.response.body", "body": body})
        return 200

    def _finish(
        self, head: list[tuple[bytes, bytes]], headers: Headers, *, unread: bool = False
    ) -> list[tuple[bytes, bytes]]:
        if b"origin" in headers:
            head += self.admission.cors(headers)
        if not unread and (self.closing or (self.spread and self.metrics.inflight > self._target)):
            head.append((b"connection", b"close"))
        return head

    def _result(self, work: Work) -> bytes:
        """Return the encoded answer, or raise what the caller shall see."""
        if work.abandoned == "queued":
            raise RequestError(499, "The caller left.")
        if work.abandoned in {"expired", "timeout"}:
            raise self._timeout()
        if work.error is not None:
            raise _failure(work.error)
        result: bytes = work.result
        return result

    def _timeout(self) -> RequestError:
        return RequestError(504, f"predict took longer than {self.settings.timeout:g} s (--timeout).")

    async def _stream(self, work: Work, reply: bytes, send: Send, request_id: bytes, headers: Headers) -> int:
        """Send items as they come. Nothing is sent before the first, so that an early error has its own status."""
        events, wake, room = work.events, work.wake, work.room
        if events is None or wake is None or room is None:
            raise RuntimeError("not a stream")
        while not events and not work.finished and not work.abandoned:
            await wake.wait()
            wake.clear()
        if work.error is not None and not events:
            raise _failure(work.error)
        if work.abandoned and not events:
            self._result(work)
        head = [(b"content-type", reply), (b"cache-control", b"no-store"), (b"x-request-id", request_id)]
        head += [(b"x-accel-buffering", b"no"), (b"x-nbdeploy-revision", self._revision)]
        waited = (work.started or time.perf_counter()) - work.admitted
        decoded = work.admitted - work.deadline + self.settings.timeout
        timing = b"queue;dur=%.3f, decode;dur=%.3f, batch;desc=1" % (waited * 1e3, decoded * 1e3)
        head.append((b"server-timing", timing))  # predict and encode go on while this is sent
        await send({"type": "http.response.start", "status": 200, "headers": self._finish(head, headers)})
        while True:
            finished = work.finished or bool(work.abandoned)
            count = len(events)
            if count:
                body = b"".join([events.popleft() for _ in range(count)])
                room.release(count)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            elif finished:
                break
            else:
                await wake.wait()
                wake.clear()
        error = self._timeout() if work.abandoned == "timeout" else None
        if work.error is not None:
            error = _failure(work.error)
        tail = _tail(reply, json.dumps(_problem(error)).encode() if error else None)
        await send({"type": "http.response.body", "body": tail})
        return 200 if error is None else error.status

    async def problem(self, error: RequestError, send: Send, request_id: bytes, headers: Headers, began: float) -> int:
        """Answer with application/problem+json (RFC 9457)."""
        body = json.dumps(_problem(error)).encode()
        head = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id),
            (b"server-timing", b"total;dur=%.3f" % ((time.perf_counter() - began) * 1e3)),
        ]
        if error.retry_after is not None:
            head.append((b"retry-after", b"%d" % error.retry_after))
        if error.status == HTTPStatus.UNAUTHORIZED:
            head.append((b"www-authenticate", b"Bearer"))
        # 499 is no status of HTTP: nobody is there to read it, the log and the metrics count it.
        status = 400 if error.status == 499 else error.status  # noqa: PLR2004 - nginx's number for a caller that left
        # Closing while a body is on its way would reset this answer away: such a connection is closed later.
        unread = getattr(getattr(send, "__self__", None), "more_body", False)
        head = self._finish(head, headers, unread=unread)
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})
        return error.status

    async def _sweep(self) -> None:
        """Enforce deadlines, notice callers that left, measure the loop's lag."""
        loop = asyncio.get_running_loop()
        ticks, worst = 0, 0.0
        while True:
            before = loop.time()
            await asyncio.sleep(SWEEP)
            worst = max(worst, loop.time() - before - SWEEP)
            ticks += 1
            if ticks % 4 == 0:
                self.metrics.mark()
                self.metrics.loop_lag, worst = worst, 0.0
            now = time.perf_counter()
            for work in list(self._open):
                if work.deadline < now and not work.abandoned:
                    self._expire(work)
                elif work.started and work.task is not None and work.gone() and not work.abandoned:
                    work.abandoned = "running"
                    self.lane.cancel(work)

    def _expire(self, work: Work) -> None:
        """Tell the caller; the slot stays taken until the work is really done."""
        work.abandoned = "timeout"
        self.lane.cancel(work)
        if work.wake is not None:
            work.wake.set()
        if not work.future.done():
            work.future.set_result(None)


def _failure(error: BaseException) -> RequestError:
    """Turn what predict raised into the caller's error: type, message and the notebook's lines, no values."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, wire.WireError):
        return RequestError(500, f"predict's answer cannot be sent: {error}", kind="WireError")
    if isinstance(error, asyncio.CancelledError):
        return RequestError(504, "The call was cancelled.")
    kind = type(error).__name__
    lines = notebook_lines(error)
    print(f"nbdeploy: predict raised {kind}: {error}", *lines, sep="\n  ", file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
    return RequestError(500, f"predict raised {kind}: {error}", kind=kind, traceback=lines)


def _problem(error: RequestError) -> dict[str, Any]:
    try:
        title = HTTPStatus(error.status).phrase
    except ValueError:
        title = "Client Closed Request"
    data: dict[str, Any] = {"type": "about:blank", "title": title, "status": error.status, "detail": error.detail}
    if error.errors:
        data["errors"] = list(error.errors)
    if error.kind:
        data["exception"] = error.kind
    if error.traceback:
        data["traceback"] = list(error.traceback)
    return data


def _chosen(accept: bytes, *, streams: bool) -> tuple[bytes, str]:
    """Choose the type of the answer from the Accept header, b"" if none fits; the usual ones are found at once."""
    if accept in {b"*/*", JSON}:
        return JSON, ""
    if accept == PACKED:
        return PACKED, ""
    offered = [EVENTS, LINES, PACKED_STREAM] if streams else []
    offered += [JSON, PACKED]
    best, weight = b"", 0.0
    for part in accept.lower().split(b","):
        kind, *parameters = (piece.strip() for piece in part.split(b";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith(b"q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        match = kind if kind in offered else JSON if kind in {b"*/*", b"application/*"} else b""
        if kind in {b"application/msgpack", b"application/x-msgpack"}:
            match = PACKED
        if match and quality > weight:
            best, weight = match, quality
    return best, ", ".join(kind.decode() for kind in offered)


def _event(item: bytes) -> bytes:
    return b"data: " + item + b"\n\n"


def _line(item: bytes) -> bytes:
    return item + b"\n"


def _packed_item(item: bytes) -> bytes:
    return b"\x00" + len(item).to_bytes(4, "big") + item


_FRAMES: dict[bytes, Callable[[bytes], bytes]] = {EVENTS: _event, LINES: _line, PACKED_STREAM: _packed_item}


def _tail(reply: bytes, problem: bytes | None) -> bytes:
    """End a stream, so that a reader can tell a finished one from one that broke."""
    if reply == PACKED_STREAM:
        return b"\x02\x00\x00\x00\x00" if problem is None else b"\x01" + len(problem).to_bytes(4, "big") + problem
    if reply == EVENTS:
        return b"event: end\ndata: {}\n\n" if problem is None else b"event: error\ndata: " + problem + b"\n\n"
    return b"" if problem is None else b'{"error": ' + problem + b"}\n"
