"""The state directory: its trees, its database, and the space that is kept for a full disk."""

from snapd_native.snapshotter.state.directory import StateDirectory

__all__ = ["StateDirectory"]
