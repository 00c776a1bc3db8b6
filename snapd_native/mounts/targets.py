"""Where something is to be mounted: looked up once, and never by its path again."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from snapd_native.errors import FailedPrecondition, InvalidArgument, SnapdError
from snapd_native.model import quote_path
from snapd_native.mounts.bounded import MOST, open_path


@dataclass(frozen=True, slots=True)
class Target:
    """A directory that is open, wherever its path leads by now."""

    fd: int
    path: str
    """As the kernel writes it."""


def plain(path: str) -> str:
    """Return the same absolute path without ``.``, ``..`` and doubled or closing slashes.

    It leads to the same directory, because `open_target` refuses symbolic links.
    """
    # POSIX lets two slashes at the beginning mean something; Linux does not.
    return "/" + posixpath.normpath(path).lstrip("/")


@contextmanager
def open_target(path: str, uid: int = 0) -> Iterator[Target]:
    """Open a directory for something to be mounted on it, for the user ``uid``.

    Targets of other users that do not answer never take a thread from root.

    Raises:
        InvalidArgument: the path is relative, leads over a symbolic link, or to no directory.
        FailedPrecondition: a file system on the way does not answer.
    """
    if not path.startswith("/"):
        raise InvalidArgument(f"the target {quote_path(path)} is relative: give its whole path")
    try:
        fd = open_path(path, os.O_DIRECTORY, of=("targets", uid == 0), most=MOST)
    except OSError as error:
        raise _refusal(path, error) from None
    try:
        yield Target(fd, os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def _refusal(path: str, error: OSError) -> SnapdError | OSError:
    shown = f"the target {quote_path(path)}"
    match error.errno:
        case errno.ELOOP:
            return InvalidArgument(f"{shown} leads over a symbolic link: give the real path")
        case errno.ENOENT:
            return InvalidArgument(f"{shown} does not exist: make that directory first")
        case errno.ENOTDIR:
            return InvalidArgument(f"{shown} is no directory: give one")
        case errno.ENAMETOOLONG:
            return InvalidArgument(f"{shown} is too long: give a shorter one")
        case errno.EACCES:
            return InvalidArgument(f"{shown} cannot be reached: let root search its directories")
        case errno.ETIMEDOUT:
            return FailedPrecondition(f"{shown} does not answer: its file system must first")
    return error
