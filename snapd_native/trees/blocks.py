"""Read files from the disk, past the page cache; see O_DIRECT in open(2)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from snapd_native import linux
from snapd_native.trees.opened import open_file

_ALIGNMENT = 4096
"""Bytes to which offsets and lengths are rounded: the largest sector that Linux supports."""


def open_blocks(directory: int, name: str, *, from_disk: bool) -> int:
    """Open a file for `Blocks`; with ``from_disk`` it is read from the disk."""
    if from_disk:
        try:
            fd = open_file(directory, name, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            if not linux.has_direct_io(fd):
                _drop_cache(fd)
            return fd
    fd = open_file(directory, name)
    if from_disk:
        _drop_cache(fd)
    return fd


class Blocks:
    """Reads blocks of an open file, and closes it.

    With O_DIRECT the blocks come from the disk, even if they are in the page cache. If the file
    system does not support that, the pages of the file are dropped from the cache first. Pages that
    a process has mapped stay, and are read from memory.
    """

    def __init__(self, fd: int, most: int) -> None:
        """Read blocks of up to ``most`` bytes."""
        self._fd = fd
        # O_DIRECT needs a buffer that begins at a page.
        self._room = mmap.mmap(-1, max(_rounded(most), _ALIGNMENT))

    def close(self) -> None:
        """Close the file."""
        self._room.close()
        os.close(self._fd)

    def read(self, offset: int, most: int) -> bytes:
        """Return ``most`` bytes from ``offset``, a multiple of a page; fewer at the end."""
        if fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_DIRECT:
            try:
                return self._read(offset, most, _rounded(most))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            _drop_cache(self._fd)
        return self._read(offset, most, most)

    def _read(self, offset: int, most: int, asked: int) -> bytes:
        with memoryview(self._room) as room:
            found = 0
            while found < most:
                with room[found:asked] as rest:
                    count = os.preadv(self._fd, [rest], offset + found)
                found += count
                # A number of bytes that is not a multiple of a sector means the end of the file.
                if count == 0 or (asked != most and count % _ALIGNMENT):
                    break
            return bytes(room[: min(found, most)])


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _drop_cache(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
