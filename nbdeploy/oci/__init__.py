"""OCI images without Docker: layers from the Store and the lock, pushed to a registry in pure Python."""
