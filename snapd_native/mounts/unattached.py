"""Detached mounts of a tree: processes hold them, and no mount namespace contains them.

They come from OpenTree, until the caller attaches them, and from lazy unmounts, until no process
uses them any more.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from snapd_native import linux
from snapd_native.mounts.users import mapped

_RULES = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV


class Unattached:
    """Makes the detached mounts of a tree read-only."""

    def __init__(self) -> None:
        self._done: list[int] = []

    def close(self) -> None:
        """Leave all mounts as they are."""
        while self._done:
            os.close(self._done.pop())

    def freeze(self, tree: int, known: Collection[int]) -> list[tuple[int, str]]:
        """Make the writable mounts of the open directory ``tree`` read-only; `thaw` undoes that.

        ``known`` are the ids of the mounts in namespaces. Return the pid and the name of each
        process that holds a mount which cannot be made read-only.
        """
        writers = []
        for process in Path("/proc").glob("[0-9]*"):
            for fd in _held(process, tree, known):
                try:
                    linux.mount_setattr(fd, linux.MOUNT_ATTR_RDONLY, 0)
                except OSError:
                    # With the fd open, this process would hold the mount too.
                    os.close(fd)
                    with suppress(OSError):
                        name = (process / "comm").read_text(errors="replace").strip()
                        writers.append((int(process.name), name))
                    break
                self._done.append(fd)
        return writers

    def thaw(self) -> None:
        """Undo `freeze`."""
        for fd in self._done:
            with suppress(OSError):
                linux.mount_setattr(fd, 0, linux.MOUNT_ATTR_RDONLY)


def _held(process: Path, tree: int, known: Collection[int]) -> Iterator[int]:
    """Open the files of a tree that a process holds through a writable mount not in ``known``.

    Other file systems than that of the tree are not accessed: they may not answer.
    """
    with suppress(OSError):
        links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
        for link in [*links, *mapped(process, writable=True)]:
            with suppress(OSError):
                if (fd := _opened(link, tree, known)) is not None:
                    yield fd


def _opened(link: Path, tree: int, known: Collection[int]) -> int | None:
    # For a detached mount the path begins at the root of the mount, which is the tree.
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
