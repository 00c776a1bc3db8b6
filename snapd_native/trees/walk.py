"""The walk through a tree that clone, measure and digest share."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import NamedTuple

from snapd_native.trees.descent import Descent, Scan

Report = Callable[[int, int], None]
"""A function that gets the inodes and allocated bytes that were done since its last call.

It is called many times a second, also with zeros, and can raise to end the work.
"""


def allocated(status: os.stat_result) -> int:
    """Return the allocated bytes of a file. The unit of ``st_blocks`` is 512; see stat(3type)."""
    return status.st_blocks * 512


def link_target(directory: int, name: str) -> str:
    """Return the target of a symbolic link; raise `OSError` with ESTALE if it is none now."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise changed() from None
        raise


def open_file(directory: int, name: str, flags: int = 0) -> int:
    """Open a regular file for reading; wait while another process gives up a lease on it.

    Samba and NFS servers hold leases; see F_SETLEASE in fcntl(2). This never waits for the other
    end of a FIFO.

    Raises:
        OSError: an error of the kernel; ESTALE if it is not a regular file now.
    """
    flags |= os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except BlockingIOError:
        pass
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise changed()
        return os.open(f"/proc/self/fd/{found}", flags)
    finally:
        os.close(found)


def changed() -> OSError:
    """Return the error for a tree that was changed while it was read."""
    return OSError(errno.ESTALE, "the tree was changed while it was read")


class Step(Enum):
    """The kind of a visit."""

    ENTRY = auto()
    """Anything but a directory."""
    ENTER = auto()
    """A directory, before its entries."""
    LEAVE = auto()
    """The same directory, after its entries."""


class Visit(NamedTuple):
    """A step of a walk.

    ``directory`` is an fd that stays open until the next step. It is the directory of the entry, or
    the directory that is entered or left.
    """

    step: Step
    directory: int
    name: str
    status: os.stat_result


class Walk:
    """A walk through everything below ``root``, depth first, without the root itself.

    An entry that was deleted since it was listed is left out. Memory and open files are bounded for
    every tree. The iteration raises `OSError` if a directory cannot be read, or was moved (ESTALE).
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._skipped = False
        self._names: Scan | None = None

    def skip(self) -> None:
        """Skip the directory that was just entered; it is not left either."""
        self._skipped = True

    def take(self, most: int) -> list[str]:
        """Remove up to ``most`` entries after the current one from the walk; see `Scan.take`."""
        return self._names.take(most) if self._names else []

    def __iter__(self) -> Iterator[Visit]:
        with Descent(self._root) as here:
            levels: list[tuple[str, os.stat_result, Scan]] = []
            names = here.scan()
            while True:
                self._names = names
                for name in names:
                    try:
                        status = os.stat(name, dir_fd=here.fd, follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        yield Visit(Step.ENTRY, here.fd, name, status)
                        continue
                    if not here.enter(name):
                        continue
                    yield Visit(Step.ENTER, here.fd, name, status)
                    if self._skipped:
                        self._skipped = False
                        here.up()
                        continue
                    levels.append((name, status, names))
                    names = here.scan()
                    break
                else:
                    if not levels:
                        return
                    name, status, names = levels.pop()
                    yield Visit(Step.LEAVE, here.fd, name, status)
                    here.up()
