"""Where something is to be mounted: looked up once, and never by its path again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from snapd_native import linux
from snapd_native.errors import InvalidArgument
from snapd_native.model import quote_path

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_RULES = linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS


@dataclass(frozen=True, slots=True)
class Target:
    """A directory that is open, wherever its path leads by now."""

    fd: int
    path: str
    """As the kernel writes it."""


@contextmanager
def open_target(path: str) -> Iterator[Target]:
    """Open a directory for something to be mounted on it.

    Raises:
        InvalidArgument: the path is relative, leads over a symbolic link, or to no directory.
    """
    if not path.startswith("/"):
        raise InvalidArgument(f"the target {quote_path(path)} is relative: give its whole path")
    try:
        fd = linux.openat2(linux.AT_FDCWD, path, _FLAGS, _RULES)
    except OSError as error:
        raise _refusal(path, error) from None
    try:
        if not os.fstat(fd).st_nlink:
            raise InvalidArgument(f"the target {quote_path(path)} was deleted: make it again")
        yield Target(fd, os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def _refusal(path: str, error: OSError) -> InvalidArgument | OSError:
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
    return error
