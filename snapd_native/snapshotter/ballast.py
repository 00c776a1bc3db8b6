"""Room that is kept in order to make room: deleting a record takes a few blocks first."""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import suppress

from snapd_native import linux

log = logging.getLogger(__name__)

_NAME = "ballast"

_SIZE = 1 << 20
"""Bytes; a transaction that deletes something writes some ten pages."""

_COPYING_SIZE = 1 << 23
"""Bytes on btrfs, which writes each page to a new place, and for each file or page that it makes
reserves some hundred KiB for its own trees."""

_LEAST = 1 << 16
"""Bytes that are of some use."""


class Ballast:
    """A file in the state directory that is thrown away when the disk is full."""

    def __init__(self, directory: int) -> None:
        """Throw away what the last run had: a start takes room too."""
        self._directory = directory
        self._lock = threading.Lock()
        is_copying = linux.filesystem_type(directory) == "btrfs"
        self._most = _COPYING_SIZE if is_copying else _SIZE
        self._held = self._most
        self.drop()

    def drop(self) -> bool:
        """Free the room; False if that was done before, or cannot be."""
        with self._lock:
            if not self._held:
                return False
            try:
                with suppress(FileNotFoundError):
                    self._free()
            except OSError as error:
                log.warning("the room that is kept for a full disk cannot be freed: %s", error)
                return False
            self._held = 0
            return True

    def take(self) -> None:
        """Take the room again, as much as there is."""
        with self._lock:
            size = self._most
            while size >= _LEAST and size > self._held:
                with suppress(OSError):
                    self._allocate(size)
                    self._held = size
                size //= 2
            if not self._held:
                with suppress(OSError):
                    os.unlink(_NAME, dir_fd=self._directory)

    def _free(self) -> None:
        try:
            # xfs frees the blocks of a truncated file at once, of an unlinked one later.
            self._allocate(0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # A full btrfs has no room to truncate a file but keeps some to unlink one. It frees the
            # blocks when it commits its transaction, which a sync of the directory is not.
            os.unlink(_NAME, dir_fd=self._directory)
            linux.syncfs(self._directory)
        else:
            os.unlink(_NAME, dir_fd=self._directory)
            # Blocks are free when the journal has it.
            os.fsync(self._directory)

    def _allocate(self, size: int) -> None:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if size else os.O_TRUNC)
        fd = os.open(_NAME, flags, 0o600, dir_fd=self._directory)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
