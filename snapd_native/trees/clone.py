"""A faithful copy of a whole tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snapd_native.trees.copy import Copier
from snapd_native.trees.descent import Descent
from snapd_native.trees.links import Links, link_table
from snapd_native.trees.walk import Step, Walk

Share = Callable[[int, int], bool]
"""Offers a directory and its empty copy, as fds, to somebody else who would fill it.

True means that somebody will.
"""


@contextmanager
def cloning(source: int, target: int) -> Iterator[int]:
    """Prepare the empty directory ``target`` to be filled by `fill`, and finish it afterwards.

    Yields the link table. After a failure ``target`` holds part of the tree.
    """
    _forget_inherited(target)
    with link_table(source, target) as table:
        yield table
    root = os.fstat(source)
    os.fchmod(target, stat.S_IMODE(root.st_mode))
    Copier(lambda _: None, reflink=False).finish_directory(source, target, root)


def fill(source: int, target: int, copier: Copier, links: Links, share: Share) -> None:
    """Copy what is in the directory ``source`` to ``target``, but for directories that are shared.

    Kept are contents, holes, modes with special bits, owners, hard links, symbolic links, devices
    with whiteouts, FIFOs, sockets, times to the nanosecond, and extended attributes with ACLs and
    file capabilities. The fds must not show what is mounted in the tree; see `open_tree`.
    """
    with Descent(target) as there:
        visits = Walk(source)
        for visit in visits:
            name, status = visit.name, visit.status
            if visit.step is Step.ENTER:
                copier.make_directory(there.fd, name, status)
                there.down(name)
                if share(visit.directory, there.fd):
                    there.up()
                    visits.skip()
            elif visit.step is Step.LEAVE:
                copier.finish_directory(visit.directory, there.fd, status)
                there.up()
            elif status.st_nlink == 1 or not links.place(status, there.fd, name):
                copier.copy(visit.directory, there.fd, name, status)
                if status.st_nlink > 1:
                    links.remember(status, there.fd, name)
            else:
                copier.count_link()


def _forget_inherited(target: int) -> None:
    """Take from an empty directory what it may have from its parent, and would hand down."""
    os.fchown(target, 0, 0)
    os.fchmod(target, 0o700)
    for attribute in os.listxattr(target):
        if attribute.startswith("system.posix_acl_"):
            os.removexattr(target, attribute)
