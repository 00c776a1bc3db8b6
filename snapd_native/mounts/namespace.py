"""Whether what is mounted here can be seen by the host."""

from __future__ import annotations

from pathlib import Path

from snapd_native.mounts.table import Table

_SYSTEMD = Path("/run/systemd/system")
"""There where systemd manages the host; see sd_booted(3)."""

_HOST = Path("/proc/1/mountinfo")


def hidden_from_host() -> bool:
    """Tell whether systemd runs the host, in another mount namespace than this process is in."""
    if not _SYSTEMD.is_dir():
        return False
    try:
        host = Table.read(_HOST)
    except OSError:
        return False
    # A mount is in one namespace only, and its number is its own.
    return {entry.id for entry in host}.isdisjoint(entry.id for entry in Table.read())
