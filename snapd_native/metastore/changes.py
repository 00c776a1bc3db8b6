"""How many changes there were: a database that has fewer has lost some."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Changes:
    """The number of changes so far, and how many of them need no log, in a file by the database.

    They are written after that is durable, and not synced: they may be too low. Only the second can
    be too high, where a start has found the log half put into the database.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; it is made if there is none, readable by its owner."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self) -> tuple[int, int]:
        """Return both numbers; 0 if none was ever written."""
        count, put_back = (os.pread(self._fd, 20, offset) for offset in (0, 21))
        return _number(count), _number(put_back)

    def write(self, count: int, put_back: int) -> None:
        """Set both numbers; on a full disk they may stay."""
        with suppress(OSError):
            os.pwrite(self._fd, b"%020d\n%020d\n" % (count, put_back), 0)


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
