"""Whether what is mounted here can be seen by the host."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEMD = Path("/run/systemd/system")
"""There where systemd manages the host; see sd_booted(3)."""


def hidden_from_host() -> bool:
    """Tell whether systemd runs the host, in another mount name space than this process is in."""
    if not _SYSTEMD.is_dir():
        return False
    try:
        host = os.stat("/proc/1/ns/mnt")
    except OSError:
        return False
    own = os.stat("/proc/self/ns/mnt")
    return (own.st_dev, own.st_ino) != (host.st_dev, host.st_ino)
