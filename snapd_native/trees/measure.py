"""How much of the disk a tree takes."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from snapd_native.model import Usage
from snapd_native.trees.walk import Step, Walk

BLOCK = 512
"""The unit of ``st_blocks``, whatever the file system's own; see stat(3type)."""

_HEAD = struct.Struct("=QQ")
_FILE = struct.Struct("=QQQQ")


@dataclass
class Tally:
    """Blocks and inodes counted so far, and the files of which not all names were met yet."""

    blocks: int = 0
    inodes: int = 0
    partly: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Names still to come, and blocks, by device and inode. A file leaves with its last name, so
    that this holds only files whose names lie apart."""

    def add(self, status: os.stat_result) -> None:
        """Count an entry; a file with several names once."""
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            file = (status.st_dev, status.st_ino)
            left, _ = self.partly.pop(file, (0, 0))
            if left != 1:
                self.partly[file] = ((left or status.st_nlink) - 1, status.st_blocks)
            if left:
                return
        self.blocks += status.st_blocks
        self.inodes += 1

    def merge(self, other: Tally) -> None:
        """Add what another walk counted in other directories of the same tree."""
        self.blocks += other.blocks
        self.inodes += other.inodes
        for file, (left, blocks) in other.partly.items():
            if file in self.partly:
                self.blocks -= blocks
                self.inodes -= 1
            self.partly[file] = (left, blocks)

    def pack(self) -> bytes:
        """Return all of it as bytes, for another process."""
        records = [(*file, *rest) for file, rest in self.partly.items()]
        return _HEAD.pack(self.blocks, self.inodes) + b"".join(_FILE.pack(*r) for r in records)

    @classmethod
    def unpack(cls, packed: bytes) -> Tally:
        """Return what `pack` packed."""
        blocks, inodes = _HEAD.unpack_from(packed)
        records = _FILE.iter_unpack(packed[_HEAD.size :])
        partly = {(dev, ino): (left, taken) for dev, ino, left, taken in records}
        return cls(blocks, inodes, partly)

    @property
    def usage(self) -> Usage:
        """What was counted, in bytes."""
        return Usage(size=self.blocks * BLOCK, inodes=self.inodes)


def count(
    root: int, tally: Tally, step: Callable[[int], None], share: Callable[[int], bool]
) -> None:
    """Add what is below ``root`` to ``tally``, but for what is in directories that are shared.

    ``share`` offers a directory to somebody else who would count what is in it. ``step`` is called
    for every entry with 0, and may raise to stop.
    """
    visits = Walk(root)
    for visit in visits:
        if visit.step is Step.LEAVE:
            continue
        step(0)
        tally.add(visit.status)
        if visit.step is Step.ENTER and share(visit.directory):
            visits.skip()
