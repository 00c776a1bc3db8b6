"""How many changes there were: a database that has fewer has lost some."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Changes:
    """The number of changes so far, in a file beside the database.

    It is written after each change is durable, and not synced: it may be too low, never too high.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; it is made if there is none, readable by its owner."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self) -> int:
        """Return the number; 0 if none was ever written."""
        text = os.pread(self._fd, 20, 0)
        return int(text) if text.isdigit() else 0

    def write(self, count: int) -> None:
        """Set the number; on a full disk it may stay."""
        with suppress(OSError):
            os.pwrite(self._fd, b"%020d\n" % count, 0)
