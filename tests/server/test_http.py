"""The HTTP interface of a Replica, asked through real sockets: types, who may ask, bodies, pages, connections."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from nbdeploy_server import wire

from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.conftest import Served

from tests.server.asking import PACKED, PAGE, PROBLEM, answers, counters, raw, request

# -- types of body and answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/html, application/*;q=0.8"])
def test_json_in_json_out(square: Served, accept: str | None) -> None:
    """JSON is answered with JSON, and that is the default."""
    with square.client() as client:
        headers = {"accept": accept} if accept else {}
        answer = client.post("/predict", json={"input": 4.0}, headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"output": 16.0})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-nbdeploy-revision"] == "1"


@pytest.mark.parametrize("body", ["json", "packed"])
@pytest.mark.parametrize("accept", ["json", "packed"])
def test_types_mix_by_accept(work: Served, body: str, accept: str) -> None:
    """The type of the body and that of the answer are chosen apart from each other."""
    call = {"action": "echo", "value": {"a": [1, 2.5, None, "ä"]}}
    kinds = {"json": "application/json", "packed": PACKED}
    with work.client() as client:
        answer = client.post(
            "/predict",
            content=json.dumps(call).encode() if body == "json" else wire.pack(call),
            headers={"content-type": kinds[body] + "; charset=utf-8", "accept": kinds[accept]},
        )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == kinds[accept]
    read = json.loads if accept == "json" else wire.unpack
    assert read(answer.content) == call["value"]


def test_arrays_come_back_as_themselves(work: Served) -> None:
    """What is packed keeps dtype and shape, below and above the size that is decoded in the lane."""
    for shape in ((3, 2), (1000, 100)):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        with work.client(headers={"content-type": PACKED, "accept": PACKED}) as client:
            answer = client.post("/predict", content=wire.pack({"action": "echo", "value": array}))
        back = wire.unpack(answer.content)
        assert back.dtype == np.float32
        assert np.array_equal(back, array)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/x-pickle"}, 415),
        ({"content-type": "application/json", "accept": "image/png"}, 406),
        ({"content-type": "application/json", "accept": "text/event-stream"}, 406),
    ],
)
def test_wrong_types_are_answered_with_a_curl_line_that_works(
    square: Served, headers: dict[str, str], status: int
) -> None:
    """415 and 406 carry a command that, pasted into a shell of this machine, answers."""
    with square.client(headers=headers) as client:
        answer = client.post("/predict", content=b"{}")
    assert answer.status_code == status
    line = answer.json()["detail"].partition("Try: ")[2]
    assert line.startswith("curl ")
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    scripts = Path(sys.executable).parent
    environment = {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "NBDEPLOY_HOME": str(square.home),
        "HOME": str(square.home),
    }
    done = subprocess.run(["/bin/sh", "-c", line], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"output": 16.0}


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer {}", "X-API-Key"])
def test_key_in_either_header(square: Served, scheme: str) -> None:
    """`Authorization: Bearer` and `X-API-Key` both open."""
    headers = {"x-api-key": square.key} if scheme == "X-API-Key" else {"authorization": scheme.format(square.key)}
    answer = httpx.post(f"{square.url}/predict", json={"input": 2}, headers=headers, trust_env=False)
    assert answer.json() == {"output": 4.0}


def test_no_key_and_wrong_keys_look_alike(square: Served) -> None:
    """401 with a constant body for every wrong key, however near; nothing of what was sent is repeated."""
    wrong = ["x", square.key[:-1], square.key + "x", square.key.swapcase(), "ключ".encode().decode("latin-1")]
    bodies = set()
    for key in wrong:
        with raw(square, request(square, b"{}").replace(square.key.encode(), key.encode("latin-1"))) as sock:
            ((status, headers, body),) = answers(sock)
        assert (status, headers["www-authenticate"], headers["content-type"]) == (401, "Bearer", PROBLEM)
        bodies.add(body)
    assert len(bodies) == 1
    answer = httpx.post(f"{square.url}/predict", json={"input": 2}, trust_env=False)
    assert answer.status_code == 401
    assert "wants a key" in answer.json()["detail"]


def test_public_endpoint_answers_local_names_only(public: Served) -> None:
    """Without a key, a page that made its own name point here reads nothing, the sample included."""
    with public.client() as client:
        assert client.post("/predict", json={"input": 3}).json() == {"output": 9.0}
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]"):
            for method, path in (("POST", "/predict"), ("GET", "/openapi.json"), ("GET", "/docs")):
                answer = client.request(method, path, content=b'{"input": 3}', headers={"host": host})
                assert answer.status_code == 403, (host, path)
                assert "7.25" not in answer.text
        for host in ("localhost:8888", "127.0.0.1", "[::1]:80"):
            assert client.post("/predict", json={"input": 3}, headers={"host": host}).status_code == 200


def test_public_endpoint_refuses_other_pages(public: Served) -> None:
    """Without a key, a page of another origin cannot call; the Endpoint's own /docs can."""
    with public.client() as client:
        for origin in ("http://evil.example", "http://localhost:8888", "null"):
            assert client.post("/predict", json={"input": 3}, headers={"origin": origin}).status_code == 403
        assert client.post("/predict", json={"input": 3}, headers={"origin": public.url}).status_code == 200


def test_cors(square: Served) -> None:
    """An allowed page gets its preflight and its header, on errors too; another page gets neither."""
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    with httpx.Client(base_url=square.url, trust_env=False) as client:
        allowed = client.options("/predict", headers={"origin": PAGE, **asks})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = client.options("/predict", headers={"origin": "http://evil.example", **asks})
        assert "access-control-allow-origin" not in other.headers
        for key in (square.key, "wrong"):
            headers = {"authorization": f"Bearer {key}", "origin": PAGE}
            answer = client.post("/predict", json={"input": 2}, headers=headers)
            assert answer.headers.get_list("access-control-allow-origin") == [PAGE]
            assert answer.headers["vary"] == "origin"
        headers = {"authorization": f"Bearer {square.key}", "origin": "http://evil.example"}
        assert "access-control-allow-origin" not in client.post("/predict", json={"input": 2}, headers=headers).headers


def test_key_is_nowhere(square: Served) -> None:
    """The key is in no log, command line, environment or file that others can read."""
    key = square.key.encode()
    square.post({"input": 1})
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for part in ("cmdline", "environ"):
                try:
                    text = (entry / part).read_bytes()
                except OSError:
                    continue
                assert key not in text, f"{part} of {entry.name}"
    for path in square.home.rglob("*"):
        if path.is_file() and key in path.read_bytes():
            assert path.name == "key"
            assert path.stat().st_mode & 0o077 == 0


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b'{"input": NaN}', 400, "not valid JSON"),
        (b'{"input": 1} x', 400, "not valid JSON"),
        (b'{"input": "\xff"}', 400, "not valid JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[1]", 422, "must be an object with input"),
        (b"{}", 422, "input is missing"),
        (b'{"input": "4711"}', 422, "input must be"),
        (b'{"input": 4, "inptu": 4711}', 422, "inptu is not known; there is input"),
    ],
)
def test_bodies_that_do_not_fit(square: Served, body: bytes, status: int, words: str) -> None:
    """A broken body is 400, one that does not fit the Signature 422, in words and without its values."""
    with square.client(headers={"content-type": "application/json"}) as client:
        answer = client.post("/predict", content=body)
    problem = answer.json()
    assert answer.headers["content-type"] == PROBLEM
    assert (answer.status_code, problem["status"]) == (status, status)
    assert words in problem["detail"]
    assert {"type", "title", "status", "detail"} <= problem.keys()
    assert "4711" not in answer.text


def test_every_parameter_at_fault_is_named(work: Served) -> None:
    """422 names all parameters that are missing, mistyped or unknown."""
    answer = work.post({"path": 1, "other": 2})
    assert answer.status_code == 422
    assert [row["parameter"] for row in answer.json()["errors"]] == ["action", "path", "other"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("HEAD", "/predict", 405),
        ("PUT", "/predict", 405),
        ("GET", "/nothing", 404),
        ("POST", "/predict/", 404),
        ("GET", "/docs/assets/../../../etc/passwd", 404),
        ("GET", "/docs/assets/%2e%2e/%2e%2e/__init__.py", 404),
        ("GET", "/metrics", 404),
    ],
)
def test_other_routes(square: Served, method: str, path: str, status: int) -> None:
    """Unknown paths and methods get a problem that says what there is."""
    with raw(square, request(square, b"", "Connection: close", method=method, path=path)) as sock:
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert PROBLEM.encode() in head
    assert b"x-request-id: " in head
    if method != "HEAD":
        assert b"/predict" in body


def test_large_body_is_refused_by_its_length(square: Served) -> None:
    """100 MB get their 413 and no reset, the Replica's memory does not grow, and the next request is answered."""
    square.post({"input": 1})
    before = square.engine.status("square").memory_bytes
    with raw(square, request(square, b"", f"Content-Length: {100 << 20}", "Content-Type: application/json")) as sock:
        ((status, _headers, body),) = answers(sock)
        assert (status, b"larger than 64 MiB" in body) == (413, True)
    with square.client() as client:
        chunk = bytes(1 << 20)
        answer = client.post("/predict", content=b"".join([chunk] * 100), headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert client.post("/predict", json={"input": 2}).json() == {"output": 4.0}
    assert square.engine.status("square").memory_bytes - before < 16 << 20


def test_large_chunked_body_is_refused_as_it_comes(square: Served) -> None:
    """Without a length the body is read up to the limit, then refused."""

    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield bytes(1 << 20)

    with square.client() as client:
        answer = client.post("/predict", content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert client.post("/predict", json={"input": 2}).json() == {"output": 4.0}


# -- pages, headers, connections ---------------------------------------------------------------------------------------


def test_probes(square: Served) -> None:
    """Open, and /readyz tells phase and for how long."""
    with httpx.Client(base_url=square.url, trust_env=False) as client:
        assert client.get("/livez").json() == {"status": "live"}
        ready = client.get("/readyz").json()
    assert ready["phase"] == "ready"
    assert ready["seconds"] >= 0


def test_openapi_document(square: Served) -> None:
    """Valid in structure, declares the key, and shows the sample only to whoever has the key."""
    with httpx.Client(base_url=square.url, trust_env=False) as client:
        open_text = client.get("/openapi.json").text
        keyed = client.get("/openapi.json", headers={"x-api-key": square.key}).json()
        wrong = client.get("/openapi.json", headers={"x-api-key": "wrong"}).text
    document = json.loads(open_text)
    assert wrong == open_text
    assert document["openapi"].startswith("3.")
    assert document["info"]["title"] == "square"
    operation = document["paths"]["/predict"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["input"]["type"] == "number"
    assert schema["required"] == ["input"]
    schemes = document["components"]["securitySchemes"]
    assert {name for row in operation["security"] for name in row} == set(schemes)
    assert {"200", "401", "413", "422", "429", "500", "503", "504"} <= operation["responses"].keys()
    assert all("description" in response for response in operation["responses"].values())
    assert "4.0" not in open_text
    example = keyed["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert example == {"input": 4.0}
    for reference in re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(keyed)):
        node = keyed
        for part in reference.split("/"):
            node = node[part]


def test_docs_come_from_a_package(square: Served) -> None:
    """The documentation page loads nothing from elsewhere."""
    with httpx.Client(base_url=square.url, trust_env=False) as client:
        page = client.get("/docs").text
        links = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert links
        for link in links:
            assert not link.startswith(("http:", "https:", "//"))
            assert client.get("/" + link).status_code == 200
    assert not re.search(r"https?://", page)


def test_a_browser_at_the_bare_url_finds_the_docs(square: Served) -> None:
    """Clicking the Endpoint's URL leads to its documentation page, not to an error."""
    with httpx.Client(base_url=square.url, trust_env=False, follow_redirects=True) as client:
        page = client.get("/")
    assert (page.status_code, page.url.path) == (200, "/docs")


def test_request_id(square: Served) -> None:
    """A caller's id comes back, a missing one is made, a hostile one is not repeated; errors carry one as well."""
    with square.client() as client:
        given = client.post("/predict", json={"input": 1}, headers={"x-request-id": "my-id 1"})
        assert given.headers["x-request-id"] == "my-id 1"
        made = [client.post("/predict", json={"input": 1}).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        for hostile in (b"x" * 500, b"\xff\xfe", b"a\tb", b""):
            back = client.post("/predict", json={"input": 1}, headers=[(b"x-request-id", hostile)])
            assert back.headers["x-request-id"].encode("latin-1") not in {hostile, b""}
        assert client.get("/nothing", headers={"x-request-id": "n"}).headers["x-request-id"] == "n"
        assert client.post("/predict", json={}, headers={"x-request-id": "e"}).headers["x-request-id"] == "e"


def test_server_timing(work: Served) -> None:
    """Milliseconds of queue, decode, predict and encode, one after the other, and the size of the batch."""
    began = time.perf_counter()
    text = work.post({"action": "sleep", "value": 0.2}).headers["server-timing"]
    elapsed = 1e3 * (time.perf_counter() - began)
    found = dict(re.findall(r"(\w+);(?:dur|desc)=([\d.]+)", text))
    assert list(found) == ["queue", "decode", "predict", "encode", "batch"]
    times = [float(found[name]) for name in ("queue", "decode", "predict", "encode")]
    assert times[2] >= 200
    assert min(times) >= 0
    assert sum(times) < elapsed
    assert "dur=" in work.post({}).headers["server-timing"]


def test_connections_are_kept(square: Served) -> None:
    """Many requests on one connection, errors between them; HTTP/1.0 and `close` end it."""
    good, bad = request(square, b'{"input": 3}'), request(square, b"{")
    with raw(square, b"") as sock:
        for data, status in ((good, 200), (bad, 400), (good, 200)):
            sock.sendall(data)
            assert answers(sock)[0][0] == status
    for closing in (good.replace(b"HTTP/1.1", b"HTTP/1.0"), request(square, b'{"input": 3}', "Connection: close")):
        with raw(square, closing) as sock:
            data = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))
        assert data.endswith(b'{"output":9.0}')


def test_pipelined_requests(square: Served) -> None:
    """Requests sent without waiting are answered in their order."""
    with raw(square, b"".join(request(square, b'{"input": %d}' % number) for number in range(20))) as sock:
        found = answers(sock, 20)
    assert [json.loads(body)["output"] for _, _, body in found] == [float(n * n) for n in range(20)]


def test_body_in_pieces(square: Served) -> None:
    """A body that comes byte by byte, chunked, or after 100-continue is one body."""
    data = request(square, b'{"input": 3}')
    with raw(square, b"") as sock:
        for at in range(len(data)):
            sock.sendall(data[at : at + 1])
        assert answers(sock)[0][2] == b'{"output":9.0}'
    with square.client() as client:
        assert client.post("/predict", content=iter([b'{"inp', b'ut": 3}'])).json() == {"output": 9.0}
    with raw(square, request(square, b"", "Content-Length: 12", "Expect: 100-continue")) as sock:
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b'{"input": 3}')
        assert answers(sock)[0][2] == b'{"output":9.0}'


def test_half_a_request_is_forgotten(square: Served) -> None:
    """A caller that leaves in the middle of head or body leaves nothing behind."""
    for data in (b"POST /pre", request(square, b'{"in', "Content-Length: 100")):
        raw(square, data).close()
    assert square.post({"input": 2}).json() == {"output": 4.0}
    wait_until(lambda: square.inflight() == 0)


def test_metrics_count_what_happened(square: Served) -> None:
    """Statuses, refusals and durations are counted; probes and pages are not."""
    before = counters(square)
    with square.client() as client:
        for body in ({"input": 1}, {"input": 1}, {}):
            client.post("/predict", json=body)
        client.get("/livez")
        client.get("/docs")
        client.post("/predict", json={}, headers={"authorization": "Bearer no"})
    after = counters(square)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["nbdeploy_requests_total{200}"] == 2
    assert grown["nbdeploy_requests_total{422}"] == 1
    assert grown["nbdeploy_requests_total{401}"] == 1
    assert grown["nbdeploy_rejected_total{key}"] == 1
    assert grown["nbdeploy_request_seconds_count"] == 4
    assert grown["nbdeploy_predict_seconds_count"] == 2
    assert after["nbdeploy_inflight"] == 0


def test_front_and_fastapi_route_agree(tmp_path: Path) -> None:
    """FastAPI's own /predict gives the same status and body as the front, whatever is sent."""
    from nbdeploy_server.app import build
    from nbdeploy_server.decode import Decoder
    from nbdeploy_server.front import Front
    from nbdeploy_server.metrics import Metrics
    from nbdeploy_server.predictor import Predictor
    from nbdeploy_server.settings import ReplicaSettings
    from nbdeploy_server.signature import infer

    def predict(input: float) -> dict[str, float]:  # noqa: A002 - the name in the request
        if input < 0:
            raise ValueError("negative")
        return {"output": input * input}

    signature, types = infer(predict, sample={"input": 4.0})
    decoder = Decoder(signature, types)
    predictor = Predictor(
        predict, "function", signature, decoder, wire.pack({"arguments": {"input": 4.0}}), 16.0, 0, True
    )
    settings = ReplicaSettings("", "", "", "square", 1, hashlib.sha256(b"k").hexdigest(), cors=(PAGE,))
    asks: list[tuple[bytes, dict[str, str]]] = [
        (b'{"input": 4}', {}),
        (b'{"input": 4}', {"accept": PACKED}),
        (b'{"input": 4}', {"origin": PAGE}),
        (b'{"input": -4}', {}),
        (b'{"input": "a"}', {}),
        (b'{"input": ', {}),
        (b"", {}),
        (b"[]", {}),
        (b"[" * 5000, {}),
        (b'{"input": 4}' + b" " * (1 << 20), {}),
        (bytes(70 << 20), {}),
        (b'{"input": 4}', {"content-type": "text/csv"}),
        (b'{"input": 4}', {"accept": "image/png"}),
        (b'{"input": 4}', {"authorization": "Bearer wrong"}),
        (wire.pack({"input": 4}), {"content-type": PACKED, "accept": PACKED}),
    ]

    async def ask_both() -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        lane = predictor.lane(0)
        front = Front(predictor, lane, settings, Metrics(lane.concurrency))
        front.app = build(front)
        front.start()
        front.ready = True
        rows = []
        names = ("content-type", "www-authenticate", "access-control-allow-origin")
        for body, headers in asks:
            row = []
            for app in (front, front.app):
                transport = httpx.ASGITransport(app=app)
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                    sent = {"authorization": "Bearer k", "content-type": "application/json", **headers}
                    answer = await client.post("/predict", content=body, headers=sent)
                shown = {name: answer.headers.get_list(name) for name in names}
                row.append((answer.status_code, answer.content, shown))
            rows.append(tuple(row))
        return rows

    found = asyncio.run(ask_both())
    for (_, headers), (front, route) in zip(asks, found, strict=True):
        assert front == route, headers
    expected = [200, 200, 200, 500, 422, 400, 400, 422, 400, 200, 413, 415, 406, 401, 200]
    assert [front[0] for front, _ in found] == expected
