"""Files outside of trees that raise an alarm when a process accesses them; see inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRET = b"nothing of this may be in any tree\n"

_IN_ALL_EVENTS = 0x00000FFF
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def canary(path: Path) -> Iterator[Path]:
    """Yield a directory with a file, a directory and a FIFO that no process may open or change."""
    (path / "directory").mkdir(parents=True)
    for file in (path / "secret", path / "directory" / "secret"):
        file.write_bytes(SECRET)
    os.mkfifo(path / "fifo")
    watch = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watch >= 0
    try:
        for place in (path, path / "directory"):
            assert _libc.inotify_add_watch(watch, os.fsencode(place), _IN_ALL_EVENTS) >= 0
        yield path
        try:
            events = os.read(watch, 1 << 16)
        except BlockingIOError:
            events = b""
        assert _described(events) == []
    finally:
        os.close(watch)


def _described(events: bytes) -> list[str]:
    """Return the mask of each event, in hexadecimal, and the name of its file."""
    found = []
    while events:
        _, mask, _, length = struct.unpack_from("iIII", events)
        found.append(f"{mask:x} {events[16 : 16 + length].rstrip(bytes(1)).decode()}")
        events = events[16 + length :]
    return found


def contains_secret(tree: Path) -> bool:
    """Return whether a file in a tree contains the secret of the files outside."""
    for top, _, names in os.walk(tree):
        for name in names:
            fd = os.open(f"{top}/{name}", os.O_PATH | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_mode & 0o170000 == 0o100000:
                    with open(f"/proc/self/fd/{fd}", "rb") as file:
                        if SECRET in file.read(1 << 20):
                            return True
            finally:
                os.close(fd)
    return False
