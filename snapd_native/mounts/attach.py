"""Making mounts and taking them away.

A mount is made detached, gets its attributes before any process can see it, and is then attached.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from snapd_native import linux
from snapd_native.mounts.bounded import bounded, open_path, open_path_here
from snapd_native.mounts.table import Entry

MOVED = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
"""Errors that mean that the path of a mount leads elsewhere by now."""

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
    """Attach a detached mount to an open directory.

    Raises:
        OSError: ENOENT if the directory was deleted, ENOSPC if there are too many mounts.
    """
    linux.move_mount(mount, target)
    # On a shared mount it has become shared.
    linux.mount_setattr(mount, 0, 0, linux.MS_PRIVATE, _RECURSIVE)


def detach(entry: Entry, *, lazy: bool = False) -> None:
    """Take a mount away, with what stands on it if ``lazy``.

    Raises:
        OSError: EBUSY if it is in use, ESTALE if another one has come over it, one of `MOVED` if
            its directory was moved; TimeoutError if its file system does not answer; it may
            still be unmounted when that answers.
    """
    # Where a file system on the way does not answer, this sees it before anything is changed.
    with _opened(entry):
        pass
    bounded(partial(_detach, entry, linux.MNT_DETACH if lazy else 0), of=_key(entry))


def _key(entry: Entry) -> tuple[int, str]:
    """Return what a mount is for `bounded`: its number alone may be given to another one."""
    return entry.id, entry.target


def _detach(entry: Entry, flags: int) -> None:
    parent, name = os.path.split(entry.target)
    directory = open_path_here(parent)
    try:
        # Nothing may hold the mount itself, so it is opened just to see that it is the right one.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        found = linux.mount_id(fd)
        os.close(fd)
        if found != entry.id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "umount2")
        linux.umount2(f"/proc/self/fd/{directory}/{name}", linux.UMOUNT_NOFOLLOW | flags)
    finally:
        os.close(directory)


def make_read_only(entry: Entry, read_only: bool = True, proc: int | None = None) -> None:
    """Make a mount read-only, or writable again, without those on it.

    A thread in another mount namespace gives its open ``proc``.

    Raises:
        OSError: EBUSY if a file is open for writing, ESTALE if another mount has come over it, one
            of `MOVED` if its directory was moved; TimeoutError if its file system does not answer.
    """
    with _opened(entry, proc) as fd:
        attribute = linux.MOUNT_ATTR_RDONLY
        linux.mount_setattr(fd, attribute if read_only else 0, 0 if read_only else attribute)


def restore(entry: Entry, *, read_only: bool) -> None:
    """Give a mount the attributes again that `detached` and `attach` gave it."""
    if entry.read_only != read_only:
        make_read_only(entry, read_only)
    with _opened(entry) as fd:
        linux.mount_setattr(fd, 0, 0, linux.MS_PRIVATE, _RECURSIVE)


@contextmanager
def _opened(entry: Entry, proc: int | None = None) -> Iterator[int]:
    fd = open_path(entry.target, of=_key(entry)) if proc is None else open_path_here(entry.target)
    try:
        if linux.mount_id(fd, proc) != entry.id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "mount_setattr")
        yield fd
    finally:
        os.close(fd)
