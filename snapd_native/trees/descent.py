"""Moving through a tree of any depth with a bounded number of open directories."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Iterator

MAX_OPEN = 64
"""Directories that a descent, or a scan along it, keeps open at once."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Descent:
    """A position in a tree: the directory ``fd``, from which one can go `down` and `up` again.

    Only the innermost `MAX_OPEN` directories stay open. One further up is opened again through
    ``..`` on the way back, and must be the one that was left: else somebody moved it meanwhile,
    and `up` raises `OSError` with ESTALE.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._open: list[int] = []
        self._above: list[tuple[int, int]] = []
        self._scans: dict[int, Generator[str, None, None]] = {}
        self._depth = 0

    def __enter__(self) -> Descent:
        return self

    def __exit__(self, *_: object) -> None:
        for names in self._scans.values():
            names.close()
        while self._open:
            os.close(self._open.pop())

    @property
    def fd(self) -> int:
        """The directory at this position."""
        return self._open[-1] if self._open else self._root

    def down(self, name: str) -> None:
        """Enter the subdirectory ``name``; never through a symbolic link."""
        child = os.open(name, _DIRECTORY, dir_fd=self.fd)
        self._open.append(child)
        self._depth += 1
        if len(self._open) > MAX_OPEN:
            outermost = self._open.pop(0)
            status = os.fstat(outermost)
            self._above.append((status.st_dev, status.st_ino))
            os.close(outermost)

    def up(self) -> None:
        """Go back to the directory above."""
        if len(self._open) == 1 and self._above:
            above = os.open("..", _DIRECTORY, dir_fd=self._open[0])
            self._open.insert(0, above)
            status = os.fstat(above)
            if (status.st_dev, status.st_ino) != self._above.pop():
                raise OSError(errno.ESTALE, "a directory was moved while the tree was read")
        os.close(self._open.pop())
        self._depth -= 1

    def scan(self) -> Iterator[str]:
        """Iterate over the names in the directory at this position, until it is left for good.

        The directory is read as the iteration goes on, so memory does not grow with its width;
        only `MAX_OPEN` levels down is it read at once and closed, so open files do not grow with
        depth.
        """
        names = _stream(self.fd)
        if self._depth >= MAX_OPEN:
            return iter(list(names))
        self._scans[self._depth] = names
        return names


def _stream(directory: int) -> Generator[str, None, None]:
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry.name
