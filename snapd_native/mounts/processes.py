"""Find the processes that use a mount, by their open and mapped files and their directories."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar

from snapd_native import linux
from snapd_native.mounts.table import Entry

SEARCH_SECONDS = 5.0
"""Seconds that a search of all processes may take, because a user can open a million files."""

_LINKS = ("cwd", "root", "exe")

_T = TypeVar("_T")


def users(entry: Entry, *, writing: bool = False) -> list[tuple[int, str]]:
    """Return the pid and name of each process that uses a mount.

    With ``writing``, only those that have a file of it open or mapped for writing. Processes that
    end meanwhile, or are not examined in `SEARCH_SECONDS`, are left out.
    """
    return _search(lambda process, end: _uses(process, entry.id, writing, end))


def writers(device: int) -> list[tuple[int, str]]:
    """Return the pid and name of each process that can still write to an immutable file.

    The process has opened or mapped the file before it became immutable. Only files of the file
    system ``device`` count. Left out are descriptors in a message of a socket, descriptors of a
    thread with its own table of descriptors, and the processes that `users` leaves out.
    """
    return _search(
        lambda process, end: any(_is_immutable(file, device) for file in _written(process, end))
    )


def _search(matches: Callable[[Path, float], bool]) -> list[tuple[int, str]]:
    """Return the pid and name of each process that matches; ``matches`` ends at the given time."""
    end = time.monotonic() + SEARCH_SECONDS
    found = []
    for process in _until(end, Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            if matches(process, end):
                found.append(_named(process))
    return sorted(found)


def _until(end: float, items: Iterable[_T]) -> Iterator[_T]:
    """Iterate over items until the time ``end``."""
    for item in items:
        if time.monotonic() > end:
            return
        yield item


def _written(process: Path, end: float) -> Iterator[Path]:
    """Iterate over links to the files that a process has open or mapped for writing."""
    for path in _until(end, (process / "fdinfo").iterdir()):
        with suppress(OSError):
            if _is_for_writing(path.read_text(errors="replace")):
                yield process / "fd" / path.name
    yield from _until(end, _mapped(process, "ws"))


def _is_immutable(link: Path, device: int) -> bool:
    # Other file systems are not accessed: they may not answer.
    with suppress(OSError), _opened(link) as fd:
        return linux.device(fd) == device and linux.is_immutable(fd)
    return False


def _uses(process: Path, mount: int, writing: bool, end: float) -> bool:
    """Tell whether a process has a file of a mount open or mapped, runs from it, or is in it."""
    for path in _until(end, (process / "fdinfo").iterdir()):
        with suppress(OSError):
            if _is_open_on(path.read_text(errors="replace"), mount, writing):
                return True
    links = [] if writing else [process / name for name in _LINKS]
    mapped = _mapped(process, "ws" if writing else "")
    return any(_is_on(link, mount) for link in _until(end, chain(links, mapped)))


def _is_open_on(fdinfo: str, mount: int, writing: bool) -> bool:
    """Tell whether a file is open on a mount; see proc_pid_fdinfo(5)."""
    if f"mnt_id:\t{mount}\n" not in fdinfo:
        return False
    return not writing or _is_for_writing(fdinfo)


def _is_for_writing(fdinfo: str) -> bool:
    flags = next(line for line in fdinfo.splitlines() if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


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
    with suppress(OSError), _opened(link) as fd:
        return linux.mount_id(fd) == mount
    return False


@contextmanager
def _opened(link: Path) -> Iterator[int]:
    fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
