"""The snapshots plugin of containerd: its gRPC service, as a client of the D-Bus service."""
