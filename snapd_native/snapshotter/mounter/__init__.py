"""Snapshots in the host's directory tree: their mounts, and the ledger that records those."""

from snapd_native.snapshotter.mounter.mounter import Mounter

__all__ = ["Mounter"]
