"""Find the processes that use a mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from snapd_native import linux
from snapd_native.mounts.table import Entry

_LINKS = ("cwd", "root", "exe")


def users(entry: Entry, *, writing: bool = False) -> list[tuple[int, str]]:
    """Return the pid and name of each process that uses a mount; with ``writing``, writes to it.

    Processes that end meanwhile are left out.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                uses = _writes(process, entry.id) if writing else _uses(process, entry.id)
                if uses:
                    name = (process / "comm").read_text(errors="replace").strip()
                    found.append((int(process.name), name))
    return sorted(found)


def _uses(process: Path, mount: int) -> bool:
    """Tell whether a process has a file of a mount open or mapped, runs from it, or is in it."""
    if any(f"mnt_id:\t{mount}\n" in text for text in _descriptors(process)):
        return True
    return any(_is_on(link, mount) for link in _links(process))


def _writes(process: Path, mount: int) -> bool:
    for text in _descriptors(process):
        if f"mnt_id:\t{mount}\n" in text:
            flags = next(line for line in text.splitlines() if line.startswith("flags:"))
            if int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                return True
    return any(_is_on(link, mount) for link in mapped(process, writable=True))


def _descriptors(process: Path) -> Iterator[str]:
    """Iterate over the fdinfo of each open file of a process; see proc_pid_fdinfo(5)."""
    for path in (process / "fdinfo").iterdir():
        with suppress(OSError):
            yield path.read_text(errors="replace")


def _links(process: Path) -> Iterator[Path]:
    yield from (process / name for name in _LINKS)
    yield from mapped(process, writable=False)


def mapped(process: Path, *, writable: bool) -> Iterator[Path]:
    """Iterate over links to the files that a process has mapped; with ``writable``, for writing."""
    for line in (process / "maps").read_text(errors="replace").splitlines():
        addresses, rights, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0" and (not writable or (rights[1] == "w" and rights[3] == "s")):
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
