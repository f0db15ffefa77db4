"""The registry's client against real registries, and against one that misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdeploy.errors import RegistryError
from nbdeploy.oci.registry import Registry
from nbdeploy.oci.upload import CHUNK
from tests.oci.servers import Certificate, ConnectProxy, DockerRegistry, Front, FrontHandler, TokenServer

Connect = Callable[..., Registry]
REPOSITORY = "team/iris"
OCI = "application/vnd.oci.image.manifest.v1+json"


def digest(data: bytes) -> str:
    """Return the digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def upload(registry: Registry, data: bytes, repository: str = REPOSITORY, **more: Any) -> int:
    """Upload some bytes, in pieces."""
    step = 1_000_003
    return registry.upload(
        repository,
        digest(data),
        len(data),
        lambda: (memoryview(data)[start : start + step] for start in range(0, len(data), step)),
        **more,
    )


def manifest_of(data: bytes) -> bytes:
    """Return a manifest with these bytes as its configuration and only layer."""
    one = {"digest": digest(data), "size": len(data)}
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **one},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **one}],
        }
    ).encode()


def test_blobs_and_manifests_go_there_and_back(registry: DockerRegistry, connect: Connect) -> None:
    """What is uploaded is there, reads back the same, can be mounted elsewhere, and tagged."""
    client, data, told = connect(registry.host), os.urandom(3 << 20), []
    assert not client.has_blob(REPOSITORY, digest(data))
    assert upload(client, data, on_bytes=told.append) == len(data) == sum(told)
    assert client.has_blob(REPOSITORY, digest(data))
    assert client.blob(REPOSITORY, digest(data)) == data
    assert upload(client, data, "third", source=REPOSITORY) == 0
    content = manifest_of(data)
    assert client.manifest(REPOSITORY, "1") is None
    client.put_manifest(REPOSITORY, "1", content, OCI)
    found = client.manifest(REPOSITORY, "1")
    assert found is not None
    assert (found.data, found.media_type, found.digest) == (content, OCI, digest(content))
    assert client.digest_of(REPOSITORY, "1") == found.digest
    assert client.has_manifest(REPOSITORY, found.digest)
    assert client.requests == 11


def test_an_upload_takes_two_requests(front: Front, connect: Connect) -> None:
    """POST, then one PUT with all bytes and a Content-Length; empty blobs go too."""
    client, data = connect(front.host), os.urandom(5 << 20)
    upload(client, data)
    upload(client, b"")
    assert [one.method for one in front.seen] == ["POST", "PUT", "POST", "PUT"]
    assert front.seen[1].headers["Content-Length"] == str(len(data))
    assert front.seen[1].body == len(data)


def test_changed_content_is_refused(registry: DockerRegistry, connect: Connect, tmp_path: Path) -> None:
    """A file that changed, shrank or cannot be read is told as that, and leaves no blob."""
    client, data = connect(registry.host), os.urandom(1 << 20)
    with pytest.raises(RegistryError, match="the file changed on disk"):
        client.upload(REPOSITORY, digest(b"other"), len(data), lambda: [data])
    with pytest.raises(RegistryError, match="shorter than it was"):
        client.upload(REPOSITORY, digest(data), len(data), lambda: [data[:-1]])
    with pytest.raises(RegistryError, match="cannot be read from this disk: No such file"):
        client.upload(REPOSITORY, digest(data), len(data), lambda: (tmp_path / "gone").open("rb"))
    assert not registry.has(digest(b"other"))
    assert not registry.has(digest(data))


def test_wrong_bytes_from_a_registry_are_refused(front: Front, connect: Connect) -> None:
    """Blobs and manifests are checked against their digest; of a wrong blob the last piece never comes."""
    client, data = connect(front.host), os.urandom(5 << 20)
    wrong = data[:-1] + bytes([data[-1] ^ 1])
    front.fail("GET", "/blobs/", lambda handler: handler.answer(200, wrong), times=9)
    front.fail("GET", "/manifests/", lambda handler: handler.answer(200, b"{}"), times=9)
    with pytest.raises(RegistryError, match="gave other bytes than"):
        client.blob(REPOSITORY, digest(data))
    with pytest.raises(RegistryError, match="gave other bytes than"):
        client.manifest(REPOSITORY, digest(data))
    taken = bytearray()
    with pytest.raises(RegistryError, match="gave other bytes than"):  # noqa: PT012 - how far it came is the point
        for piece in client.stream(REPOSITORY, digest(data)):
            taken += piece
    assert len(taken) < len(data)


def test_a_lost_connection_starts_the_blob_again(front: Front, connect: Connect) -> None:
    """Cut in mid-blob twice, the upload arrives; progress takes back what was lost."""
    client, data, told = connect(front.host), os.urandom(8 << 20), []
    front.fail("PUT", "/uploads/", lambda handler: handler.cut(3 << 20), times=2)
    upload(client, data, on_bytes=told.append)
    assert client.blob(REPOSITORY, digest(data)) == data
    assert sum(told) == len(data)
    assert min(told) < 0
    assert len(front.asked("POST")) == 3


def test_a_connection_that_is_always_lost_is_told(front: Front, connect: Connect) -> None:
    """Patience ends, in words."""
    front.fail("PUT", "/uploads/", lambda handler: handler.cut(1000), times=99)
    with pytest.raises(RegistryError, match=r"the connection to .* was lost again and again"):
        upload(connect(front.host), os.urandom(1 << 20))
    assert len(front.asked("PUT")) == 6


def test_reads_are_tried_again_too(front: Front, connect: Connect) -> None:
    """A blob that was cut while it was read, and a 503, are asked for again."""
    client, data = connect(front.host), os.urandom(2 << 20)
    upload(client, data)

    def half(handler: FrontHandler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        return handler.cut(0)

    front.fail("GET", "/blobs/", half)
    front.fail("GET", "/blobs/", lambda handler: handler.answer(503))
    assert client.blob(REPOSITORY, digest(data)) == data
    assert len(front.asked("GET")) == 3


def test_too_many_requests_wait_as_long_as_asked(front: Front, connect: Connect) -> None:
    """429 with Retry-After is waited for; without end it is told."""
    client = connect(front.host)
    front.fail("PUT", "/uploads/", lambda handler: handler.answer(429, Retry_After="1"))
    began = time.monotonic()
    upload(client, b"some bytes")
    assert time.monotonic() - began >= 1.0
    front.fail("POST", "/uploads/", lambda handler: handler.answer(429, Retry_After="0"), times=99)
    with pytest.raises(RegistryError, match="too many requests"):
        upload(client, b"other bytes")


def test_chunks_after_a_413(front: Front, connect: Connect) -> None:
    """A proxy that takes no large request gets chunks of 64 MiB, or what the registry asks for; later blobs at once."""
    client, data = connect(front.host), bytes(CHUNK + 5_000_000)

    def limit(handler: FrontHandler) -> bool:
        return handler.left > CHUNK + (1 << 20) and handler.answer(413, Connection="close")

    front.fail("PUT", "/uploads/", limit, times=99)
    upload(client, data)
    assert client.has_blob(REPOSITORY, digest(data))
    sizes = [(one.body, one.headers["Content-Range"]) for one in front.asked("PATCH")]
    assert sizes == [(CHUNK, f"0-{CHUNK - 1}"), (5_000_000, f"{CHUNK}-{len(data) - 1}")]
    front.seen.clear()
    front.headers["OCI-Chunk-Min-Length"] = str(CHUNK + 1_000_000)
    upload(client, data, "other")
    assert [one.body for one in front.asked("PATCH")] == [CHUNK + 1_000_000, 4_000_000]
    assert not [one for one in front.asked("PUT") if one.body]


def test_a_limit_below_a_chunk_is_told(front: Front, connect: Connect) -> None:
    """Where not even a chunk is taken, the words name the setting of the proxy."""
    front.fail("PUT", "/uploads/", lambda handler: handler.answer(413, Connection="close"), times=99)
    with pytest.raises(RegistryError, match="client_max_body_size"):
        upload(connect(front.host), os.urandom(1 << 20))


FULL = b"""{"errors": [{"code": "UNKNOWN", "message": "unknown error",
    "detail": {"DriverName": "filesystem", "Enclosed": {"Op": "write", "Path": "/data", "Err": 28}}}]}"""


@pytest.mark.parametrize(
    ("status", "body", "words", "tries"),
    [
        (500, FULL, "the disk of the registry .* is full", 1),
        (
            403,
            b'{"errors":[{"code":"DENIED","message":"quota"}]}',
            r"does not allow you to push to team/iris.*quota",
            1,
        ),
        (404, b'{"errors":[{"code":"NAME_UNKNOWN"}]}', "want it made first.*NAME_UNKNOWN", 1),
        (405, b"", "is this a registry's address", 1),
        (500, b"oops", r"failed \(500\) when it was to push to team/iris", 6),
        (418, b"<html>", "answered 418", 1),
    ],
)
def test_refusals_in_words(front: Front, connect: Connect, status: int, body: bytes, words: str, tries: int) -> None:
    """Each refusal names the host, the repository and what to do; only what may pass is tried again."""
    front.fail("POST", "/uploads/", lambda handler: handler.answer(status, body), times=99)
    with pytest.raises(RegistryError, match=words) as caught:
        upload(connect(front.host), b"x")
    assert front.host in str(caught.value)
    assert len(front.asked("POST")) == tries


def test_a_password_is_asked_for(
    start: Callable[..., DockerRegistry], connect: Connect, log_in: Callable[..., None]
) -> None:
    """Without a login the words say how to log in; a wrong one is told as that; the right one works."""
    host = start(htpasswd=True).host
    with pytest.raises(RegistryError, match=f"run docker login {host}"):
        upload(connect(host), b"x")
    log_in(host, username="ada", password="wrong")
    with pytest.raises(RegistryError, match=r"does not let the user that this machine is logged in as push"):
        upload(connect(host), b"x")
    log_in("other.example.com")
    with pytest.raises(RegistryError, match=f"run docker login {host}"):
        upload(connect(host), b"x")
    log_in(host)
    client = connect(host)
    upload(client, b"x")
    assert client.has_blob(REPOSITORY, digest(b"x"))
    assert client.requests == 4  # the first was refused, the others came with the password


def test_tokens(
    start: Callable[..., DockerRegistry], token_server: TokenServer, connect: Connect, log_in: Callable[..., None]
) -> None:
    """Tokens are asked for per set of scopes, once each; a mount asks to pull from its source too."""
    host = start(tokens=token_server).host
    with pytest.raises(RegistryError, match=f"run docker login {host}"):
        upload(connect(host), b"x")
    log_in(host)
    token_server.asked.clear()
    client = connect(host)
    upload(client, b"x", "base")
    upload(client, b"y", "base")
    assert upload(client, b"x", "mine", source="base") == 0
    assert client.blob("mine", digest(b"x")) == b"x"
    assert token_server.asked == [
        ("GET", "ada", ("repository:base:pull,push",)),
        ("GET", "ada", ("repository:base:pull", "repository:mine:pull,push")),
        ("GET", "ada", ("repository:mine:pull",)),
    ]


def test_identity_tokens(
    start: Callable[..., DockerRegistry], token_server: TokenServer, connect: Connect, log_in: Callable[..., None]
) -> None:
    """An identity token is exchanged by POST; one that is no longer good is told as that."""
    host = start(tokens=token_server).host
    log_in(host, identitytoken=token_server.identity)
    upload(connect(host), b"x")
    assert token_server.asked == [("POST", "ada", ("repository:team/iris:pull,push",))]
    log_in(host, identitytoken="expired")
    with pytest.raises(RegistryError, match="does not accept the user name and password found on this machine"):
        upload(connect(host), b"y")


def test_tokens_are_renewed(
    start: Callable[..., DockerRegistry], token_server: TokenServer, connect: Connect, log_in: Callable[..., None]
) -> None:
    """A token refused in mid-push is replaced and the blob sent again; one about to end is replaced before its end."""
    front = Front(start(tokens=token_server))
    log_in(front.host)
    challenge = f'Bearer realm="{token_server.realm}",service="{token_server.service}",error="invalid_token"'
    front.fail("PUT", "/uploads/", lambda handler: handler.answer(401, WWW_Authenticate=challenge, Connection="close"))
    client, data = connect(front.host), os.urandom(3 << 20)
    upload(client, data)
    assert client.has_blob(REPOSITORY, digest(data))
    assert [one.headers.get("Authorization", "")[:6] for one in front.asked("PUT")] == ["Bearer", "Bearer"]
    tokens = {one.headers["Authorization"] for one in front.asked("PUT")}
    assert len(tokens) == 2
    token_server.seconds, count = 0.001, len(token_server.asked)  # type: ignore[assignment]
    client = connect(front.host)
    upload(client, b"x")
    assert len(token_server.asked) - count == 3  # after the 401, and before each request since
    assert len(front.asked()) < 12
    front.close()


def test_cookies_are_ignored(front: Front, connect: Connect) -> None:
    """A registry's session cookie is not sent back: Harbor takes such requests for a browser's."""
    front.headers["Set-Cookie"] = "sid=1; Path=/"
    client = connect(front.host)
    upload(client, b"x")
    upload(client, b"y")
    assert not [one for one in front.seen if "Cookie" in one.headers]


def test_authorization_stays_with_its_host(
    start: Callable[..., DockerRegistry], registry: DockerRegistry, connect: Connect, log_in: Callable[..., None]
) -> None:
    """Blobs redirected to a storage host, and uploads sent to another host, travel there without the password."""
    front, storage = Front(start(htpasswd=True)), Front(registry)
    log_in(front.host, storage.host)
    client, data = connect(front.host), os.urandom(1 << 20)
    upload(connect(registry.host), data)
    there = f"http://{storage.host}/v2/{REPOSITORY}/blobs/{digest(data)}"

    def to_storage(handler: FrontHandler) -> bool:
        return "Authorization" in handler.headers and handler.answer(307, Location=there)

    front.fail("GET", "/blobs/", to_storage, times=9)
    assert client.blob(REPOSITORY, digest(data)) == data
    begun = connect(registry.host)._uploader._start(REPOSITORY).address.replace(registry.host, storage.host)
    front.fail("POST", "/uploads/", lambda handler: handler.answer(202, Location=begun))
    upload(client, b"more")
    assert registry.has(digest(b"more"))
    assert [one.method for one in storage.seen] == ["GET", "PUT"]
    assert not [one for one in storage.seen if "Authorization" in one.headers]
    assert [one for one in front.seen if one.headers.get("Authorization", "").startswith("Basic ")]
    front.close()
    storage.close()


def test_tls(start: Callable[..., DockerRegistry], certificate: Certificate, connect: Connect) -> None:
    """A certificate that nobody vouches for is told with the remedy, which works; so is HTTP in place of HTTPS."""
    host = start(tls=certificate).host
    with pytest.raises(RegistryError, match=r"not trusted here \(self-signed certificate\): set SSL_CERT_FILE"):
        upload(connect(host), b"x")
    upload(connect(host, SSL_CERT_FILE=str(certificate.pem)), b"x")
    with pytest.raises(RegistryError, match=r"SSL_CERT_FILE names .* which cannot be read"):
        upload(connect(host, SSL_CERT_FILE="/nowhere"), b"x")
    plain = start().host.replace("127.0.0.1", "0.0.0.0")  # noqa: S104 - an address of this machine that is not loopback
    with pytest.raises(RegistryError, match=f"{plain} speaks plain HTTP where HTTPS is needed"):
        upload(connect(plain), b"x")


def test_a_proxy_is_told_without_its_password() -> None:
    """A proxy that cannot be used is named, its user and password are not."""
    with pytest.raises(RegistryError, match=r"socks5://proxy\.test:1080") as caught:
        Registry("registry.test", environ={"HTTPS_PROXY": "socks5://ada:s3cret@proxy.test:1080"}).manifest("a/b", "1")
    assert "s3cret" not in str(caught.value)


@pytest.mark.usefixtures("unknown_names")
def test_a_proxy_is_used_for_other_hosts_only(
    start: Callable[..., DockerRegistry], certificate: Certificate, connect: Connect
) -> None:
    """HTTPS_PROXY is used with its password, but not for this machine, nor for what NO_PROXY names."""
    there = start(tls=certificate)
    proxy = ConnectProxy(there.port)
    more = {"HTTPS_PROXY": proxy.url.replace("//", "//me:pw@"), "SSL_CERT_FILE": str(certificate.pem)}
    client = connect("registry.test", **more)
    upload(client, b"x")
    assert there.has(digest(b"x"))
    assert {host for host, _ in proxy.asked} == {"registry.test:443"}
    assert all(secret.startswith("Basic ") for _, secret in proxy.asked)
    count = len(proxy.asked)
    upload(connect(there.host, **more), b"y")
    with pytest.raises(RegistryError, match=r"no machine is called registry\.test"):
        upload(connect("registry.test", NO_PROXY=".test", **more), b"z")
    assert len(proxy.asked) == count
    proxy.close()


@pytest.mark.parametrize("location", ["http://169.254.169.254/latest", "https://10.1.2.3/x", "http://localhost:1/x"])
def test_no_way_into_the_users_network(connect: Connect, location: str) -> None:
    """A registry outside may not send us to an address inside; a downgrade to plain HTTP is not followed."""
    transport = connect("registry.example.com")._session.transport
    asked = "https://registry.example.com/v2/a/blobs/uploads/"
    with pytest.raises(RegistryError, match="an address inside this network: refused"):
        transport.locate(asked, location, upload=False)
    with pytest.raises(RegistryError, match="unencrypted"):
        transport.locate(asked, "http://storage.example.com/x", upload=True)
    assert transport.locate(asked, "http://registry.example.com/y", upload=True) == "https://registry.example.com/y"
    assert transport.locate(asked, "/y?z=1", upload=True) == "https://registry.example.com/y?z=1"


@pytest.mark.usefixtures("unknown_names")
def test_unreachable_hosts(connect: Connect, registry: DockerRegistry) -> None:
    """A port where nobody listens and a name that nobody has are told as that."""
    registry_host = registry.host
    registry.stop()
    with pytest.raises(RegistryError, match=f"{registry_host} refuses connections"):
        connect(registry_host).has_blob(REPOSITORY, digest(b""))
    with pytest.raises(RegistryError, match=r"no machine is called nobody\.invalid"):
        connect("nobody.invalid").has_blob(REPOSITORY, digest(b""))
