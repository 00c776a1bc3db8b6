"""Making mounts and taking them away.

A mount is made detached, given its attributes where nobody can see it, and attached then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from snapd_native import linux
from snapd_native.mounts.table import Entry

MOVED = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
"""What the kernel says where a mount's path leads elsewhere by now."""

_RECURSIVE = linux.AT_EMPTY_PATH | linux.AT_RECURSIVE


def detached(directory: int, *, read_only: bool) -> int:
    """Return a mount of an open directory, with all that is mounted in it, that is nowhere yet.

    Its mounts tell others nothing of what is mounted in them, and nobody tells them; they are
    read-only, all of them, if ``read_only``. It is gone when its fd is closed.
    """
    fd = linux.open_tree(
        directory,
        "",
        linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC | _RECURSIVE,
    )
    try:
        attributes = linux.MOUNT_ATTR_RDONLY if read_only else 0
        linux.mount_setattr(fd, attributes, 0, linux.MS_PRIVATE, _RECURSIVE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach(mount: int, target: int) -> None:
    """Attach a detached mount to an open directory."""
    linux.move_mount(mount, target)
    # On a shared mount it has become shared.
    linux.mount_setattr(mount, 0, 0, linux.MS_PRIVATE, _RECURSIVE)


def detach(entry: Entry, *, lazy: bool = False) -> None:
    """Take a mount away, with what stands on it if ``lazy``.

    Raises:
        OSError: EBUSY if it is in use, ESTALE if another one has come over it, one of `MOVED` if
            its directory was moved.
    """
    flags = linux.UMOUNT_NOFOLLOW | (linux.MNT_DETACH if lazy else 0)
    parent, name = os.path.split(entry.target)
    rules = linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
    directory = linux.openat2(linux.AT_FDCWD, parent, os.O_PATH | os.O_CLOEXEC, rules)
    try:
        # Nothing may hold the mount itself, so it is opened just to see that it is the right one.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        found = linux.mount_id(fd)
        os.close(fd)
        if found != entry.id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "umount2")
        linux.umount2(f"/proc/self/fd/{directory}/{name}", flags)
    finally:
        os.close(directory)


def make_read_only(entry: Entry, read_only: bool = True) -> None:
    """Make a mount read-only, or writable again, without those on it.

    Raises:
        OSError: EBUSY if a file is open for writing, ESTALE if another mount has come over it, one
            of `MOVED` if its directory was moved.
    """
    with _opened(entry) as fd:
        attribute = linux.MOUNT_ATTR_RDONLY
        linux.mount_setattr(fd, attribute if read_only else 0, 0 if read_only else attribute)


def restore(entry: Entry, *, read_only: bool) -> None:
    """Give a mount the attributes again that `detached` and `attach` gave it."""
    if entry.read_only != read_only:
        make_read_only(entry, read_only)
    with _opened(entry) as fd:
        linux.mount_setattr(fd, 0, 0, linux.MS_PRIVATE, _RECURSIVE)


@contextmanager
def _opened(entry: Entry) -> Iterator[int]:
    rules = linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
    fd = linux.openat2(linux.AT_FDCWD, entry.target, os.O_PATH | os.O_CLOEXEC, rules)
    try:
        if linux.mount_id(fd) != entry.id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "mount_setattr")
        yield fd
    finally:
        os.close(fd)
