"""Move through a tree of any depth with a bounded number of open directories."""

from __future__ import annotations

import errno
import os
from itertools import islice

MAX_OPEN = 64
"""Directories that a descent keeps open at once, and as many for its scans."""

AT_ONCE = 1024
"""Entries of a directory that are read and sorted at once."""

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""The errors of system calls on a directory that was removed or replaced."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Descent:
    """A position in a tree, the directory ``fd``, that moves `down` and `up`.

    Only the innermost `MAX_OPEN` directories stay open. On the way back the others are opened again
    through ``..``. If that is another directory than before, because one was moved, `up` raises
    `OSError` with ESTALE.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._open: list[int] = []
        self._above: list[tuple[int, int]] = []
        self._scans: dict[int, Scan] = {}
        self._depth = 0

    def __enter__(self) -> Descent:
        return self

    def __exit__(self, *_: object) -> None:
        for scan in self._scans.values():
            scan.close()
        while self._open:
            os.close(self._open.pop())

    @property
    def fd(self) -> int:
        """The directory at this position."""
        return self._open[-1] if self._open else self._root

    def down(self, name: str) -> None:
        """Enter the subdirectory ``name``, but not through a symbolic link."""
        child = os.open(name, _DIRECTORY, dir_fd=self.fd)
        self._open.append(child)
        self._depth += 1
        if len(self._open) > MAX_OPEN:
            outermost = self._open.pop(0)
            status = os.fstat(outermost)
            self._above.append((status.st_dev, status.st_ino))
            os.close(outermost)

    def enter(self, name: str) -> bool:
        """Enter the subdirectory ``name``; return False if it is gone."""
        try:
            self.down(name)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return True

    def up(self) -> None:
        """Return to the directory above."""
        if len(self._open) == 1 and self._above:
            above = os.open("..", _DIRECTORY, dir_fd=self._open[0])
            self._open.insert(0, above)
            status = os.fstat(above)
            if (status.st_dev, status.st_ino) != self._above.pop():
                raise OSError(errno.ESTALE, "a directory was moved while the tree was read")
        os.close(self._open.pop())
        self._depth -= 1

    def scan(self) -> Scan:
        """Iterate over the names in the directory at this position.

        The directory is read in blocks during the iteration, so that memory does not grow with its
        size. More than `MAX_OPEN` levels down it is read completely and closed, so that the number
        of open files does not grow with the depth.
        """
        scan = Scan(self.fd)
        if self._depth >= MAX_OPEN:
            scan.read(None)
            scan.close()
        else:
            self._scans[self._depth] = scan
        return scan


class Scan:
    """An iteration over the names in a directory, in the order of inodes.

    That is about the order of the inodes on the disk. ext4 lists names in the order of their
    hashes, with which a disk would have to seek for each inode.
    """

    def __init__(self, directory: int) -> None:
        self._entries = os.scandir(directory)
        self._next: list[os.DirEntry[str]] = []

    def __iter__(self) -> Scan:
        return self

    def __next__(self) -> str:
        if not self._next:
            self.read(AT_ONCE)
        if not self._next:
            self.close()
            raise StopIteration
        return self._next.pop().name

    def read(self, most: int | None) -> None:
        """Read the next ``most`` entries, or all, after the iteration of those before."""
        self._next = list(islice(self._entries, most))
        self._next.sort(key=os.DirEntry.inode, reverse=True)

    def take(self, most: int) -> list[str]:
        """Remove up to ``most`` names of non-directories, at most half of those that were read."""
        kept: list[os.DirEntry[str]] = []
        taken: list[os.DirEntry[str]] = []
        last = self._next[: min(most, (len(self._next) + 1) // 2)]
        for entry in last:
            (kept if entry.is_dir(follow_symlinks=False) else taken).append(entry)
        self._next[: len(last)] = kept
        return [entry.name for entry in taken]

    def close(self) -> None:
        """End the iteration."""
        self._entries.close()
