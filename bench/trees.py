"""The trees that are copied: the same ones on every run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

SEED = 1
"""Of everything that is drawn by lot."""

_KIB = 1 << 10
_MIB = 1 << 20
_GIB = 1 << 30

_SOURCE = Path("/usr")
_LARGEST = 32 * _MIB
_ROOTFS_FILES = 15_000
_KERNEL_FILES = 60_000
_KERNEL_DEPTH = 6


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree to measure with.

    ``files`` and ``size`` (bytes on disk) are what it has at full scale, about. ``rounds`` is how
    often Prepare is measured on it at most, ``standby`` how often from a standby clone. ``make``
    fills an empty directory with a fraction of it.
    """

    name: str
    description: str
    files: int
    size: int
    rounds: int
    standby: int
    make: Callable[[Path, float], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a tree has: files of any type but directories, directories, bytes of data."""

    files: int
    directories: int
    size: int


def shape(root: Path) -> Shape:
    """Count what a tree has."""
    files = directories = size = 0
    for top, below, names in os.walk(root):
        directories += len(below)
        files += len(names)
        size += sum(os.lstat(f"{top}/{name}").st_size for name in names)
    return Shape(files, directories, size)


def scaled(number: int, scale: float) -> int:
    """Return a fraction of a number, but one at least."""
    return max(1, round(number * scale))


def _rootfs(root: Path, scale: float) -> None:
    for source in islice(_in_order(_SOURCE), scaled(_ROOTFS_FILES, scale)):
        target = root / source.relative_to(_SOURCE)
        if not target.parent.exists():
            _copy_directories(source.parent, target.parent)
        shutil.copy2(source, target, follow_symlinks=False)


def _in_order(top: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(top):
        below.sort()
        paths = (Path(directory, name) for name in sorted(names))
        yield from (path for path in paths if path.lstat().st_size <= _LARGEST)


def _copy_directories(source: Path, target: Path) -> None:
    if not target.parent.exists():
        _copy_directories(source.parent, target.parent)
    target.mkdir()
    shutil.copystat(source, target)


def _small(root: Path, scale: float, *, files: int, per_directory: int) -> None:
    content = _Content(8 * _KIB)
    for number in range(scaled(files, scale)):
        directory = root / f"{number // per_directory:03}"
        if number % per_directory == 0:
            directory.mkdir()
        content.write(directory / f"{number:06}", content.chance.randint(_KIB, 8 * _KIB))


def _kernel(root: Path, scale: float) -> None:
    content = _Content(_MIB)
    places, shallow = [root], [(root, 0)]
    for number in range(scaled(_KERNEL_FILES // 15, scale)):
        above, depth = content.chance.choice(shallow)
        directory = above / f"directory-{number:04}"
        directory.mkdir()
        places.append(directory)
        if depth + 1 < _KERNEL_DEPTH:
            shallow.append((directory, depth + 1))
    for number in range(scaled(_KERNEL_FILES, scale)):
        size = int(6 * _KIB * content.chance.lognormvariate(0, 1))
        path = content.chance.choice(places) / f"file-{number:05}.c"
        content.write(path, min(size, _MIB))


def _large(root: Path, scale: float) -> None:
    block = random.Random(SEED).randbytes(_MIB)
    for number in range(4):
        with open(root / f"image-{number}", "wb", buffering=0) as file:
            for _ in range(scaled(_GIB // _MIB, scale)):
                file.write(block)


class _Content:
    """Writes files with parts of one block of noise."""

    def __init__(self, largest: int) -> None:
        self.chance = random.Random(SEED)
        self._noise = memoryview(self.chance.randbytes(2 * largest))
        self._largest = largest

    def write(self, path: Path, size: int) -> None:
        start = self.chance.randrange(self._largest)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(descriptor, self._noise[start : start + size])
        finally:
            os.close(descriptor)


def _of_small(name: str, files: int, rounds: int, standby: int) -> Tree:
    return Tree(
        name,
        f"{files:,} files of 1 to 8 KiB, 1,000 in each directory",
        files=files,
        size=files * 6 * _KIB,
        rounds=rounds,
        standby=standby,
        make=partial(_small, files=files, per_directory=1000),
    )


ROOTFS = Tree(
    "rootfs",
    f"the first {_ROOTFS_FILES:,} files of {_SOURCE} in sorted order,"
    f" but those over {_LARGEST // _MIB} MiB",
    files=_ROOTFS_FILES,
    size=530_000_000,
    rounds=5,
    standby=3,
    make=_rootfs,
)
"""The tree on which the calls other than Prepare are measured."""

SMALL = _of_small("small", 100_000, rounds=3, standby=2)

WIDE = Tree(
    "wide",
    "20,000 files of 1 to 8 KiB in one directory",
    files=20_000,
    size=20_000 * 6 * _KIB,
    rounds=3,
    standby=0,
    make=partial(_small, files=20_000, per_directory=20_000),
)

LARGE = Tree(
    "large", "four files of 1 GiB", files=4, size=4 * _GIB, rounds=1, standby=0, make=_large
)

KERNEL = Tree(
    "kernel",
    f"the shape of the kernel's source: {_KERNEL_FILES:,} files, median 6 KiB, in"
    f" {_KERNEL_FILES // 15:,} directories up to {_KERNEL_DEPTH} deep",
    files=_KERNEL_FILES,
    size=700_000_000,
    rounds=3,
    standby=0,
    make=_kernel,
)

GROWTH = (_of_small("small-1k", 1000, 5, 5), _of_small("small-10k", 10_000, 3, 3), SMALL)
"""The curve of what more files cost."""

TREES: Mapping[str, Tree] = {tree.name: tree for tree in (ROOTFS, *GROWTH, WIDE, KERNEL, LARGE)}
"""All trees, in the order in which they are measured."""
