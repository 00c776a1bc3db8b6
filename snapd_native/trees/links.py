"""Hard links across a copy, without a table in memory."""

from __future__ import annotations

import itertools
import os


class Links:
    """Remembers the copy of each file with several names, as one more name in a directory.

    The directory lies in the root of the copy while it is made: the file system is the table, so
    memory does not grow with the number of linked files.
    """

    def __init__(self, source: int, target: int) -> None:
        """Prepare for a copy of the tree ``source`` to the empty directory ``target``."""
        self._source = source
        self._target = target
        self._name = ""
        self._fd = -1

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd < 0:
            return
        try:
            # Files that also have names outside the tree are still listed, and all of them after
            # a failure.
            with os.scandir(self._fd) as left:
                for entry in left:
                    os.unlink(entry.name, dir_fd=self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1
        os.rmdir(self._name, dir_fd=self._target)

    def place(self, status: os.stat_result, directory: int, name: str) -> bool:
        """Make ``name`` in ``directory`` one more name of the copy; False if there is none yet."""
        if self._fd < 0:
            return False
        known = _key(status)
        try:
            copy = os.stat(known, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if copy.st_nlink < status.st_nlink:
            os.link(known, name, src_dir_fd=self._fd, dst_dir_fd=directory, follow_symlinks=False)
        else:
            # The last name: a copy never has more names than its source, which may have as many
            # as the file system allows.
            os.rename(known, name, src_dir_fd=self._fd, dst_dir_fd=directory)
        return True

    def remember(self, status: os.stat_result, directory: int, name: str) -> None:
        """Keep the copy just made as ``name`` in ``directory`` for names to come."""
        if self._fd < 0:
            self._open()
        os.link(
            name,
            _key(status),
            src_dir_fd=directory,
            dst_dir_fd=self._fd,
            follow_symlinks=False,
        )

    def _open(self) -> None:
        names = (f".links-{number}" for number in itertools.count())
        name = next(name for name in names if not _exists(self._source, name))
        os.mkdir(name, 0o700, dir_fd=self._target)
        self._name = name
        self._fd = os.open(
            name,
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=self._target,
        )


def _key(status: os.stat_result) -> str:
    # Subvolumes of btrfs have devices of their own, and inode numbers in common.
    return f"{status.st_dev:x}-{status.st_ino:x}"


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
