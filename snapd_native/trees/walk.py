"""The walk through a tree that clone and measure share."""

from __future__ import annotations

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
