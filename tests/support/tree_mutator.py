"""Changes trees as fast as it can until it is killed.

Run as ``python -m tests.support.tree_mutator TOP OUTSIDE SEED``.
It changes all trees in the directory TOP whose names do not begin with ``new-``: trees of snapshots
and trees that are being deleted. It makes symbolic links to OUTSIDE, but never accesses OUTSIDE.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MAX_FILE_SIZE = 300 << 10
"""The size in bytes at which a file stops growing."""


class Mutator:
    """Changes the contents of trees at random."""

    def __init__(self, top: Path, outside: Path, seed: int) -> None:
        self._top = top
        self._random = random.Random(seed)
        self._changes: list[Callable[[Path], object]] = [
            lambda path: path.symlink_to(outside / "secret"),
            lambda path: path.symlink_to(outside / "directory"),
            lambda path: path.symlink_to(outside / "fifo"),
            lambda path: path.symlink_to("/"),
            lambda path: path.symlink_to(".."),
            os.mkfifo,
            lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
            lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
            lambda path: path.mkdir(),
            lambda path: self._write(path, self._random.randrange(MAX_FILE_SIZE)),
            lambda path: self._write(path, 10),
        ]

    def run(self) -> None:
        """Change trees until the process is killed; print a line after the first change."""
        has_changed = False
        while True:
            with suppress(OSError):
                names = [name for name in os.listdir(self._top) if not name.startswith("new-")]
                tree = self._top / self._random.choice(names or ["none"])
                for _ in range(20):
                    with suppress(OSError):
                        self._change(tree)
                        if not has_changed:
                            has_changed = True
                            print("changed", flush=True)

    def _change(self, tree: Path) -> None:
        directory = tree / f"d{self._random.randrange(4)}" / f"d{self._random.randrange(4)}"
        path = directory / str(self._random.randrange(40))
        match self._random.randrange(8):
            case 0:
                self._truncate(path)
            case 1:
                self._write(path, 10_000)
            case 2:
                directory.rename(tree / f"d{self._random.randrange(4)}" / "moved")
            case 3:
                (tree / f"d{self._random.randrange(4)}" / "moved").rename(directory)
            case 4:
                name = self._random.choice(["user.a", "user.b"])
                if self._random.random() < 0.5:
                    os.setxattr(path, name, b"x" * 100, follow_symlinks=False)
                else:
                    os.removexattr(path, name, follow_symlinks=False)
            case 5:
                os.link(path, directory / str(self._random.randrange(40)), follow_symlinks=False)
            case _:
                self._replace(path)

    def _replace(self, path: Path) -> None:
        """Replace an entry by another one, at once or with a moment in which neither exists."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        new = path.parent / "next"
        with suppress(FileNotFoundError):
            new.unlink()
        self._random.choice(self._changes)(new)
        if self._random.random() < 0.3:
            path.unlink(missing_ok=True)
        new.rename(path)

    def _truncate(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.ftruncate(fd, self._random.randrange(MAX_FILE_SIZE))
        finally:
            os.close(fd)

    def _write(self, path: Path, size: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and os.fstat(fd).st_size < MAX_FILE_SIZE:
                os.write(fd, b"m" * size)
        finally:
            os.close(fd)


if __name__ == "__main__":
    Mutator(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).run()
