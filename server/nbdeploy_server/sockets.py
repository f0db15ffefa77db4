"""Listening sockets of a Replica in a container."""

from __future__ import annotations

import errno
import socket

from nbdeploy_server.errors import SettingsInvalid


def bind(host: str, port: int, variable: str) -> socket.socket:
    """Return a TCP socket bound to a port, not listening yet: until it does, connections to it are refused.

    Args:
        host: an address; "" means all of IPv4, and of IPv6 where this machine has it.
        port: 0 takes a free one.
        variable: the environment variable that chose the port, for the message.

    Raises:
        SettingsInvalid: where the port cannot be had.
    """
    both = not host and socket.has_dualstack_ipv6()
    try:
        try:
            return _bound("::" if both else host, port, both=both)
        except OSError as error:
            if not both or error.errno == errno.EADDRINUSE:
                raise
            return _bound("", port, both=False)  # IPv6 is compiled in and switched off
    except OSError as error:
        raise SettingsInvalid(
            f"port {port} cannot be listened on: {error.strerror}; choose another with {variable}"
        ) from error


def _bound(host: str, port: int, *, both: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if both or ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock
