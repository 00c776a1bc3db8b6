"""Standby clones on small file systems: they leave free space and are not made repeatedly."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from snapd_native.snapshotter import Snapshotter, standby
from snapd_native.snapshotter.state import StateDirectory
from tests.support.engine import directories, identity, ignore, opened, read
from tests.support.file_systems import FileSystem, mounted
from tests.support.standby_clones import await_standby, based, clones, label, making
from tests.support.waiting import WAIT, becomes, eventually

MIB = 1 << 20

SIZES = {"ext4": 96 * MIB, "xfs": 320 * MIB}
"""The sizes of the file systems; mkfs.xfs makes no smaller ones."""


@pytest.fixture(params=SIZES)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    with mounted(request.param, SIZES[request.param], tmp_path) as made:
        yield made


class Looks:
    """A counter of the checks of the free space."""

    def __init__(self) -> None:
        self._count = 0
        self._more = threading.Condition()

    def add(self) -> None:
        """Count a check after which there is nothing to do."""
        with self._more:
            self._count += 1
            self._more.notify_all()

    def pass_while(self, condition: Callable[[], bool], count: int = 20) -> None:
        """Fail if ``condition`` does not hold after each of the next ``count`` checks."""
        for _ in range(count):
            with self._more:
                seen = self._count
                while self._count == seen:
                    assert self._more.wait(WAIT)
            assert condition()


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Make the service check the free space every 5 ms, and count the checks."""
    looks, real = Looks(), standby.Standby._take_a_step

    def step(self: standby.Standby) -> bool:
        more = real(self)
        if not more:
            looks.add()
        return more

    monkeypatch.setattr(standby, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(standby.Standby, "_take_a_step", step)
    return looks


@pytest.fixture
def makings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets an entry for each clone that is begun."""
    begun: list[str] = []
    real = StateDirectory.create_standby

    def create(state: StateDirectory, parent: int, number: int) -> str:
        begun.append(f"{parent}-{number}")
        return real(state, parent, number)

    monkeypatch.setattr(StateDirectory, "create_standby", create)
    return begun


def commit_tree(engine: Snapshotter, files: int = 64, size: int = 64 << 10) -> None:
    root = Path(engine.prepare("preparing").source)
    for number in range(files):
        (root / str(number)).write_bytes(os.urandom(size))
    engine.commit("base", "preparing")


def room(filesystem: FileSystem) -> float:
    """Return the share of the space that is free."""
    found = os.statvfs(filesystem.root)
    return found.f_bavail / found.f_blocks


def fill(filesystem: FileSystem, part: float, more: int = 0) -> Path:
    """Fill a file system until the share ``part`` and ``more`` bytes are free; return the file."""
    found = os.statvfs(filesystem.root)
    take = int(found.f_bavail - part * found.f_blocks) * found.f_frsize - more
    path = filesystem.root / "filling"
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), path.stat().st_size, take)
    return path


def only_base(engine: Snapshotter) -> Callable[[], bool]:
    left = {identity(engine, "base")}
    return lambda: directories(engine) == left


def test_clones_are_dropped_when_space_is_scarce_and_not_made_again(
    small: FileSystem, makings: list[str], looks: Looks
) -> None:
    with opened(small.root / "state") as engine:
        commit_tree(engine)
        label(engine, 3)
        await_standby(engine, 3)
        assert len(makings) == 3
        # Even without any clone, there is no space for one.
        fill(small, 0.05 if small.reflink else 0.005)
        eventually(only_base(engine))
        assert engine.standby("base") == (0, 3)
        label(engine, 2)
        looks.pass_while(lambda: clones(engine) == making(engine) == set())
        assert len(makings) == 3
        assert len(read_names(engine, "work")) == 64


def read_names(engine: Snapshotter, key: str) -> list[str]:
    return os.listdir(engine.prepare(key, "base").source)


def test_clones_are_made_again_when_space_is_free_again(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        commit_tree(engine)
        label(engine, 1)
        await_standby(engine, 1)
        filling = fill(small, 0.04)
        eventually(only_base(engine))
        filling.unlink()
        await_standby(engine, 1)


def test_clones_are_made_after_a_removal_frees_space(small: FileSystem, looks: Looks) -> None:
    with opened(small.root / "state") as engine:
        commit_tree(engine)
        root = Path(engine.prepare("large").source)
        fill(small, 0.04).rename(root / "large")
        label(engine, 1)
        looks.pass_while(lambda: engine.standby("base") == (0, 1))
        engine.remove("large")
        engine.upkeep.cleanup()
        await_standby(engine, 1)


@pytest.mark.parametrize("spare", [-64 << 10, 64 << 10, 3 * MIB, 5 * MIB, 9 * MIB])
def test_clones_are_not_made_and_dropped_repeatedly_at_the_space_limit(
    small: FileSystem, makings: list[str], spare: int, looks: Looks
) -> None:
    """There is space for no clone, for one or for two, but no clone is made again and again."""
    with opened(small.root / "state") as engine:
        commit_tree(engine)
        fill(small, 0.1, spare)
        label(engine, 4)
        there = max(spare, 0) // (4 * MIB + (64 << 10))
        if not small.reflink:
            becomes(lambda: engine.standby("base"), (there, 4))
        looks.pass_while(lambda: len(makings) <= 6)
        if not small.reflink:
            assert engine.standby("base") == (there, 4)


@pytest.mark.parametrize("spare", [64 << 10, 1 * MIB, 3 * MIB])
def test_clones_of_many_small_files_are_not_made_repeatedly(
    small: FileSystem, makings: list[str], spare: int, looks: Looks
) -> None:
    """A clone that shares its data still needs space for its inodes."""
    with opened(small.root / "state") as engine:
        commit_tree(engine, files=3000, size=10)
        fill(small, 0.1, spare)
        label(engine, 4)
        looks.pass_while(lambda: len(makings) <= 6)


def test_clones_of_many_hard_links_are_not_made_repeatedly(
    small: FileSystem, makings: list[str], looks: Looks
) -> None:
    """While a clone is made, it needs space for a table of its hard links."""
    with opened(small.root / "state") as engine:
        root = Path(engine.prepare("preparing").source)
        for number in range(3000):
            os.mknod(root / str(number))
            os.link(root / str(number), root / f"{number} too")
        engine.commit("base", "preparing")
        fill(small, 0.1, engine.usage("base").size + (32 << 10))
        label(engine, 1)
        looks.pass_while(lambda: len(makings) <= 3)


def test_clones_are_dropped_when_inodes_are_scarce(
    tmp_path: Path, makings: list[str], looks: Looks
) -> None:
    with (
        mounted("ext4", 64 * MIB, tmp_path) as small,
        opened(small.root / "state") as engine,
    ):
        commit_tree(engine, files=100, size=1)
        label(engine, 3)
        await_standby(engine, 3)
        found = os.statvfs(small.root)
        for number in range(int(found.f_favail - 0.05 * found.f_files)):
            os.mknod(small.root / str(number))
        eventually(only_base(engine))
        looks.pass_while(lambda: engine.standby("base") == (0, 3))
        assert len(makings) == 3
        for number in range(int(found.f_files * 0.1)):
            (small.root / str(number)).unlink()
        await_standby(engine, 3)


def test_clones_are_made_where_statvfs_reports_no_inodes(tmp_path: Path) -> None:
    """Btrfs creates inodes as needed and reports a total of 0; so does this tmpfs."""
    with unnumbered(tmp_path) as root:
        assert os.statvfs(root).f_files == 0
        with opened(root / "state") as engine:
            based(engine, 2)
            assert read(engine.prepare("work", "base")) == {"file": "base"}


@contextmanager
def unnumbered(path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "nr_inodes=0,size=64m", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_least_free_sets_the_free_space_that_clones_leave(small: FileSystem, looks: Looks) -> None:
    state = small.root / "state"
    with closing(Snapshotter(state, ignore, least_free=0.99)) as engine:
        commit_tree(engine, files=4, size=4096)
        label(engine, 1)
        looks.pass_while(lambda: engine.standby("base") == (0, 1))
    with closing(Snapshotter(state, ignore, least_free=0)) as engine:
        fill(small, 0.02)
        await_standby(engine, 1)
        assert room(small) < 0.1
