"""A disk without a free block: nothing is half done, reads go on, and Remove makes room."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native.errors import ResourceExhausted
from snapd_native.snapshotter import Snapshotter
from tests.engines import directories, names, opened, state_of
from tests.filesystems import FileSystem, mounted

MIB = 1 << 20

SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
"""xfs is not made smaller."""


@pytest.fixture(params=SIZES)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    with mounted(request.param, SIZES[request.param], tmp_path) as made:
        yield made


def use_up(root: Path) -> None:
    """Take the last byte and inode that root can get."""
    fd = os.open(root / "hog", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    os.write(fd, b"x" * size)
                    if size == MIB:
                        os.fsync(fd)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            os.sync()
    finally:
        os.close(fd)


def fill(engine: Snapshotter) -> None:
    for number in range(4):
        tree = Path(engine.prepare("preparing").source)
        (tree / "file").write_bytes(os.urandom(MIB))
        engine.commit(f"base {number}", "preparing")
    engine.prepare("work", "base 0")


def test_remove_makes_room(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
        use_up(small.root)
        before = state_of(engine)
        for _ in range(3):
            with pytest.raises(ResourceExhausted):
                engine.prepare("new", "base 1")
            with pytest.raises(ResourceExhausted):
                engine.prepare("empty")
        assert state_of(engine) == before
        assert engine.usage("base 1").size >= MIB
        assert len(engine.list()) == 5
        engine.remove("work")
        engine.cleanup()
        for number in range(2):
            use_up(small.root)
            engine.remove(f"base {number}")
            engine.cleanup()
        engine.remove("base 2")
        engine.cleanup()
        assert names(engine) == ["base 3"]
        engine.prepare("new", "base 3")
        assert len(directories(engine)) == 2
        assert engine.check() == []


def test_starting_without_room(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
    use_up(small.root)
    with opened(small.root / "state") as engine:
        assert engine.stat("work").parent == "base 0"
        for key in ("work", "base 2", "base 1"):
            engine.remove(key)
        engine.cleanup()
        engine.prepare("work", "base 0")


def test_unmounting_without_room(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
        target = engine.mount("work")
        use_up(small.root)
        engine.unmount(target)
        engine.remove("work")
        assert engine.list_mounts() == []


def test_a_state_directory_that_has_no_room_from_the_first_day(small: FileSystem) -> None:
    use_up(small.root)
    with pytest.raises(ResourceExhausted, match="free space"), opened(small.root / "state"):
        pass
