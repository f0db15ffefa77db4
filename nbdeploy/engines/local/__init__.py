"""The local engine: one supervisor process per Endpoint, Replicas as its children."""
