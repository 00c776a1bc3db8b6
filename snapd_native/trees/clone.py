"""Copy a whole tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from snapd_native.trees.copy import Copier
from snapd_native.trees.descent import Descent
from snapd_native.trees.links import Links, link_table
from snapd_native.trees.share import Peers
from snapd_native.trees.walk import Report, Step, Walk, allocated

WORTH_SHARING = 64
"""Entries that a peer gets at once."""


@contextmanager
def cloning(source: int, target: int) -> Iterator[int]:
    """Prepare the empty directory ``target`` for a `Cloner`, and finish it after the block.

    Yield the link table. After a failure ``target`` contains a part of the tree.
    """
    _forget_inherited(target)
    with link_table(source, target) as table:
        yield table
    root = os.fstat(source)
    os.fchmod(target, stat.S_IMODE(root.st_mode))
    Copier(lambda *_: None, reflink=False).copy_attributes(source, target, root)


class Cloner:
    """Copies the contents of directories, with the help of peers.

    A directory here is a pair, the source and its copy. The copy has the same contents, holes,
    modes with special bits, owners, hard links, symbolic links, devices with whiteouts, FIFOs,
    sockets, times in nanoseconds, and extended attributes with ACLs and file capabilities. The fds
    must not show mounts inside the tree; see `open_tree`.
    """

    def __init__(self, report: Report, links: Links, peers: Peers, *, reflink: bool) -> None:
        """Share the data if ``reflink``, that is, if the file system can."""
        self._report = report
        self._copier = Copier(report, reflink=reflink)
        self._links = links
        self._peers = peers

    def directory(self, source: int, target: int) -> None:
        """Copy the attributes of ``source``, and everything below it that no peer takes."""
        with Descent(target) as there:
            visits = Walk(source)
            for visit in visits:
                if visit.step is Step.ENTER:
                    self._copier.make_directory(there.fd, visit.name, visit.status)
                    self._report(1, allocated(visit.status))
                    there.down(visit.name)
                    if self._peers.take_directory(visit.directory, there.fd):
                        there.up()
                        visits.skip()
                elif visit.step is Step.LEAVE:
                    self._finish(visit.directory, there.fd, visit.status)
                    there.up()
                else:
                    if self._peers.are_idle():
                        self._share(visits.take(WORTH_SHARING), visit.directory, there.fd)
                    self._copy(visit.directory, there.fd, visit.name, visit.status)
        self._finish(source, target, os.fstat(source))

    def names(self, names: Sequence[str], source: int, target: int) -> None:
        """Copy entries of ``source`` that are not directories."""
        for name in names:
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            self._copy(source, target, name, status)

    def _share(self, names: Sequence[str], source: int, target: int) -> None:
        if names and not self._peers.take_names(names, source, target):
            self.names(names, source, target)

    def _copy(self, source: int, target: int, name: str, status: os.stat_result) -> None:
        has_links = status.st_nlink > 1
        if has_links and self._links.place(status, target, name):
            self._report(0, 0)
            return
        rest = self._copier.copy(source, target, name, status)
        if has_links and not self._links.remember(status, target, name):
            self._report(0, 0)
            return
        self._report(1, rest)

    def _finish(self, source: int, target: int, status: os.stat_result) -> None:
        # If a peer still created entries, the times would change and the entries inherit the ACL.
        self._peers.finish()
        self._copier.copy_attributes(source, target, status)


def _forget_inherited(target: int) -> None:
    """Remove what an empty directory has inherited and would pass on to its entries."""
    os.fchown(target, 0, 0)
    os.fchmod(target, 0o700)
    for attribute in os.listxattr(target):
        if attribute.startswith("system.posix_acl_"):
            os.removexattr(target, attribute)
