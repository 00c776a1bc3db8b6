"""Copy a single entry that is not a directory, and the attributes of any entry."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from snapd_native import linux
from snapd_native.trees.opened import changed, link_target, open_file
from snapd_native.trees.walk import Report, allocated

CHUNK = 16 << 20
"""Bytes that one call copies at most, so that the copy of a large file can be stopped soon."""

_BUFFER = 1 << 20
"""Bytes that one call copies if the data passes through this process."""

_NOT_IN_KERNEL = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,  # an active swap file
    errno.EXDEV,
}
"""Errors of copy_file_range(2) after which read(2) and write(2) can still copy the data."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


class Copier:
    """Copies entries from one directory to another on the same file system.

    A new entry belongs to 0:0 at first, so the target directory must not pass on another group or
    an ACL. Calls that would change nothing are left out.
    """

    def __init__(self, report: Report, *, reflink: bool) -> None:
        """Share the data if ``reflink``. For a large file ``report`` is called during the copy.

        It is called for all chunks but the last, which the caller reports.
        """
        self._report = report
        self._reflink = reflink
        self._umask = _umask()

    def copy(self, source: int, target: int, name: str, status: os.stat_result) -> int:
        """Copy ``name`` from the directory ``source`` to ``target``, with all its attributes.

        Return the number of bytes that the caller has to report.
        """
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            return self._copy_file(source, target, name, status)
        if kind == stat.S_IFLNK:
            os.symlink(link_target(source, name), name, dir_fd=target)
        else:
            device = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
            os.mknod(name, kind | 0o600, device, dir_fd=target)
        _copy_unopened(source, target, name, status)
        return allocated(status)

    def make_directory(self, parent: int, name: str, status: os.stat_result) -> None:
        """Create the copy of a directory; `copy_attributes` sets its attributes."""
        # Without the setgid bit, with which new entries would inherit the group.
        os.mkdir(name, stat.S_IMODE(status.st_mode) & ~_SPECIAL, dir_fd=parent)

    def _copy_file(self, source: int, target: int, name: str, status: os.stat_result) -> int:
        rest = allocated(status)
        reader = open_file(source, name)
        try:
            mode = stat.S_IMODE(status.st_mode) & ~_SPECIAL
            writer = os.open(name, _CREATE, mode, dir_fd=target)
            try:
                if status.st_size and not (self._reflink and linux.ficlone(reader, writer)):
                    rest -= self._copy_data(reader, writer, status)
                self.copy_attributes(reader, writer, status)
            finally:
                os.close(writer)
        except OSError:
            if not stat.S_ISREG(os.fstat(reader).st_mode):
                raise changed() from None
            raise
        finally:
            os.close(reader)
        return rest

    def copy_attributes(self, source: int, target: int, status: os.stat_result) -> None:
        """Set the attributes of the open file or directory ``target``."""
        # The order matters to the kernel: chown drops setuid and file capabilities, and an access
        # ACL sets mode bits.
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid or status.st_gid:
            os.fchown(target, status.st_uid, status.st_gid)
        if mode & (_SPECIAL | self._umask):
            os.fchmod(target, mode)
        for attribute in os.listxattr(source):
            os.setxattr(target, attribute, os.getxattr(source, attribute))
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _copy_data(self, reader: int, writer: int, status: os.stat_result) -> int:
        """Copy the allocated parts of a file; a hole stays a hole.

        Return the number of bytes that were reported already.
        """
        size = status.st_size
        end = reported = 0
        while end < size:
            try:
                start = os.lseek(reader, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            end = os.lseek(reader, start, os.SEEK_HOLE)
            most = allocated(status) - reported
            reported += self._copy_range(reader, writer, start, end, most)
        if end < size:
            os.ftruncate(writer, size)
        return reported

    def _copy_range(self, reader: int, writer: int, start: int, end: int, most: int) -> int:
        """Copy a range, and report all chunks but the last, in all at most ``most`` bytes."""
        reported = 0
        while start < end:
            copied = _copy(reader, writer, start, min(end - start, CHUNK))
            if copied == 0:
                raise changed()  # The file has become shorter.
            start += copied
            if start < end:
                more = min(copied, most - reported)
                self._report(0, more)
                reported += more
        return reported


def _copy(reader: int, writer: int, offset: int, size: int) -> int:
    """Copy at most ``size`` bytes, inside the kernel if possible; return the number."""
    try:
        return os.copy_file_range(reader, writer, size, offset, offset)
    except OSError as error:
        if error.errno not in _NOT_IN_KERNEL:
            raise
    return os.pwrite(writer, os.pread(reader, min(size, _BUFFER), offset), offset)


def _copy_unopened(source: int, target: int, name: str, status: os.stat_result) -> None:
    """Set the attributes of an entry that cannot be opened."""
    if status.st_uid or status.st_gid:
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
    # The *xattrat calls need Linux 6.13: the directory's fd is reached as a path instead.
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


def _umask() -> int:
    # umask(2) cannot be read without a change that other threads would see.
    status = Path("/proc/self/status").read_text()
    return int(status.split("Umask:", 1)[1].split(maxsplit=1)[0], 8)
