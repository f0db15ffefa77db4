"""The Kubernetes engine: an Image pushed to a registry, plain objects applied to a namespace, the roll-out told."""
