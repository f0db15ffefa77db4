"""Engines: where Replicas run. `base` is the one plug-in point; each Engine knows nothing of the others."""
