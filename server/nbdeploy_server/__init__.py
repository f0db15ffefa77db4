"""nbdeploy_server: the part of nbdeploy that runs in a Replica. It never imports nbdeploy."""

__version__ = "0.1.0"
