"""What is mounted in this mount name space; see proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from snapd_native import linux

_MOUNTINFO = Path("/proc/thread-self/mountinfo")
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory or file as the kernel knows it, wherever it is mounted."""

    device: str
    """Major and minor number of its file system."""
    path: str
    """From the file system's root."""

    def __truediv__(self, name: str) -> Place:
        """Return what is called ``name`` in this directory."""
        return Place(self.device, _joined(self.path, name))

    def holds(self, other: Place) -> bool:
        """Tell whether ``other`` is the same or lies within."""
        return self.device == other.device and _is_within(other.path, self.path)


@dataclass(frozen=True, slots=True)
class Entry:
    """One mount."""

    id: int
    """Its number among all mounts that there are; it is given again when the mount is gone."""
    parent: int
    root: Place
    """What of its file system it shows."""
    target: str
    """Where it is."""
    read_only: bool


class Table:
    """All mounts at one moment."""

    def __init__(self, entries: dict[int, Entry]) -> None:
        self._entries = entries

    @classmethod
    def read(cls, path: Path = _MOUNTINFO) -> Self:
        """Read the table of this process, or another one's."""
        with path.open("rb") as lines:
            return cls({entry.id: entry for entry in map(_entry, lines)})

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over all mounts, those on others after them."""
        return iter(self._entries.values())

    def get(self, id_: int) -> Entry | None:
        """Return the mount with a number; None if it is gone."""
        return self._entries.get(id_)

    def place(self, fd: int) -> Place | None:
        """Return what the open directory ``fd`` is; None if its mount is not listed."""
        entry = self._entries.get(linux.mount_id(fd))
        if entry is None:
            return None
        path = os.readlink(f"/proc/self/fd/{fd}")
        return Place(entry.root.device, _joined(entry.root.path, _relative(path, entry.target)))

    def showing(self, place: Place) -> list[Entry]:
        """Return the mounts that show ``place`` or something within it, and nothing else."""
        return [entry for entry in self if place.holds(entry.root)]

    def within(self, path: str) -> list[Entry]:
        """Return the mounts that are on ``path`` or below it."""
        return [entry for entry in self if _is_within(entry.target, path)]

    def on(self, parent: Entry) -> list[Entry]:
        """Return the mounts that stand on a mount."""
        return [entry for entry in self if entry.parent == parent.id]


def _entry(line: bytes) -> Entry:
    id_, parent, device, root, target, options, *_ = line.split(b" ")
    return Entry(
        int(id_),
        int(parent),
        Place(device.decode(), _text(root)),
        _text(target),
        b"ro" in options.split(b","),
    )


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _relative(path: str, directory: str) -> str:
    return path[len(directory.rstrip("/")) :].lstrip("/")


def _joined(directory: str, relative: str) -> str:
    return f"{directory.rstrip('/')}/{relative}" if relative else directory
