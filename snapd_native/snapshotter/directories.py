"""Directories of the service, closed to all other users."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from snapd_native.errors import FailedPrecondition


def own_directory(path: Path) -> int:
    """Open a directory that belongs to this user; it is made if there is none.

    The fd is the caller's.

    Raises:
        FailedPrecondition: it belongs to somebody else, or is no directory.
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
    """Refuse a directory that others may enter and that holds none of what is the service's.

    Raises:
        FailedPrecondition: it is such a one.
    """
    held = os.listdir(fd)
    is_ours = not held or not set(ours).isdisjoint(held)
    if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077 and not is_ours:
        raise FailedPrecondition(
            f"{path} is not empty and open to others: choose one of its own for the service,"
            f" or chmod 700 {path}"
        )


def make_private(fd: int) -> None:
    """Close a directory, and all that will be in it, to all other users."""
    os.fchmod(fd, 0o700)
    # A default ACL would reach into every new snapshot.
    with suppress(OSError):
        os.removexattr(fd, "system.posix_acl_default")


def close_runtime(path: Path) -> None:
    """See to it that nobody else reaches what is mounted in the run directory, if there is one.

    Raises:
        FailedPrecondition: it belongs to somebody else, or is shared with others.
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
