"""What the settings say of one cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbdeploy.errors import ConfigError

PLATFORMS = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
"""Platforms of nodes and what uv calls them; Python base images since Debian 10 have the glibc 2.28 that it names."""


@dataclass(frozen=True)
class ClusterSettings:
    """One engine of the settings, of kind "kubernetes".

    Attributes:
        name: of the engine.
        context: of the kubeconfig; None means in-cluster, else the current one.
        namespace: of the Endpoints; None means the context's own.
        registry: where Images go, "registry.example.com/team"; None is told when an Image is to be made.
        base_image: None means the official Python image of the kernel's Python.
        platform: of the nodes.
        gateway: "NAME" or "NAMESPACE/NAME" of a Gateway that routes to Endpoints.
        ingress_class: class of Ingresses, where there is no Gateway.
        host: under which Endpoints are reached from outside; "{name}" in it stands for the Endpoint's name.
        tls_secret: of the Ingress.
        image_pull_secret: with which nodes pull.
        node_selector, tolerations: added to each pod.
        torch_index: package index asked first, for CPU or CUDA builds of torch.
    """

    name: str = "kubernetes"
    context: str | None = None
    namespace: str | None = None
    registry: str | None = None
    base_image: str | None = None
    platform: str = "linux/amd64"
    gateway: str | None = None
    ingress_class: str | None = None
    host: str | None = None
    tls_secret: str | None = None
    image_pull_secret: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    torch_index: str | None = None

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            known = " and ".join(PLATFORMS)
            raise ConfigError(f"engines.{self.name}.platform is {self.platform!r}; there is {known}.")
        if (self.gateway or self.ingress_class) and not self.host:
            raise ConfigError(
                f"engines.{self.name}.host is missing: a Gateway or Ingress needs the host name under which Endpoints "
                'are reached, like host = "models.example.com".'
            )
