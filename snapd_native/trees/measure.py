"""Measure the usage of a tree."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from snapd_native.model import Usage
from snapd_native.trees.share import Peers
from snapd_native.trees.walk import Report, Step, Walk, allocated

WORTH_SHARING = 256
"""Entries that a peer gets at once."""

_HEAD = struct.Struct("=QQ")
_FILE = struct.Struct("=QQQQ")


@dataclass
class Tally:
    """The bytes and inodes so far, and the files of which not all names were seen."""

    size: int = 0
    inodes: int = 0
    partly: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Names still to come, and bytes, by device and inode. A file leaves with its last name, so
    that this holds only files whose names lie apart."""

    def add(self, status: os.stat_result) -> bool:
        """Count an entry; return False if it is a further name of a counted file."""
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            file = (status.st_dev, status.st_ino)
            left, _ = self.partly.pop(file, (0, 0))
            if left != 1:
                self.partly[file] = ((left or status.st_nlink) - 1, allocated(status))
            if left:
                return False
        self.size += allocated(status)
        self.inodes += 1
        return True

    def merge(self, other: Tally) -> None:
        """Add the result of a walk through other directories of the same tree."""
        self.size += other.size
        self.inodes += other.inodes
        for file, (left, size) in other.partly.items():
            if file in self.partly:
                self.size -= size
                self.inodes -= 1
            self.partly[file] = (left, size)

    def pack(self) -> bytes:
        """Return this as bytes, for another process."""
        records = [(*file, *rest) for file, rest in self.partly.items()]
        return _HEAD.pack(self.size, self.inodes) + b"".join(_FILE.pack(*r) for r in records)

    @classmethod
    def unpack(cls, packed: bytes) -> Tally:
        """Undo `pack`."""
        size, inodes = _HEAD.unpack_from(packed)
        records = _FILE.iter_unpack(packed[_HEAD.size :])
        partly = {(dev, ino): (left, taken) for dev, ino, left, taken in records}
        return cls(size, inodes, partly)

    @property
    def usage(self) -> Usage:
        """The sums so far."""
        return Usage(size=self.size, inodes=self.inodes)


class Counter:
    """Counts the contents of directories, with the help of peers."""

    def __init__(self, report: Report, peers: Peers) -> None:
        self.tally = Tally()
        self._report = report
        self._peers = peers

    def directory(self, root: int) -> None:
        """Count everything below ``root`` that no peer takes."""
        visits = Walk(root)
        for visit in visits:
            if visit.step is Step.LEAVE:
                continue
            self._add(visit.status)
            if visit.step is Step.ENTER:
                self.enter(visit.directory)
                if self._peers.take_directory(visit.directory):
                    visits.skip()
                continue
            self.entry(visit.name, visit.directory, visit.status)
            if self._peers.are_idle():
                names = visits.take(WORTH_SHARING)
                if names and not self._peers.take_names(names, visit.directory):
                    self.names(names, visit.directory)

    def names(self, names: Sequence[str], directory: int) -> None:
        """Count entries of ``directory`` that are not directories."""
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                self._add(status)
                self.entry(name, directory, status)

    def enter(self, directory: int) -> None:
        """Do more with a directory, before it is read."""

    def entry(self, name: str, directory: int, status: os.stat_result) -> None:
        """Do more with an entry that is not a directory."""

    def _add(self, status: os.stat_result) -> None:
        if self.tally.add(status):
            self._report(1, allocated(status))
        else:
            self._report(0, 0)
