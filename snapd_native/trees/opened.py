"""Open trees without the mounts inside them."""

from __future__ import annotations

import errno
import os
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


def reflink_works(directory: int) -> bool:
    """Tell whether files in ``directory`` can share data, by a try with two unnamed files."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    with ExitStack() as stack:
        try:
            source = os.open(".", flags, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
                return False  # every file system with reflink has unnamed files
            raise
        stack.callback(os.close, source)
        target = os.open(".", flags, 0o600, dir_fd=directory)
        stack.callback(os.close, target)
        os.write(source, b"reflink")
        return linux.ficlone(source, target)
