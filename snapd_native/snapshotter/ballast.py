"""Room that is kept in order to make room: deleting a record takes a few blocks first."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

_NAME = "ballast"

SIZES = (1 << 20, 1 << 18, 1 << 16)
"""Bytes, the best first; a transaction that deletes something writes some ten pages."""


class Ballast:
    """A file in the state directory that is thrown away when the disk is full."""

    def __init__(self, directory: int) -> None:
        """Throw away what the last run had: a start takes room too."""
        self._directory = directory
        self._lock = threading.Lock()
        self._held = True
        self.drop()

    def drop(self) -> bool:
        """Free the room; False if that was done before."""
        with self._lock:
            if not self._held:
                return False
            with suppress(FileNotFoundError):
                os.unlink(_NAME, dir_fd=self._directory)
            # Blocks are free when the journal has it.
            os.fsync(self._directory)
            self._held = False
            return True

    def take(self) -> None:
        """Take the room again, if there is any."""
        with self._lock:
            if self._held:
                return
            for size in SIZES:
                with suppress(OSError):
                    self._allocate(size)
                    self._held = True
                    return
            with suppress(OSError):
                os.unlink(_NAME, dir_fd=self._directory)

    def _allocate(self, size: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_NAME, flags, 0o600, dir_fd=self._directory)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
