"""A faithful copy of a whole tree."""

from __future__ import annotations

import os
from collections.abc import Callable

from snapd_native.trees.copy import copy_attributes, copy_entry
from snapd_native.trees.descent import Descent
from snapd_native.trees.links import Links
from snapd_native.trees.walk import Step, walk


def clone(source: int, target: int, step: Callable[[int], None], *, reflink: bool) -> None:
    """Make the empty directory ``target`` a copy of the tree at ``source``.

    Kept are contents, holes, modes with special bits, owners, hard links, symbolic links, devices
    with whiteouts, FIFOs, sockets, times to the nanosecond, and extended attributes with ACLs and
    file capabilities. Data is shared where ``reflink`` says that the file system can. ``step`` is
    called for every entry, and inside large files, with the allocated bytes done since; it may
    raise to stop. After a failure ``target`` holds part of the tree.
    """
    _forget_inherited(target)
    with Descent(target) as there:
        with Links(source, target) as links:
            for visit in walk(source):
                name, status = visit.name, visit.status
                if visit.step is Step.ENTER:
                    # Closed to all, and without the source's default ACL, until all is inside.
                    os.mkdir(name, 0o700, dir_fd=there.fd)
                    there.down(name)
                    step(0)
                elif visit.step is Step.LEAVE:
                    copy_attributes(visit.directory, there.fd, status)
                    there.up()
                elif status.st_nlink == 1:
                    copy_entry(visit.directory, there.fd, name, status, step, reflink=reflink)
                elif links.place(status, there.fd, name):
                    step(0)
                else:
                    copy_entry(visit.directory, there.fd, name, status, step, reflink=reflink)
                    links.remember(status, there.fd, name)
        copy_attributes(source, target, os.fstat(source))


def _forget_inherited(target: int) -> None:
    """Take from an empty directory what it may have from its parent, and would hand down."""
    os.fchown(target, 0, 0)
    os.fchmod(target, 0o700)
    for attribute in os.listxattr(target):
        if attribute.startswith("system.posix_acl_"):
            os.removexattr(target, attribute)
