"""The mounts of a mount namespace, as the kernel lists them; see proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from snapd_native import linux

_MOUNTINFO = Path("/proc/thread-self/mountinfo")
_HOST = Path("/proc/1/mountinfo")
_SYSTEMD = Path("/run/systemd/system")
"""Exists if systemd manages the host; see sd_booted(3)."""

_COLON = re.compile(r"(?<!\\):")
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory or file of a file system, independent of mounts."""

    device: str
    """The major and minor number of its file system."""
    path: str
    """The path from the root of the file system."""

    def __truediv__(self, name: str) -> Place:
        """Return the place of the entry ``name`` in this directory."""
        return Place(self.device, _joined(self.path, name))

    def holds(self, other: Place) -> bool:
        """Tell whether ``other`` is this place or below it."""
        return self.device == other.device and _is_within(other.path, self.path)


@dataclass(frozen=True, slots=True)
class Entry:
    """One mount."""

    id: int
    """The id of the mount. The kernel reuses it when the mount is gone."""
    parent: int
    root: Place
    """The directory or file that is mounted."""
    target: str
    """The path on which it is mounted."""
    read_only: bool
    propagates: bool = False
    """Whether it has peers, so that mounts on one also appear on the other."""
    layers: tuple[str, ...] = ()
    """The layers of an overlay, as given when it was mounted."""


class Table:
    """All mounts of a namespace at one moment."""

    def __init__(self, entries: dict[int, Entry]) -> None:
        self._entries = entries

    @classmethod
    def read(cls, path: Path = _MOUNTINFO) -> Self:
        """Read the table of this process, or of another."""
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Parse the contents of a mountinfo file."""
        return cls({entry.id: entry for entry in map(_entry, text.splitlines())})

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over all mounts; a mount comes after the one that it is on."""
        return iter(self._entries.values())

    def get(self, id_: int) -> Entry | None:
        """Return the mount with an id; None if it is gone."""
        return self._entries.get(id_)

    def place(self, fd: int) -> Place | None:
        """Return the place of the open directory ``fd``; None if its mount is not in the table."""
        entry = self._entries.get(linux.mount_id(fd))
        if entry is None:
            return None
        path = os.readlink(f"/proc/self/fd/{fd}")
        return Place(entry.root.device, _joined(entry.root.path, _relative(path, entry.target)))

    def overlays(self, place: Place) -> list[Entry]:
        """Return the overlays with a layer in ``place``.

        An overlay that was mounted with relative paths is not found, nor is a layer whose own mount
        is gone.
        """
        # Of several mounts on one directory the last hides the others.
        mounts = {entry.target: entry for entry in self}

        def is_within(path: str) -> bool:
            for directory in (path, *map(str, PurePosixPath(path).parents)):
                if entry := mounts.get(directory):
                    inside = _joined(entry.root.path, _relative(path, directory))
                    return place.holds(Place(entry.root.device, inside))
            return False

        return [entry for entry in self if any(map(is_within, entry.layers))]

    def showing(self, place: Place) -> list[Entry]:
        """Return the mounts of ``place`` and of places below it."""
        return [entry for entry in self if place.holds(entry.root)]

    def within(self, path: str) -> list[Entry]:
        """Return the mounts that are on ``path`` or below it."""
        return [entry for entry in self if _is_within(entry.target, path)]

    def covering(self, path: str) -> list[Entry]:
        """Return the mounts that hide the first mount on ``path``, or a part of that path."""
        entry = next((entry for entry in self if entry.target == path), None)
        way: set[int] = set()
        while entry and entry.id not in way:
            way.add(entry.id)
            entry = self._entries.get(entry.parent)
        return [
            other
            for other in self
            if way and other.id not in way and _is_within(path, other.target)
        ]

    def on(self, parent: Entry) -> list[Entry]:
        """Return the mounts on a mount."""
        return [entry for entry in self if entry.parent == parent.id]


def hidden_from_host() -> bool:
    """Tell whether systemd runs in another mount namespace than this process."""
    if not _SYSTEMD.is_dir():
        return False
    try:
        host = Table.read(_HOST)
    except OSError:
        return False
    # The id of a mount is unique, and a mount is in one namespace only.
    return {entry.id for entry in host}.isdisjoint(entry.id for entry in Table.read())


def _entry(line: bytes) -> Entry:
    mount, _, file_system = line.partition(b" - ")
    id_, parent, device, root, target, options, *peers = mount.split(b" ")
    return Entry(
        int(id_),
        int(parent),
        Place(device.decode(), _text(root)),
        _text(target),
        b"ro" in options.split(b","),
        any(peer.startswith((b"shared:", b"master:")) for peer in peers),
        _layers(file_system),
    )


def _layers(file_system: bytes) -> tuple[str, ...]:
    """Return the layers of an overlay."""
    kind, _, options = file_system.split(b" ", 2)
    if kind != b"overlay":
        return ()
    layers: list[str] = []
    for option in options.split(b","):
        name, _, value = option.partition(b"=")
        if name in (b"lowerdir", b"lowerdir+", b"datadir+"):
            # Between two colons are layers with data only.
            layers += [part.replace("\\:", ":") for part in _COLON.split(_text(value)) if part]
        elif name in (b"upperdir", b"workdir"):
            layers.append(_text(value))
    return tuple(layers)


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _relative(path: str, directory: str) -> str:
    return path[len(directory.rstrip("/")) :].lstrip("/")


def _joined(directory: str, relative: str) -> str:
    return f"{directory.rstrip('/')}/{relative}" if relative else directory
