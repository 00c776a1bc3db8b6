"""Find out whether the host can see the mounts of this process."""

from __future__ import annotations

from pathlib import Path

from snapd_native.mounts.table import Table

_SYSTEMD = Path("/run/systemd/system")
"""Exists if systemd manages the host; see sd_booted(3)."""

_HOST = Path("/proc/1/mountinfo")


def hidden_from_host() -> bool:
    """Tell whether systemd runs in another mount namespace than this process."""
    if not _SYSTEMD.is_dir():
        return False
    try:
        host = Table.read(_HOST)
    except OSError:
        return False
    # The id of a mount is unique, and a mount is in one namespace only.
    return {entry.id for entry in host}.isdisjoint(entry.id for entry in Table.read())
