"""Names of images."""

from __future__ import annotations

import pytest

from nbdeploy.errors import UsageError
from nbdeploy.oci.reference import Reference, is_loopback, is_private

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python", Reference("docker.io", "library/python")),
        ("python:3.11-slim", Reference("docker.io", "library/python", "3.11-slim")),
        ("ada/iris", Reference("docker.io", "ada/iris")),
        ("index.docker.io/ada/iris:1", Reference("docker.io", "ada/iris", "1")),
        ("127.0.0.1:5000/base:1", Reference("127.0.0.1:5000", "base", "1")),
        ("localhost/base", Reference("localhost", "base")),
        ("[::1]:5000/base:1", Reference("[::1]:5000", "base", "1")),
        (f"ghcr.io/a/b-c__d.e:v1@sha256:{HEX}", Reference("ghcr.io", "a/b-c__d.e", "v1", f"sha256:{HEX}")),
        (" Registry.Example.com/a ", Reference("registry.example.com", "a")),
    ],
)
def test_names_are_read_as_docker_reads_them(text: str, expected: Reference) -> None:
    """Hosts, Docker Hub's short names, tags and digests are understood; the full name reads back the same."""
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://ghcr.io/a/b", "without https://"),
        ("ghcr.io/a/B", 'small letters: "a/b"'),
        ("ghcr.io/a/b:bad tag", "cannot be a tag"),
        ("ghcr.io/a/b@sha256:12", "64 hexadecimal digits"),
        ("", "does not name an image"),
        ("ghcr.io/", "does not name an image"),
        ("-a.b/c", "cannot be the host"),
        ("ghcr.io/" + "a" * 300, "too long"),
    ],
)
def test_wrong_names_are_told_in_words(text: str, words: str) -> None:
    """What is no name is refused with what to write instead."""
    with pytest.raises(UsageError, match=words):
        Reference.parse(text)


def test_pinned_and_target() -> None:
    """A pinned name has no tag; asked for is the digest, else the tag, else latest; Docker Hub's API is elsewhere."""
    name = Reference.parse("python:3.11")
    assert str(name.pinned(f"sha256:{HEX}")) == f"docker.io/library/python@sha256:{HEX}"
    assert [name.target, name.pinned(f"sha256:{HEX}").target, Reference.parse("python").target] == [
        "3.11",
        f"sha256:{HEX}",
        "latest",
    ]
    assert name.api_host == "registry-1.docker.io"
    assert Reference.parse("ghcr.io/a/b").api_host == "ghcr.io"


def test_what_is_this_machine_and_what_is_private() -> None:
    """Only names and addresses of this machine are loopback; private addresses are known without a look-up."""
    assert all(is_loopback(host) for host in ("localhost:5000", "127.0.0.1", "[::1]:5000", "x.localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0:1", "10.0.0.1", "ghcr.io", "localhost.example.com"))
    assert all(is_private(host) for host in ("10.0.0.1:80", "169.254.169.254", "192.168.1.1", "[fe80::1]", "localhost"))
    assert not any(is_private(host) for host in ("ghcr.io", "8.8.8.8:443"))
