"""Mount snapshots on the host, and keep a ledger of the mounts."""

from snapd_native.snapshotter.mounter.mounter import Mounter

__all__ = ["Mounter"]
