"""Capture: the model and predict function taken from the live namespace, with all that travels with them.

`take` is the one entry; each other module answers one question about the live objects.
"""

from __future__ import annotations

from nbdeploy.capture.planning import Request
from nbdeploy.capture.taking import Capture, take

__all__ = ["Capture", "Request", "take"]
