"""Names of images: where an image lies, in one spelling for every part of nbdeploy. Pure."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass

from nbdeploy.errors import UsageError

DOCKER_HUB = "docker.io"
_HUB_NAMES = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})
_HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:\d{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST = 255  # characters of host and repository together, as registries take them


@dataclass(frozen=True)
class Reference:
    """An image in a registry.

    Attributes:
        host: host of the registry, with its port if it has one; Docker Hub is always "docker.io".
        repository: path below it; official images of Docker Hub begin with "library/".
        tag: "" where none was given.
        digest: "sha256:<hex>", or "".
    """

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read "host/repository:tag@digest" as Docker does. Raises UsageError in words."""
        rest = text.strip()
        if "://" in rest:
            raise UsageError(
                f"an image is named without {rest.partition('://')[0]}://, like registry.example.com/team/x"
            )
        rest, _, digest = rest.partition("@")
        if digest and not _DIGEST.fullmatch(digest):
            raise UsageError(f'the digest in "{text}" is not sha256: and 64 hexadecimal digits')
        host, rest = _split_host(rest)
        repository, colon, tag = rest.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise UsageError(f'"{tag}" in "{text}" cannot be a tag: letters, digits, "_", "." and "-", 128 at most')
        if host == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        _check(text, host, repository)
        return cls(host, repository, tag, digest)

    @property
    def api_host(self) -> str:
        """The host that answers the registry's API: for Docker Hub not the one in the name."""
        return api_host(self.host)

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest, else the tag, else "latest"."""
        return self.digest or self.tag or "latest"

    def pinned(self, digest: str) -> Reference:
        """Return the same repository's image of this digest, without a tag."""
        return dataclasses.replace(self, tag="", digest=digest)

    def __str__(self) -> str:
        """Return the full name, as every tool takes it."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def normal_host(host: str) -> str:
    """Return a registry's host in the one spelling; all names of Docker Hub become "docker.io"."""
    lower = host.lower()
    return DOCKER_HUB if lower in _HUB_NAMES else lower


def api_host(host: str) -> str:
    """Return the host that answers the API of this registry."""
    return "registry-1.docker.io" if normal_host(host) == DOCKER_HUB else host


def bare_host(host: str) -> str:
    """Return a host without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Tell whether a host (with or without a port) is this machine by its name or address alone."""
    name = bare_host(host).lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def is_private(host: str) -> bool:
    """Tell whether a host is this machine or an address that the internet does not route; names are not looked up."""
    address = _address(bare_host(host).lower())
    return is_loopback(host) or (address is not None and not address.is_global)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _split_host(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if slash and (first == "localhost" or first != first.lower() or any(mark in first for mark in ".:[")):
        return normal_host(first), rest
    return DOCKER_HUB, text


def _check(text: str, host: str, repository: str) -> None:
    if not _HOST.fullmatch(host):
        raise UsageError(f'"{host}" in "{text}" cannot be the host of a registry')
    if repository.lower() != repository and _REPOSITORY.fullmatch(repository.lower()):
        raise UsageError(f'an image is named in small letters: "{repository.lower()}", not "{repository}"')
    if not _REPOSITORY.fullmatch(repository):
        words = 'small letters and digits, joined by ".", "_", "-" or "/", like registry.example.com/team/iris:1'
        raise UsageError(f'"{text}" does not name an image: {words}')
    if len(host) + len(repository) > _LONGEST:
        raise UsageError(f'"{text}" is too long for an image: {_LONGEST} characters at most')
