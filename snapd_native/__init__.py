"""A snapshot service: containerd's native snapshotter contract on the D-Bus system bus."""

__version__ = "1.0.0"
