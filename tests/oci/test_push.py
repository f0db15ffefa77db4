"""Whole images pushed to real registries; skopeo reads them back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdeploy.errors import RegistryError
from nbdeploy.oci.layers import Layer
from nbdeploy.oci.push import MANIFEST, push
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.registry import Registry
from tests.conftest import wait_until
from tests.oci.servers import DockerRegistry, Front, FrontHandler, TokenServer

Open = Callable[[str], Registry]
TAR = "application/vnd.oci.image.layer.v1.tar"
MIB = 1 << 20


@dataclass(frozen=True)
class Image:
    """What push needs of an image."""

    layers: Sequence[Layer]
    config: bytes
    manifest: bytes
    digest: str


def digest(data: bytes) -> str:
    """Return the digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer(data: bytes, *, open: Callable[[], Iterable[bytes | memoryview]] | None = None) -> Layer:  # noqa: A002
    """Return a layer of our own."""
    return Layer(TAR, digest(data), digest(data), len(data), "test", open=open or (lambda: [data]))


def borrowed(one: Layer, origin: Reference) -> Layer:
    """Return the same layer as one that lies elsewhere."""
    return Layer(one.media_type, one.digest, one.diff_id, one.size, one.title, origin=origin)


def image(*layers: Layer) -> Image:
    """Return an image of these layers."""
    history = [{"created_by": one.title} for one in layers]
    rootfs = {"type": "layers", "diff_ids": [one.diff_id for one in layers]}
    content = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs, "history": history}
    config = json.dumps(content).encode()
    described = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(config), "size": len(config)}
    rows = [{"mediaType": one.media_type, "digest": one.digest, "size": one.size} for one in layers]
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": rows}
    data = json.dumps(manifest).encode()
    return Image(layers, config, data, digest(data))


@pytest.fixture
def opened(connect: Callable[..., Registry]) -> Open:
    """The same client for a host each time."""
    made: dict[str, Registry] = {}

    def of(host: str) -> Registry:
        if host not in made:
            made[host] = connect(host)
        return made[host]

    return of


def skopeo(*arguments: str) -> str:
    """Run skopeo without TLS."""
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, check=False)  # noqa: S607
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_skopeo_reads_what_was_pushed(registry: DockerRegistry, opened: Open, tmp_path: Path) -> None:
    """Every blob, the manifest and the tag are there as they were built."""
    mine = image(layer(os.urandom(3 * MIB)), layer(os.urandom(100)), layer(b""), layer(b""))
    to = Reference.parse(f"{registry.host}/team/iris:1")
    pushed = push(mine, to, opened)
    assert pushed.digest == mine.digest
    assert pushed.bytes_sent == 3 * MIB + 100 + len(mine.config)
    found = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{to}"))
    assert found["Digest"] == mine.digest
    assert found["Layers"] == [one.digest for one in mine.layers]
    source, target = f"docker://{to.pinned(mine.digest)}", f"dir:{tmp_path / 'copy'}"
    skopeo("copy", "--insecure-policy", "--src-tls-verify=false", "--preserve-digests", source, target)
    for one in mine.layers:
        assert digest((tmp_path / "copy" / one.digest[7:]).read_bytes()) == one.digest


def test_nothing_is_sent_twice(front: Front, opened: Open) -> None:
    """The same image again costs one request, two with a tag, three where the tag lay elsewhere."""
    mine, other = image(layer(os.urandom(2 * MIB))), image(layer(b"other"))
    to = Reference.parse(f"{front.host}/team/iris:1")
    push(mine, to, opened)
    assert push(mine, Reference(to.host, to.repository), opened).requests == 1
    assert push(mine, to, opened).requests == 2
    push(other, to, opened)
    front.seen.clear()
    again = push(mine, to, opened)
    assert (again.requests, again.bytes_sent) == (3, 0)
    assert [one.method for one in front.seen] == ["HEAD", "HEAD", "PUT"]
    assert opened(to.host).digest_of(to.repository, "1") == mine.digest


def test_a_redeploy_asks_and_sends_little(front: Front, opened: Open, connect: Callable[..., Registry]) -> None:
    """Where only the code changed, kilobytes go in at most 12 requests, those about the base included."""
    base = image(layer(os.urandom(2 * MIB)), layer(os.urandom(MIB)))
    to, at = Reference.parse(f"{front.host}/team/iris:1"), Reference.parse(f"{front.host}/base:1")
    push(base, at, opened)
    under = [borrowed(one, at) for one in base.layers]
    weights = [layer(os.urandom(2 * MIB)) for _ in range(6)]
    first = image(*under, *weights, layer(b"code 1"))
    push(first, to, opened)
    client = connect(front.host)  # another kernel: nothing is remembered
    front.seen.clear()
    found = client.manifest(at.repository, at.tag)
    assert found is not None
    client.blob(at.repository, found.json["config"]["digest"])
    second = image(*under, *weights, layer(b"code 2"))
    pushed = push(second, to, lambda _: client, previous=first.digest)
    assert pushed.bytes_sent == len(b"code 2") + len(second.config)
    assert len(front.seen) == client.requests == 10
    assert skopeo("inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{to}").strip() == second.digest


def test_a_redeploy_with_tokens(
    start: Callable[..., DockerRegistry],
    token_server: TokenServer,
    connect: Callable[..., Registry],
    log_in: Callable[..., None],
) -> None:
    """Where the registry wants tokens it is still at most 12 requests, and two tokens: the base's and the image's."""
    host = start(tokens=token_server).host
    log_in(host)
    base, weights = image(layer(os.urandom(2 * MIB))), layer(os.urandom(2 * MIB))
    to, at = Reference.parse(f"{host}/team/iris:1"), Reference.parse(f"{host}/base:1")
    client = connect(host)
    push(base, at, lambda _: client)
    under = borrowed(base.layers[0], at)
    first, second = (image(under, weights, layer(code)) for code in (b"code 1", b"code 2"))
    push(first, to, lambda _: client)
    token_server.asked.clear()
    fresh = connect(host)
    found = fresh.manifest(at.repository, at.tag)
    assert found is not None
    fresh.blob(at.repository, found.json["config"]["digest"])
    push(second, to, lambda _: fresh, previous=first.digest)
    assert fresh.requests == 11
    assert [scopes for _, _, scopes in token_server.asked] == [
        ("repository:base:pull",),
        ("repository:team/iris:pull,push",),
    ]


def test_base_layers_are_mounted_in_one_registry(front: Front, opened: Open) -> None:
    """Within a registry base layers and hinted layers are taken over: not one of their bytes is read or sent."""
    base, hinted = image(layer(os.urandom(2 * MIB))), layer(os.urandom(2 * MIB))
    at = Reference.parse(f"{front.host}/base:1")
    push(base, at, opened)
    push(image(hinted), Reference.parse(f"{front.host}/earlier/model:1"), opened)
    front.seen.clear()
    mine = image(borrowed(base.layers[0], at), hinted)
    to = Reference.parse(f"{front.host}/team/iris:1")
    pushed = push(mine, to, opened, mounts={hinted.digest: "earlier/model"})
    assert pushed.bytes_sent == len(mine.config)
    assert not front.asked("GET", "/blobs/")
    assert sum("mount=" in one.path for one in front.seen) == 2


def test_a_mount_that_is_refused_becomes_a_copy(front: Front, opened: Open) -> None:
    """A registry that cannot mount, or forgot the blob, gets the bytes; a false hint does no harm."""
    base, mine = image(layer(os.urandom(2 * MIB))), layer(os.urandom(2 * MIB))
    at = Reference.parse(f"{front.host}/base:1")
    push(base, at, opened)
    front.fail("POST", "from=base", lambda handler: handler.answer(405))
    whole = image(borrowed(base.layers[0], at), mine)
    to = Reference.parse(f"{front.host}/team/iris:1")
    pushed = push(whole, to, opened, mounts={mine.digest: "nobody/knows"})
    assert pushed.bytes_sent == 4 * MIB + len(whole.config)
    assert skopeo("inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{to}").strip() == whole.digest


@pytest.mark.parametrize("status", [403, 404, 405, 500])
def test_one_refusal_is_enough(front: Front, opened: Open, status: int) -> None:
    """A repository that nothing may be taken from is not asked again for the next blob: the bytes go, all is well."""
    front.fail("POST", "from=earlier", lambda handler: handler.answer(status), times=99)
    layers = [layer(os.urandom(MIB + number)) for number in range(9)]
    mine, to = image(*layers), Reference.parse(f"{front.host}/team/iris")
    pushed = push(mine, to, opened, mounts=dict.fromkeys((one.digest for one in layers), "earlier/model"))
    assert pushed.bytes_sent == sum(one.size for one in layers) + len(mine.config)
    tries = 4 if status == 500 else 1  # a 500 may pass
    assert len(front.asked("POST", "from=")) <= 4 * tries  # by the four in flight at most


def test_a_hint_costs_nothing_where_the_blob_is_there(front: Front, opened: Open) -> None:
    """What the repository has is neither mounted nor sent, whatever the hint says."""
    data, to = os.urandom(2 * MIB), Reference.parse(f"{front.host}/team/iris")
    push(image(layer(data)), to, opened)
    second = image(layer(data), layer(b"code"))
    front.seen.clear()
    pushed = push(second, to, opened, mounts={digest(data): "nobody/knows"})
    assert pushed.bytes_sent == 4 + len(second.config)
    assert not front.asked("POST", "mount=")


def test_base_layers_are_copied_between_registries(
    start: Callable[..., DockerRegistry], front: Front, opened: Open
) -> None:
    """From another registry base layers are streamed, again where the stream broke."""
    elsewhere = start()
    base = image(layer(os.urandom(5 * MIB)), layer(os.urandom(MIB)))
    at = Reference.parse(f"{front.host}/base:1")
    push(base, at, opened)

    def half(handler: FrontHandler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(5 * MIB))
        handler.end_headers()
        handler.wfile.write(bytes(MIB))
        return handler.cut(0)

    front.fail("GET", base.layers[0].digest, half)
    mine = image(*(borrowed(one, at) for one in base.layers), layer(b"code"))
    to = Reference.parse(f"{elsewhere.host}/team/iris:1")
    pushed = push(mine, to, opened)
    assert pushed.bytes_sent == 6 * MIB + 4 + len(mine.config)
    assert all(elsewhere.has(one.digest) for one in mine.layers)


def test_a_base_with_wrong_bytes_is_refused(start: Callable[..., DockerRegistry], front: Front, opened: Open) -> None:
    """A base registry that gives other bytes than the digest says: nothing of them is kept, and no manifest is put."""
    elsewhere = start()
    base = image(layer(os.urandom(5 * MIB)))
    at = Reference.parse(f"{front.host}/base:1")
    push(base, at, opened)
    front.fail("GET", "/blobs/", lambda handler: handler.answer(200, bytes(5 * MIB)), times=9)
    mine = image(borrowed(base.layers[0], at))
    to = Reference.parse(f"{elsewhere.host}/team/iris:1")
    with pytest.raises(RegistryError, match=f"{front.host} gave other bytes than {base.layers[0].digest[:19]}"):
        push(mine, to, opened)
    assert not elsewhere.has(base.layers[0].digest)
    assert not elsewhere.has(digest(bytes(5 * MIB)))
    assert not opened(elsewhere.host).has_manifest(to.repository, "1")


def test_a_cleaned_registry_gets_everything_again(front: Front, opened: Open) -> None:
    """Blobs of the previous image that were removed meanwhile are found missing by the manifest, and sent."""
    data = os.urandom(2 * MIB)
    first = image(layer(data), layer(b"code 1"))
    to = Reference.parse(f"{front.host}/team/iris:1")
    push(first, to, opened)
    link = front.registry.root / f"docker/registry/v2/repositories/team/iris/_layers/sha256/{digest(data)[7:]}/link"
    link.unlink()
    second = image(layer(data), layer(b"code 2"))
    pushed = push(second, to, opened, previous=first.digest)
    assert pushed.bytes_sent > len(data)
    assert opened(to.host).has_blob(to.repository, digest(data))
    assert push(image(layer(b"3")), to, opened, previous=digest(b"gone")).bytes_sent > 0


def test_four_at_once_the_biggest_first(front: Front, opened: Open) -> None:
    """Four blobs are in flight, no more, and the biggest begin."""
    four = threading.Barrier(4)

    def together(handler: FrontHandler) -> bool:
        four.wait(30)
        return False

    front.fail("PUT", "/uploads/", together, times=4)
    layers = [layer(os.urandom(size * MIB)) for size in (1, 5, 2, 6, 4, 3)]
    push(image(*layers), Reference.parse(f"{front.host}/team/iris"), opened)
    assert front.most_active == 4
    began = [one.headers["Content-Length"] for one in front.asked("PUT", "/uploads/")]
    assert sorted(began[:4]) == [str(size * MIB) for size in (3, 4, 5, 6)]


def test_progress(front: Front, opened: Open) -> None:
    """Bytes, total and rate are told in words, not oftener than five times a second, and end at the total."""
    told: list[tuple[str, Any]] = []
    front.fail("PUT", "/uploads/", lambda handler: handler.cut(MIB))
    mine = image(layer(os.urandom(20 * MIB)), layer(os.urandom(3 * MIB)))
    to = Reference.parse(f"{front.host}/team/iris")
    pushed = push(mine, to, opened, on_progress=lambda words, numbers: told.append((words, dict(numbers))))
    total = 23 * MIB + len(mine.config)
    assert told[-1][1]["bytes"] == told[-1][1]["total"] == total == pushed.bytes_sent
    assert told[-1][0] == f"pushing to {front.host}"
    assert all(0 <= numbers["bytes"] <= total and numbers["rate"] >= 0 for _, numbers in told)
    assert len(told) <= 5 * pushed.seconds + 2


def test_two_pushes_of_the_same_image_at_once(registry: DockerRegistry, connect: Callable[..., Registry]) -> None:
    """Two that send the same blobs to the same repository at the same moment both end well."""
    for number in range(4):
        mine = image(*(layer(os.urandom(size)) for size in (100, 3000, 2 * MIB, 5 * MIB)))
        to = Reference.parse(f"{registry.host}/team/iris{number}")
        both = threading.Barrier(2)
        outcomes: list[object] = []

        def once(mine: Image = mine, to: Reference = to, both: threading.Barrier = both) -> None:
            client = connect(registry.host)
            both.wait(30)
            try:
                outcomes.append(push(mine, to, lambda _host: client).digest)  # noqa: B023 - joined below
            except RegistryError as error:
                outcomes.append(error)  # noqa: B023 - as above

        threads = [threading.Thread(target=once) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert outcomes == [mine.digest, mine.digest]


def test_one_failure_ends_the_push(front: Front, opened: Open) -> None:
    """When a blob is refused the others stop too, no manifest is put, and the reason is the refusal."""
    sent = [0]

    def slowly() -> Iterable[bytes]:
        for _ in range(200):
            sent[0] += 1
            refused.wait(0.05)
            yield bytes(MIB)

    refused = threading.Event()

    def refuse(handler: FrontHandler) -> bool:
        if int(handler.headers["Content-Length"]) != 2 * MIB:
            return False
        handler.answer(403, b'{"errors":[{"code":"DENIED","message":"no"}]}')
        return True

    front.fail("PUT", "/uploads/", refuse, times=9)
    mine = image(layer(bytes(200 * MIB), open=slowly), layer(os.urandom(2 * MIB)))
    with pytest.raises(RegistryError, match="does not allow you to push to team/iris"):
        push(mine, Reference.parse(f"{front.host}/team/iris:1"), opened)
    assert sent[0] < 200
    assert not front.asked("PUT", "/manifests/")


PUSHES = """
import sys
from tests.oci.test_push import Layer, Reference, Registry, digest, image, layer, push
layers = [layer(open(path, "rb").read()) for path in sys.argv[2:]]
clients = {}
push(image(*layers), Reference.parse(sys.argv[1]), lambda host: clients.setdefault(host, Registry(host)))
"""


def test_a_killed_push_goes_on_where_it_was(front: Front, opened: Open, tmp_path: Path) -> None:
    """Killed while its biggest layer was half sent: the next push finds what was finished, and sends that one alone."""
    paths = [tmp_path / str(size) for size in (20 * MIB, 3 * MIB, 2 * MIB)]
    for path in paths:
        path.write_bytes(os.urandom(int(path.name)))
    half, over = threading.Event(), threading.Event()

    def hold(handler: FrontHandler) -> bool:
        if int(handler.headers["Content-Length"]) < 20 * MIB:
            return False
        handler.take(10 * MIB)
        half.set()
        over.wait(60)
        return handler.cut(0)

    front.fail("PUT", "/uploads/", hold, times=4)
    to = Reference.parse(f"{front.host}/team/iris")
    killed = subprocess.Popen([sys.executable, "-c", PUSHES, str(to), *map(str, paths)])
    biggest, *others = (layer(path.read_bytes()) for path in paths)
    try:
        assert half.wait(60)
        client = opened(front.host)
        wait_until(lambda: all(client.has_blob(to.repository, one.digest) for one in others))
    finally:
        killed.kill()
        killed.wait(20)
        over.set()
    front.faults.clear()
    mine = image(biggest, *others)
    pushed = push(mine, to, opened)
    assert pushed.bytes_sent == biggest.size + len(mine.config)


MEMORY = """
import hashlib, pathlib, resource, sys
from nbdeploy.oci.registry import Registry
host, path = sys.argv[1:]
client = Registry(host)
client.has_blob("a/b", "sha256:" + "0" * 64)
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
before, size = peak(), pathlib.Path(path).stat().st_size
def pieces():
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]
with open(path, "rb") as file:
    digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
assert client.upload("a/b", digest, size, pieces) == size
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_small(registry: DockerRegistry, tmp_path: Path) -> None:
    """Half a gigabyte goes through a process that grows by less than 64 MB."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(512 * MIB)
    environ = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", MEMORY, registry.host, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * MIB


def test_urllib3_is_not_imported_before_it_is_used() -> None:
    """Naming the client's modules loads no HTTP package."""
    code = "import sys, nbdeploy.oci.push; assert not {'urllib3', 'kubernetes', 'httpx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
