"""Open trees without the mounts inside them, and files that another process may replace."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from snapd_native import linux

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def open_tree(parent: int, name: str, *, writable: bool = False) -> Iterator[int]:
    """Open the directory ``name`` in the directory ``parent`` and yield its fd.

    The fd belongs to a detached, non-recursive clone of the mount of ``parent``. So it shows the
    file system of ``parent`` only: not the mounts inside the tree or on it (tmpfs, bind mounts,
    also of single files), but the files that they hide. The clone is read-only unless ``writable``.
    Reading changes no access times, and devices cannot be opened.
    """
    mount = linux.open_tree(
        parent,
        "",
        linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC | linux.AT_EMPTY_PATH,
    )
    try:
        attributes = linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOATIME
        if not writable:
            attributes |= linux.MOUNT_ATTR_RDONLY
        linux.mount_setattr(mount, attributes, linux.MOUNT_ATTR__ATIME)
        root = os.open(name, _DIRECTORY, dir_fd=mount)
        try:
            yield root
        finally:
            os.close(root)
    finally:
        os.close(mount)


def link_target(directory: int, name: str) -> str:
    """Return the target of a symbolic link; raise `OSError` with ESTALE if it is none now."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise changed() from None
        raise


def open_file(directory: int, name: str, flags: int = 0) -> int:
    """Open a regular file for reading; wait while another process gives up a lease on it.

    Samba and NFS servers hold leases; see F_SETLEASE in fcntl(2). This never waits for the other
    end of a FIFO.

    Raises:
        OSError: an error of the kernel; ESTALE if it is not a regular file now.
    """
    flags |= os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except BlockingIOError:
        pass
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise changed()
        return os.open(f"/proc/self/fd/{found}", flags)
    finally:
        os.close(found)


def changed() -> OSError:
    """Return the error for a tree that was changed while it was read."""
    return OSError(errno.ESTALE, "the tree was changed while it was read")


UNOPENED = (errno.EAGAIN, errno.ENOKEY)
"""The errors of opening a file on which a process has a lease, or that is encrypted and locked."""


def unopened() -> OSError:
    """Return the error for a tree with files that cannot be opened now."""
    return BlockingIOError(
        errno.EAGAIN, "a process has a lease on a file, see /proc/locks, or a file is encrypted"
    )


@contextmanager
def unnamed_file(directory: int) -> Iterator[int | None]:
    """Open a temporary file without a name; yield None if the file system has none."""
    try:
        fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def reflink_works(directory: int) -> bool:
    """Tell whether files in ``directory`` can share data, by a try with two unnamed files."""
    with ExitStack() as stack:
        source = stack.enter_context(unnamed_file(directory))
        target = stack.enter_context(unnamed_file(directory))
        if source is None or target is None:
            return False  # every file system with reflink has unnamed files
        os.write(source, b"reflink")
        return linux.ficlone(source, target)
