"""What the settings say of one cluster."""

from __future__ import annotations

from dataclasses import dataclass

from nbdeploy.config import EngineSettings
from nbdeploy.errors import ConfigError

PLATFORMS = {"linux/amd64": "x86_64-manylinux_2_28", "linux/arm64": "aarch64-manylinux_2_28"}
"""Platforms of nodes and what uv calls them; Python base images since Debian 10 have the glibc 2.28 that it names."""


@dataclass(frozen=True)
class ClusterSettings(EngineSettings):
    """One engine of the settings, of kind "kubernetes": what EngineSettings holds, with its defaults and checks.

    Attributes:
        name: of the engine.
        platform: of the nodes.
    """

    kind: str = "kubernetes"
    platform: str = "linux/amd64"
    name: str = "kubernetes"

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            known = " and ".join(PLATFORMS)
            raise ConfigError(f"engines.{self.name}.platform is {self.platform!r}; there is {known}.")
        if (self.gateway or self.ingress_class) and not self.host:
            raise ConfigError(
                f"engines.{self.name}.host is missing: a Gateway or Ingress needs the host name under which Endpoints "
                'are reached, like host = "models.example.com".'
            )
