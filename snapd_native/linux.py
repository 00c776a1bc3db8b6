"""System calls that Python lacks.

Constants are named as in the kernel's headers. All functions raise `OSError` on failure.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
AT_RECURSIVE = 0x8000
STATX_DIOALIGN = 0x2000
STATX_ATTR_IMMUTABLE = 0x10
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
MS_PRIVATE = 1 << 18
MOVE_MOUNT_F_EMPTY_PATH = 0x00000004
MOVE_MOUNT_T_EMPTY_PATH = 0x00000040
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOUNT_ATTR_RDONLY = 0x00000001
MOUNT_ATTR_NODEV = 0x00000004
MOUNT_ATTR_NOATIME = 0x00000010
MOUNT_ATTR__ATIME = 0x00000070

FICLONE = 0x40049409
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
FS_APPEND_FL = 0x00000020
FS_IMMUTABLE_FL = 0x00000010

# The numbers are the same on every architecture, because the calls are newer than the unified
# system call table (Linux 5.1).
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def _syscall(what: str, number: int, *arguments: int | bytes) -> int:
    """Make a system call that the C library lacks."""
    words = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    return _checked(_libc.syscall(ctypes.c_long(number), *words), what)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Open a mount, or with OPEN_TREE_CLONE a detached copy of it; Linux 5.2."""
    return _syscall("open_tree", _SYS_OPEN_TREE, dirfd, os.fsencode(path), flags)


def mount_setattr(
    fd: int, attr_set: int, attr_clr: int, propagation: int = 0, flags: int = AT_EMPTY_PATH
) -> None:
    """Set and clear MOUNT_ATTR_* of the mount ``fd``; Linux 5.12.

    With AT_RECURSIVE in ``flags`` this includes the mounts on it, either all or none.
    """
    attr = struct.pack("=QQQQ", attr_set, attr_clr, propagation, 0)
    _syscall("mount_setattr", _SYS_MOUNT_SETATTR, fd, b"", flags, attr, len(attr))


def has_mount_setattr() -> bool:
    """Tell whether the kernel has `mount_setattr`, the newest of the calls that are needed."""
    try:
        mount_setattr(-1, 0, 0)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def may_mount() -> bool:
    """Tell whether the process has CAP_SYS_ADMIN over its mounts, and no filter of system calls."""
    try:
        os.close(open_tree(AT_FDCWD, "/", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def move_mount(source: int, target: int) -> None:
    """Attach the detached mount ``source`` to the directory ``target``; Linux 5.2."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _syscall("move_mount", _SYS_MOVE_MOUNT, source, b"", target, b"", flags)


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """Open ``path`` with the flags RESOLVE_*; Linux 5.6."""
    how = struct.pack("=QQQ", flags, 0, resolve)
    return _syscall("openat2", _SYS_OPENAT2, dirfd, os.fsencode(path), how, len(how))


def umount2(path: str, flags: int) -> None:
    """Detach what is mounted on ``path``."""
    _checked(_libc.umount2(os.fsencode(path), flags), "umount2")


def mount_id(fd: int) -> int:
    """Return the id of the mount of ``fd``, as in /proc/self/mountinfo."""
    with open(f"/proc/self/fdinfo/{fd}") as fdinfo:
        return next(int(line.split()[1]) for line in fdinfo if line.startswith("mnt_id:"))


def device(fd: int) -> int:
    """Return the device of the file system of ``fd``, which is not accessed: it may not answer."""
    major, minor = struct.unpack_from("=2I", _statx(fd, AT_STATX_DONT_SYNC, 0), 136)
    return os.makedev(major, minor)


def has_direct_io(fd: int) -> bool | None:
    """Tell whether O_DIRECT of a file reads past the page cache; None before Linux 6.1.

    A file system can accept the flag and ignore it, as ext4 does with data=journal.
    """
    found = _statx(fd, 0, STATX_DIOALIGN)
    (mask,) = struct.unpack_from("=I", found)
    (alignment,) = struct.unpack_from("=I", found, 156)
    return bool(alignment) if mask & STATX_DIOALIGN else None


def _statx(fd: int, flags: int, mask: int, name: str = "") -> bytes:
    """Return the struct statx of an open file, or of an entry in it; Linux 4.11."""
    found = ctypes.create_string_buffer(256)
    _checked(
        _libc.statx(
            ctypes.c_int(fd),
            ctypes.c_char_p(os.fsencode(name)),
            ctypes.c_int(AT_EMPTY_PATH | flags),
            ctypes.c_uint(mask),
            found,
        ),
        "statx",
    )
    return found.raw


def is_uninterruptible(thread: int) -> bool:
    """Tell whether a thread of this process waits in state D; see proc_pid_stat(5)."""
    try:
        with open(f"/proc/self/task/{thread}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "D"
    except FileNotFoundError:
        return False


def syncfs(fd: int) -> None:
    """Write the whole file system of ``fd`` to disk; reports write-back errors since 5.8."""
    _checked(_libc.syncfs(fd), "syncfs")


def ficlone(source: int, target: int) -> bool:
    """Share all data of the open file ``source`` with ``target``; False if that is impossible.

    See ioctl_ficlone(2). Errors that a copy of the data would meet too are raised.
    """
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        # ETXTBSY: one of them is an active swap file.
        cannot = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ETXTBSY)
        if error.errno in cannot:
            return False
        raise
    return True


def join_project(fd: int, directory: int) -> None:
    """Give an open directory the quota project of another; see quotactl(2).

    If new files inherit the project of ``directory``, a file of another project cannot be renamed
    into it (EXDEV).
    """
    # struct fsxattr: the project is the fourth number.
    project, attributes = bytearray(28), bytearray(28)
    fcntl.ioctl(directory, FS_IOC_FSGETXATTR, project)
    fcntl.ioctl(fd, FS_IOC_FSGETXATTR, attributes)
    attributes[12:16] = project[12:16]
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, attributes)


def change_flags(fd: int, *, to_set: int = 0, to_clear: int = 0) -> bool:
    """Set and clear FS_*_FL of an open file; return whether they were different.

    See FS_IOC_SETFLAGS in ioctl_iflags(2).
    """
    buffer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, buffer)
    (old,) = struct.unpack_from("=I", buffer)
    new = (old | to_set) & ~to_clear
    if new == old:
        return False
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", new))
    return True


def is_immutable(fd: int, name: str = "") -> bool:
    """Tell whether an open file, also one with O_PATH, has the flag immutable.

    With a name, tell that of the entry in the open directory, which is not opened.
    """
    found = _statx(fd, AT_SYMLINK_NOFOLLOW | AT_STATX_DONT_SYNC, 0, name)
    (attributes,) = struct.unpack_from("=Q", found, 8)
    return bool(attributes & STATX_ATTR_IMMUTABLE)


def is_written(fd: int) -> bool:
    """Tell whether anybody has a regular file open or mapped for writing; needs CAP_LEASE.

    The kernel counts that for each inode, and refuses a read lease then; see F_SETLEASE in
    fcntl(2). ``fd`` is open for reading, and the lease ends when it is closed. False on a file
    system without leases.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return False


def boot_id() -> str:
    """Return the id of this boot of the kernel; see random(4)."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def boot(soft_reboots: int) -> str:
    """Return an id of the time since the last start of user space."""
    return f"{boot_id()} {soft_reboots}" if soft_reboots else boot_id()


def mounting_id(fd: int) -> str:
    """Return an id of the time since the file system of ``fd`` was mounted first.

    A mounted ext4 or xfs has a directory in /sys, with an inode number that is unique during a
    boot. For other file systems the id is that of the boot.
    """
    device = os.fstat(fd).st_dev
    try:
        block = os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        found = os.stat(f"/sys/fs/{filesystem_type(fd)}/{os.path.basename(block)}")
    except FileNotFoundError:
        return boot_id()
    return f"{boot_id()} {found.st_ino}"


def filesystem_type(fd: int) -> str:
    """Return the type of the file system of ``fd``, as in /proc/self/mountinfo."""
    mount = str(mount_id(fd))
    with open("/proc/self/mountinfo", errors="surrogateescape") as mountinfo:
        for line in mountinfo:
            if line.split(" ", 1)[0] == mount:
                return line.split(" - ", 1)[1].split(" ", 1)[0]
    return "unknown"
