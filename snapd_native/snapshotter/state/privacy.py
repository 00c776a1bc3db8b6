"""Directories that only the service's user can enter, and only one service uses."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from snapd_native import linux
from snapd_native.errors import FailedPrecondition

_FILES = ("metadata.db", "metadata.db-wal", "metadata.db-shm", "metadata.db.changes")

_LOCK_SECONDS = 2.0
"""How long a start waits for the end of a daemon that was killed."""


def own_directory(path: Path) -> int:
    """Open a directory of this user, or create it. The caller closes the fd.

    Raises:
        FailedPrecondition: another user owns it, or it is not a directory.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileExistsError, NotADirectoryError):
        raise FailedPrecondition(
            f"{path} is not a directory: remove it, or choose another for the service"
        ) from None
    owner = os.fstat(fd).st_uid
    if owner != os.geteuid():
        os.close(fd)
        raise FailedPrecondition(
            f"{path} belongs to uid {owner}: give it to uid {os.geteuid()},"
            " or choose another directory for the service"
        )
    return fd


def check_not_shared(path: Path, fd: int, ours: Collection[str]) -> None:
    """Refuse a directory that others can enter, unless it is the service's already.

    Raises:
        FailedPrecondition: others can enter it, and it has none of the files of the service.
    """
    held = os.listdir(fd)
    is_ours = not held or not set(ours).isdisjoint(held)
    if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077 and not is_ours:
        raise FailedPrecondition(
            f"{path} is not empty and open to others: choose one of its own for the service,"
            f" or chmod 700 {path}"
        )


def make_private(fd: int) -> None:
    """Deny all other users the directory and what will be created in it."""
    os.fchmod(fd, 0o700)
    # Every new snapshot would inherit a default ACL.
    with suppress(OSError):
        os.removexattr(fd, "system.posix_acl_default")


def open_to_others(state: int, snapshots: int) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yield what other users own or can access in the state directory.

    That is a name, a path that leads to the same file even if the name is given to another, and
    the status. The file is not opened: that could block, and closing it would end SQLite's locks.
    """
    for name in (".", "snapshots", *_FILES):
        with ExitStack() as stack, suppress(FileNotFoundError):
            # A symbolic link can lead to the two directories.
            fd = {".": state, "snapshots": snapshots}.get(name)
            if fd is None:
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=state)
                stack.callback(os.close, fd)
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                yield name, f"/proc/self/fd/{fd}", found


def close_runtime(path: Path) -> None:
    """Deny all other users the run directory, if it exists, and with it the mounts inside.

    Raises:
        FailedPrecondition: another user owns it, or it is shared with others.
    """
    for directory, ours in ((path, {"mounts"}), (path / "mounts", None)):
        if not os.path.lexists(directory):
            return
        fd = own_directory(directory)
        try:
            if ours is not None:
                check_not_shared(directory, fd, ours)
            make_private(fd)
        finally:
            os.close(fd)


def lock(directory: int) -> None:
    """Lock a directory; raise `BlockingIOError` if another process has locked it.

    If a daemon was killed while it started a worker, the process of the worker has the lock until
    it executes its program.
    """
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(_LOCK_SECONDS / 100)


def refuse_nfs(path: Path, directory: int) -> None:
    """Raise `FailedPrecondition` for a directory on NFS.

    In /proc/self/mountinfo, each mount of NFS has the root /, whatever directory it shows.
    """
    if linux.filesystem_type(directory).startswith("nfs"):
        raise FailedPrecondition(
            f"{path} is on NFS, where the kernel does not tell which directory is mounted:"
            " choose a --state-directory on a local disk"
        )
