"""Capture: the model and predict function taken from the live namespace, with all that travels with them.

`take` is the one entry; each other module answers one question about the live objects.
"""

from __future__ import annotations

from nbdeploy.capture.taking import Capture, Request, take

__all__ = ["Capture", "Request", "take"]
