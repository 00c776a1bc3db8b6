"""Seal a tree: make it immutable, so that nobody can change it through any mount; and undo that.

Directories and regular files get the inode flag immutable; see FS_IOC_SETFLAGS in ioctl_iflags(2).
A directory gets the flag before its entries are read, so that no entry can be added after that. xfs
and btrfs permit writes through descriptors and mappings that are older than the flag, so a file
that a process has open or mapped for writing is an error.

Symbolic links, FIFOs, sockets and devices do not have the flag. Nobody can rename or delete them in
a sealed directory, but their owner, mode and times can be changed through a writable mount.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from snapd_native import linux
from snapd_native.trees.measure import Counter
from snapd_native.trees.opened import UNOPENED, open_file, unnamed_file

_OTHER_USER = 1
"""Any uid but 0."""

_UNSUPPORTED = (errno.ENOTTY, errno.EOPNOTSUPP)
"""The errors of a file system without inode flags."""


class Sealer(Counter):
    """Seals the contents of directories, and counts them."""

    def enter(self, directory: int) -> None:
        """Seal a directory."""
        seal(directory)

    def entry(self, name: str, directory: int, status: os.stat_result) -> None:
        """Seal a regular file.

        Raises:
            OSError: ETXTBSY if somebody can still write to it.
        """
        if stat.S_ISREG(status.st_mode):
            fd = open_file(directory, name)
            try:
                # The open can wait for a lease. If the service was killed during that wait, this
                # ends the worker: the next start may already unseal the tree.
                self._report(0, 0)
                seal(fd)
                if linux.is_written(fd):
                    raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))
            finally:
                os.close(fd)


class Unsealer(Counter):
    """Undoes the work of a `Sealer`, and opens only the files that are sealed.

    It counts only the files that stay sealed, because a process has a lease on them, or because
    they are encrypted and locked. It does not wait: with a lease on each of many files, a user
    could hold up a start of the service for hours.
    """

    def enter(self, directory: int) -> None:
        """Unseal a directory."""
        unseal(directory)

    def entry(self, name: str, directory: int, status: os.stat_result) -> None:
        """Unseal a regular file, unless it is gone."""
        if not stat.S_ISREG(status.st_mode):
            return
        with suppress(FileNotFoundError):
            if linux.is_immutable(directory, name):
                self._unseal(name, directory, status)

    def _unseal(self, name: str, directory: int, status: os.stat_result) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=directory)
        except OSError as error:
            if error.errno not in UNOPENED:
                raise
            self.tally.add(status)
            return
        try:
            unseal(fd)
        finally:
            os.close(fd)

    def _add(self, status: os.stat_result) -> None:
        self._report(0, 0)


def sealing_works(directory: int) -> bool:
    """Tell whether a file system has inode flags and leases.

    Raises:
        PermissionError: the process lacks CAP_LEASE or CAP_LINUX_IMMUTABLE.
    """
    with unnamed_file(directory) as fd:
        if fd is None:
            return False
        # A lease on a file of another user needs CAP_LEASE. The file is open for writing, which
        # only a file system with leases reports.
        os.fchown(fd, _OTHER_USER, -1)
        return linux.is_written(fd) and seal(fd)


def seal(fd: int) -> bool:
    """Seal an open file or directory; False on a file system without inode flags.

    Raises:
        PermissionError: this process has no CAP_LINUX_IMMUTABLE.
    """
    try:
        linux.change_flags(fd, to_set=linux.FS_IMMUTABLE_FL)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def unseal(fd: int, flags: int = linux.FS_IMMUTABLE_FL) -> bool:
    """Clear inode flags of an open file or directory; False if none of them was set."""
    try:
        return linux.change_flags(fd, to_clear=flags)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
