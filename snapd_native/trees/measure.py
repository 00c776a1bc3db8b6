"""How much of the disk a tree takes."""

from __future__ import annotations

import os
from collections.abc import Callable

from snapd_native.model import Usage
from snapd_native.trees.walk import Step, walk

BLOCK = 512
"""The unit of ``st_blocks``, whatever the file system's own; see stat(3type)."""


def measure(root: int, step: Callable[[int], None]) -> Usage:
    """Add up the allocated bytes and the inodes of the tree at ``root``, the root included.

    A file with several names counts once, as in containerd's ``fs.DiskUsage``; data shared by
    reflink counts fully. ``step`` is called for every entry with 0, and may raise to stop.
    """
    own = os.fstat(root)
    blocks, inodes = own.st_blocks, 1
    # Names still to come of each file with several: an entry leaves with its last name, so
    # that the table holds only files whose names lie apart.
    unseen: dict[tuple[int, int], int] = {}
    for visit in walk(root):
        if visit.step is Step.LEAVE:
            continue
        step(0)
        status = visit.status
        if visit.step is Step.ENTRY and status.st_nlink > 1:
            file = (status.st_dev, status.st_ino)
            left = unseen.pop(file, 0)
            if left != 1:
                unseen[file] = (left or status.st_nlink) - 1
            if left:
                continue
        blocks += status.st_blocks
        inodes += 1
    return Usage(size=blocks * BLOCK, inodes=inodes)
