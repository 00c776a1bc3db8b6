"""Room that is kept in order to make room: deleting a record takes a few blocks first."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress

log = logging.getLogger(__name__)

_NAME = "ballast"

SIZES = (1 << 20, 1 << 19, 1 << 18, 1 << 17, 1 << 16)
"""Bytes, the best first; a transaction that deletes something writes some ten pages."""


class Ballast:
    """A file in the state directory that is thrown away when the disk is full."""

    def __init__(self, directory: int) -> None:
        """Throw away what the last run had: a start takes room too."""
        self._directory = directory
        self._lock = threading.Lock()
        self._held = SIZES[0]
        self.drop()

    def drop(self) -> bool:
        """Free the room; False if that was done before, or cannot be."""
        with self._lock:
            if not self._held:
                return False
            try:
                with suppress(FileNotFoundError):
                    # xfs frees the blocks of a truncated file at once, of an unlinked one later.
                    self._allocate(0)
                    os.unlink(_NAME, dir_fd=self._directory)
                # Blocks are free when the journal has it.
                os.fsync(self._directory)
            except OSError as error:
                log.warning("the room that is kept for a full disk cannot be freed: %s", error)
                return False
            self._held = 0
            return True

    def take(self) -> None:
        """Take the room again, as much as there is."""
        with self._lock:
            for size in SIZES:
                if size <= self._held:
                    return
                with suppress(OSError):
                    self._allocate(size)
                    self._held = size
                    return
            with suppress(OSError):
                os.unlink(_NAME, dir_fd=self._directory)

    def _allocate(self, size: int) -> None:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if size else os.O_TRUNC)
        fd = os.open(_NAME, flags, 0o600, dir_fd=self._directory)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
