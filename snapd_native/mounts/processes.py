"""What processes hold of mounts: open and mapped files, directories, and detached mounts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

from snapd_native import linux
from snapd_native.mounts.table import Entry

_LINKS = ("cwd", "root", "exe")
_RULES = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV


def users(entry: Entry, *, writing: bool = False) -> list[tuple[int, str]]:
    """Return the pid and name of each process that uses a mount; with ``writing``, writes to it.

    Processes that end meanwhile are left out.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if _uses(process, entry.id, writing):
                found.append(_named(process))
    return sorted(found)


class Unattached:
    """Makes the detached mounts of a tree read-only: processes hold them, no namespace has them.

    They come from OpenTree, until the caller attaches them, and from lazy unmounts, until no
    process uses them any more.
    """

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
                        writers.append(_named(process))
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
        # A process can make a shared mapping writable later, if it has opened the file for writing.
        for link in [*links, *_mapped(process, "s")]:
            with suppress(OSError):
                if (fd := _opened(link, tree, known)) is not None:
                    yield fd


def _opened(link: Path, tree: int, known: Collection[int]) -> int | None:
    # For a detached mount the path begins at the root of the mount, which is the tree.
    path = os.readlink(link).lstrip("/") or "."
    with ExitStack() as undo:
        there = linux.openat2(tree, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, _RULES)
        undo.callback(os.close, there)
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        with ExitStack() as unless_held:
            unless_held.callback(os.close, fd)
            if (
                linux.mount_id(fd) not in known
                and linux.device(fd) == os.fstat(there).st_dev
                and os.path.samestat(os.fstat(fd), os.fstat(there))
                and not os.fstatvfs(fd).f_flag & os.ST_RDONLY
            ):
                unless_held.pop_all()
                return fd
    return None


def _uses(process: Path, mount: int, writing: bool) -> bool:
    """Tell whether a process has a file of a mount open or mapped, runs from it, or is in it."""
    for path in (process / "fdinfo").iterdir():
        with suppress(OSError):
            if _is_open_on(path.read_text(errors="replace"), mount, writing):
                return True
    links = [] if writing else [process / name for name in _LINKS]
    return any(
        _is_on(link, mount) for link in chain(links, _mapped(process, "ws" if writing else ""))
    )


def _is_open_on(fdinfo: str, mount: int, writing: bool) -> bool:
    """Tell whether a file is open on a mount; see proc_pid_fdinfo(5)."""
    if f"mnt_id:\t{mount}\n" not in fdinfo:
        return False
    flags = next(line for line in fdinfo.splitlines() if line.startswith("flags:"))
    return not writing or int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _named(process: Path) -> tuple[int, str]:
    return int(process.name), (process / "comm").read_text(errors="replace").strip()


def _mapped(process: Path, rights: str = "") -> Iterator[Path]:
    """Iterate over links to the files that a process has mapped with all of ``rights``.

    A right is a letter of proc_pid_maps(5), such as ``s`` for a shared mapping.
    """
    for line in (process / "maps").read_text(errors="replace").splitlines():
        addresses, given, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0" and set(rights) <= set(given):
            # The name of the link has no leading zeros; see proc_pid_map_files(5).
            start, end = (f"{int(number, 16):x}" for number in addresses.split("-"))
            yield process / "map_files" / f"{start}-{end}"


def _is_on(link: Path, mount: int) -> bool:
    try:
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return linux.mount_id(fd) == mount
    finally:
        os.close(fd)
