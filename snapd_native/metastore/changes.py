"""A count of all changes, kept beside the database to find out whether it has lost some."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Changes:
    """A file with two numbers: all changes so far, and those that are in the database itself.

    The others are only in the WAL. Both numbers are written after the changes are durable, and the
    file is not synced, so they can be too low. The second can also be too high, if the service was
    killed during a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it with access for its owner only."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self) -> tuple[int, int]:
        """Return both numbers; 0 for one that was never written."""
        count, put_back = (os.pread(self._fd, 20, offset) for offset in (0, 21))
        return _number(count), _number(put_back)

    def write(self, count: int, put_back: int) -> None:
        """Write both numbers; on a full disk the old ones can remain."""
        with suppress(OSError):
            os.pwrite(self._fd, b"%020d\n%020d\n" % (count, put_back), 0)


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
