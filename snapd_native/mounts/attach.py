"""Mount and unmount.

A mount is created detached and gets its attributes before it is attached, so that no process can
see it without them.
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
"""Errors which mean that the path of a mount leads to something else now."""

_RECURSIVE = linux.AT_EMPTY_PATH | linux.AT_RECURSIVE


def detached(directory: int, *, read_only: bool) -> int:
    """Return a detached mount of an open directory, with copies of the mounts inside.

    The propagation of all these mounts is private, and with ``read_only`` all are read-only. The
    mount ends when its fd is closed.
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
    # The target's mount is shared, and has made this one shared.
    linux.mount_setattr(mount, 0, 0, linux.MS_PRIVATE, _RECURSIVE)


def detach(entry: Entry, *, lazy: bool = False) -> None:
    """Unmount; with ``lazy`` also the mounts on it, and even if it is in use.

    Raises:
        OSError: EBUSY if it is in use, ESTALE if another mount covers it, one of `MOVED` if its
            directory was moved; TimeoutError if its file system does not answer. It can still be
            unmounted when that answers later.
    """
    # If a file system on the path does not answer, this fails before anything is changed.
    with _opened(entry):
        pass
    bounded(partial(_detach, entry, linux.MNT_DETACH if lazy else 0), of=_key(entry))


def _key(entry: Entry) -> tuple[int, str]:
    """Return what identifies a mount for `bounded`; the kernel can reuse the id alone."""
    return entry.id, entry.target


def _detach(entry: Entry, flags: int) -> None:
    parent, name = os.path.split(entry.target)
    directory = open_path_here(parent)
    try:
        # An open fd would keep the mount busy, so it is opened only to check its identity.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        found = linux.mount_id(fd)
        os.close(fd)
        if found != entry.id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "umount2")
        linux.umount2(f"/proc/self/fd/{directory}/{name}", linux.UMOUNT_NOFOLLOW | flags)
    finally:
        os.close(directory)


def make_read_only(entry: Entry, read_only: bool = True) -> None:
    """Make a mount read-only or writable, without the mounts on it.

    Raises:
        OSError: EBUSY if a file is open for writing, ESTALE if another mount covers it, one of
            `MOVED` if its directory was moved; TimeoutError if its file system does not answer.
    """
    with _opened(entry) as fd:
        attribute = linux.MOUNT_ATTR_RDONLY
        linux.mount_setattr(fd, attribute if read_only else 0, 0 if read_only else attribute)


def restore(entry: Entry, *, read_only: bool) -> None:
    """Restore the attributes that `detached` and `attach` have set."""
    if entry.read_only != read_only:
        make_read_only(entry, read_only)
    with _opened(entry) as fd:
        linux.mount_setattr(fd, 0, 0, linux.MS_PRIVATE, _RECURSIVE)


@contextmanager
def _opened(entry: Entry) -> Iterator[int]:
    fd = open_path(entry.target, of=_key(entry))
    try:
        if linux.mount_id(fd) != entry.id:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "mount_setattr")
        yield fd
    finally:
        os.close(fd)
