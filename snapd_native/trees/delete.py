"""Delete a tree."""

from __future__ import annotations

import errno
import os
import stat

from snapd_native import linux
from snapd_native.trees.descent import GONE, Descent, Scan
from snapd_native.trees.opened import UNOPENED, changed, open_tree
from snapd_native.trees.seal import unseal
from snapd_native.trees.walk import Report

_PROTECTION = linux.FS_IMMUTABLE_FL | linux.FS_APPEND_FL

_ROUNDS = 100
"""How often a tree is emptied that gets new entries meanwhile."""


def delete(parent: int, name: str, report: Report = lambda *_: None) -> None:
    """Delete the directory ``name`` in ``parent`` and everything below it.

    No link is followed and no mount is entered. A process with CAP_LINUX_IMMUTABLE also deletes
    immutable and append-only files. ``report`` is called for every entry.

    Raises:
        OSError: EBUSY if something is mounted inside the tree, EPERM if something is immutable or
            append-only, EAGAIN if a process has a lease on an immutable file, ENOKEY if such a file
            is encrypted and locked, ESTALE if entries are created faster than they are deleted.
            Everything that can be deleted is deleted then.
    """
    for _ in range(_ROUNDS):
        with open_tree(parent, name, writable=True) as root:
            stuck = _empty(root, report)
        if stuck is not None:
            raise stuck
        try:
            _remove(parent, name, directory=True)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
    raise changed()


def _empty(root: int, report: Report) -> OSError | None:
    """Delete everything below ``root``; return the last error, if there was one.

    A directory that gets new entries meanwhile is left.
    """
    stuck: OSError | None = None
    with Descent(root) as here:
        levels: list[tuple[str, Scan]] = []
        names = here.scan()
        while True:
            for name in names:
                report(1, 0)
                try:
                    _remove(here.fd, name, directory=False)
                except IsADirectoryError:
                    if here.enter(name):
                        levels.append((name, names))
                        names = here.scan()
                        break
                except OSError as error:
                    if error.errno in GONE:
                        continue
                    if error.errno not in (errno.EBUSY, errno.EPERM, *UNOPENED):
                        raise
                    stuck = error
            else:
                if not levels:
                    return stuck
                here.up()
                name, names = levels.pop()
                try:
                    os.rmdir(name, dir_fd=here.fd)
                except OSError as error:
                    if error.errno == errno.EBUSY:
                        stuck = stuck or error
                    elif error.errno not in (errno.ENOTEMPTY, *GONE):
                        raise


def _remove(parent: int, name: str, *, directory: bool) -> None:
    try:
        _unlink(parent, name, directory=directory)
    except PermissionError:
        # EPERM for root means that the file, or the directory it lies in, is immutable or
        # append-only.
        was_protected = _unprotect(parent, name)
        # The directory of the whole tree belongs to the caller.
        if not directory:
            was_protected |= unseal(parent, _PROTECTION)
        if not was_protected:
            raise
        _unlink(parent, name, directory=directory)


def _unlink(parent: int, name: str, *, directory: bool) -> None:
    if directory:
        os.rmdir(name, dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)


def _unprotect(parent: int, name: str) -> bool:
    """Clear the flags immutable and append-only; return False if neither was set."""
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        # No other type has these flags, and opening a device can have side effects.
        return False
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=parent)
    try:
        return unseal(fd, _PROTECTION)
    finally:
        os.close(fd)
