"""Copying one thing that is not a directory, and the attributes of anything."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from snapd_native import linux

CHUNK = 64 << 20
"""Bytes copied by one call at most, so that a copy can be stopped inside a large file."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_entry(
    source: int,
    target: int,
    name: str,
    status: os.stat_result,
    step: Callable[[int], None],
    *,
    reflink: bool,
) -> None:
    """Copy ``name`` from the directory ``source`` to ``target``, with all its attributes."""
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        _copy_file(source, target, name, status, step, reflink=reflink)
        return
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        device = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        os.mknod(name, kind | 0o600, device, dir_fd=target)
    _copy_entry_attributes(source, target, name, status)
    step(0)


def copy_attributes(source: int, target: int, status: os.stat_result) -> None:
    """Give the open file or directory ``target`` all attributes of ``source``.

    The order matters to the kernel: chown drops setuid and file capabilities, an access ACL sets
    mode bits, and everything but utimensat touches no times that we set.
    """
    if (status.st_uid, status.st_gid) != (0, 0):
        os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for attribute in os.listxattr(source):
        os.setxattr(target, attribute, os.getxattr(source, attribute))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_entry_attributes(source: int, target: int, name: str, status: os.stat_result) -> None:
    if (status.st_uid, status.st_gid) != (0, 0):
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
    # A symbolic link or a device cannot be opened for its attributes, and the *xattrat calls
    # need Linux 6.13: the directory's fd is reached as a path instead.
    there, here = f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}"
    for attribute in os.listxattr(there, follow_symlinks=False):
        value = os.getxattr(there, attribute, follow_symlinks=False)
        os.setxattr(here, attribute, value, follow_symlinks=False)
    os.utime(
        name,
        ns=(status.st_atime_ns, status.st_mtime_ns),
        dir_fd=target,
        follow_symlinks=False,
    )


def _copy_file(
    source: int,
    target: int,
    name: str,
    status: os.stat_result,
    step: Callable[[int], None],
    *,
    reflink: bool,
) -> None:
    reader = os.open(name, _READ, dir_fd=source)
    try:
        writer = os.open(name, _CREATE, 0o600, dir_fd=target)
        try:
            if not (reflink and status.st_size and linux.ficlone(reader, writer)):
                _copy_data(reader, writer, status, step)
            copy_attributes(reader, writer, status)
        finally:
            os.close(writer)
    finally:
        os.close(reader)
    step(status.st_blocks * 512)


def _copy_data(
    reader: int, writer: int, status: os.stat_result, step: Callable[[int], None]
) -> None:
    """Copy what is allocated and leave out what is not: a hole stays a hole."""
    size = status.st_size
    position = 0
    while position < size:
        try:
            start = os.lseek(reader, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(reader, start, os.SEEK_HOLE)
        _copy_range(reader, writer, start, end, step)
        position = end
    if position == 0 or os.fstat(writer).st_size < size:
        os.ftruncate(writer, size)


def _copy_range(
    reader: int, writer: int, start: int, end: int, step: Callable[[int], None]
) -> None:
    while start < end:
        step(0)
        copied = os.copy_file_range(reader, writer, min(end - start, CHUNK), start, start)
        if copied == 0:
            raise OSError(errno.EIO, "a file became shorter while it was copied")
        start += copied
