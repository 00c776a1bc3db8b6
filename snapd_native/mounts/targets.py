"""Targets of mounts: a path is looked up once, and used as an open directory then."""

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
    """An open directory; its path may lead to something else by now."""

    fd: int
    path: str
    """The path, as the kernel writes it."""


def plain(path: str) -> str:
    """Remove ``.``, ``..`` and needless slashes from an absolute path.

    The result leads to the same directory, because `open_target` refuses symbolic links.
    """
    # POSIX permits a meaning for two slashes at the beginning; Linux has none.
    return "/" + posixpath.normpath(path).lstrip("/")


@contextmanager
def open_target(path: str, uid: int = 0) -> Iterator[Target]:
    """Open the target of a mount for the user ``uid``.

    Targets of other users that do not answer do not use up the threads for root.

    Raises:
        InvalidArgument: the path is relative, contains a symbolic link, or is not a directory.
        FailedPrecondition: a file system on the path does not answer.
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
