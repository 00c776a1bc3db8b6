"""The contract as blocking, thread-safe Python, usable without a bus."""

from snapd_native.snapshotter.engine import Snapshotter

__all__ = ["Snapshotter"]
