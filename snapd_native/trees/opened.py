"""Trees as they lie on their own file system."""

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

    The fd shows the file system of ``parent`` alone: it belongs to a detached, non-recursive clone
    of its mount. Mounts inside the tree or on it (tmpfs, bind mounts, also of single files) are not
    there, but the files that they hide are. Unless ``writable``, the clone is read-only. Reading
    changes no access times, and a device in the place of a file cannot be opened.
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
    """Tell whether files in ``directory`` can share data, by trying it on two unnamed files."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    with ExitStack() as stack:
        try:
            source = os.open(".", flags, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
                return False  # no file system with reflink lacks unnamed files
            raise
        stack.callback(os.close, source)
        target = os.open(".", flags, 0o600, dir_fd=directory)
        stack.callback(os.close, target)
        os.write(source, b"reflink")
        return linux.ficlone(source, target)
