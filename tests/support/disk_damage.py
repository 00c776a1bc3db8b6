"""Damage on a disk that the kernel does not see, because the page cache has the old contents."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQIIII")
_EXTENT = struct.Struct("=QQQ2QI3I")
_UNUSABLE = 0x2 | 0x8 | 0x80 | 0x200
"""FIEMAP_EXTENT_UNKNOWN, _ENCODED, _DATA_ENCRYPTED and _DATA_INLINE."""


def damage_on_disk(path: Path) -> None:
    """Change the first byte of a file on the disk; see fiemap in the kernel's documentation."""
    with path.open("rb") as file:
        device = os.fstat(file.fileno()).st_dev
        query = _HEADER.pack(0, 1 << 62, 1, 0, 1, 0) + bytes(_EXTENT.size)
        found = fcntl.ioctl(file, _FIEMAP, query)
    _, _, _, mapped, _, _ = _HEADER.unpack_from(found)
    _, physical, _, _, _, flags, *_ = _EXTENT.unpack_from(found, _HEADER.size)
    assert mapped == 1
    assert not flags & _UNUSABLE
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    disk = os.open(f"/dev/{name}", os.O_RDWR)
    try:
        (byte,) = os.pread(disk, 1, physical)
        os.pwrite(disk, bytes([byte ^ 1]), physical)
        os.fsync(disk)
    finally:
        os.close(disk)
