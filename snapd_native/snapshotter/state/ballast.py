"""Space that is kept for a full disk: even the deletion of a record needs a few blocks."""

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
"""Bytes; a deletion writes about ten pages."""

_COPYING_SIZE = 1 << 23
"""Bytes on btrfs, which writes each page to a new place and reserves some hundred KiB for its own
trees with each new file or page."""

_LEAST = 1 << 16
"""Bytes; less than this does not help."""


class Ballast:
    """A file in the state directory that is deleted when the disk is full."""

    def __init__(self, directory: int) -> None:
        """Delete the file of the last run: the start needs space too."""
        self._directory = directory
        self._lock = threading.Lock()
        is_copying = linux.filesystem_type(directory) == "btrfs"
        self._most = _COPYING_SIZE if is_copying else _SIZE
        self._held = self._most
        self.drop()

    def drop(self) -> bool:
        """Free the space; return False if it is free already or cannot be freed."""
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
        """Reserve the space again, or as much as is free."""
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
            # A full btrfs cannot truncate a file but can unlink one. It frees the blocks when it
            # commits its transaction, for which an fsync of the directory is not enough.
            os.unlink(_NAME, dir_fd=self._directory)
            linux.syncfs(self._directory)
        else:
            os.unlink(_NAME, dir_fd=self._directory)
            # The blocks are free when this is in the journal.
            os.fsync(self._directory)

    def _allocate(self, size: int) -> None:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if size else os.O_TRUNC)
        fd = os.open(_NAME, flags, 0o600, dir_fd=self._directory)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
