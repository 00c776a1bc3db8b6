"""Keep hard links in a copy, without a table in memory."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager


class Links:
    """Remembers the copy of each file with several names, by a further name in a directory.

    The directory is the table. So memory does not grow with the number of these files, and several
    processes can use the table at once.
    """

    def __init__(self, table: int) -> None:
        """Use the directory ``table`` of `link_table`."""
        self._table = table

    def place(self, status: os.stat_result, directory: int, name: str) -> bool:
        """Make ``name`` in ``directory`` a further name of the copy; False if there is none yet."""
        known = _key(status)
        try:
            copy = os.stat(known, dir_fd=self._table, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if copy.st_nlink < status.st_nlink:
            try:
                self._link(self._table, known, directory, name)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
            else:
                return True
        # The last name: a copy never has more names than its source, which may have as many as
        # the file system allows.
        os.rename(known, name, src_dir_fd=self._table, dst_dir_fd=directory)
        return True

    def remember(self, status: os.stat_result, directory: int, name: str) -> bool:
        """Remember the copy ``name`` in ``directory`` for further names of the file.

        Return False if another process has copied the file first: then ``name`` is replaced by a
        name of that copy.
        """
        try:
            self._link(directory, name, self._table, _key(status))
        except FileExistsError:
            os.unlink(name, dir_fd=directory)
            if not self.place(status, directory, name):
                raise OSError(errno.ESTALE, "a file was unlinked while it was copied") from None
            return False
        return True

    def _link(self, source: int, name: str, target: int, link: str) -> None:
        os.link(name, link, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)


@contextmanager
def link_table(source: int, target: int) -> Iterator[int]:
    """Create the directory for `Links` in ``target``, yield it open, and delete it afterwards.

    Its name is one that ``source``, of which ``target`` becomes a copy, does not contain.
    """
    names = (f".links-{number}" for number in itertools.count())
    name = next(name for name in names if not _exists(source, name))
    os.mkdir(name, 0o700, dir_fd=target)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    table = os.open(name, flags, dir_fd=target)
    try:
        yield table
        # Files with names outside the tree are still in the table.
        with os.scandir(table) as left:
            for entry in left:
                os.unlink(entry.name, dir_fd=table)
    finally:
        os.close(table)
    os.rmdir(name, dir_fd=target)


def _key(status: os.stat_result) -> str:
    # Subvolumes of btrfs have devices of their own, and inode numbers in common.
    return f"{status.st_dev:x}-{status.st_ino:x}"


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
