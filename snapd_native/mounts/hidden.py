"""Mounts of a tree that no mount namespace has, but a process: detached ones.

A mount from OpenTree is one until its caller attaches it, and so is one that was unmounted lazily,
until nobody uses it any more.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from snapd_native import linux
from snapd_native.mounts.users import mapped

_RULES = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV


class Hidden:
    """Makes the detached mounts of a tree read-only that processes hold."""

    def __init__(self) -> None:
        self._done: list[int] = []

    def close(self) -> None:
        """Leave all mounts as they are."""
        while self._done:
            os.close(self._done.pop())

    def freeze(self, tree: int, known: Collection[int]) -> list[tuple[int, str]]:
        """Make the writable ones of the open directory ``tree`` read-only; `thaw` undoes that.

        ``known`` are the numbers of the mounts that namespaces have. Return number and name of the
        processes that hold one which cannot be made read-only.
        """
        writers = []
        for process in Path("/proc").glob("[0-9]*"):
            for fd in _held(process, tree, known):
                try:
                    linux.mount_setattr(fd, linux.MOUNT_ATTR_RDONLY, 0)
                except OSError:
                    # If it stayed open, this process would be found to hold the mount too.
                    os.close(fd)
                    with suppress(OSError):
                        name = (process / "comm").read_text(errors="replace").strip()
                        writers.append((int(process.name), name))
                    break
                self._done.append(fd)
        return writers

    def thaw(self) -> None:
        """Make writable again what `freeze` has made read-only."""
        for fd in self._done:
            with suppress(OSError):
                linux.mount_setattr(fd, 0, linux.MOUNT_ATTR_RDONLY)


def _held(process: Path, tree: int, known: Collection[int]) -> Iterator[int]:
    """Open what a process has of a tree through a writable mount that is not ``known``.

    What the service has open itself of a tree that is committed is read-only. No other file system
    than the tree's is asked anything: it might not answer.
    """
    with suppress(OSError):
        links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
        for link in [*links, *mapped(process, writable=True)]:
            with suppress(OSError):
                if (fd := _opened(link, tree, known)) is not None:
                    yield fd


def _opened(link: Path, tree: int, known: Collection[int]) -> int | None:
    # The kernel knows the path from the mount's root only, and that is the tree's.
    path = os.readlink(link).lstrip("/") or "."
    there = linux.openat2(tree, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, _RULES)
    try:
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        if (
            linux.mount_id(fd) not in known
            and os.path.samestat(os.fstat(fd), os.fstat(there))
            and not os.fstatvfs(fd).f_flag & os.ST_RDONLY
        ):
            return fd
        os.close(fd)
    finally:
        os.close(there)
    return None
