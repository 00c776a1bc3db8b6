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
from tests.support.engine import directories, id_of, ignore_change, open_engine, read_files
from tests.support.file_systems import FileSystem, new_file_system
from tests.support.standby_clones import (
    commit_base,
    complete_clones,
    incomplete_clones,
    request_clones,
    wait_for_clones,
)
from tests.support.waiting import WAIT_TIMEOUT, wait_until, wait_until_equal

MIB = 1 << 20

SIZES = {"ext4": 96 * MIB, "xfs": 320 * MIB}
"""The sizes of the file systems; mkfs.xfs makes no smaller ones."""


@pytest.fixture(params=SIZES)
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    with new_file_system(request.param, SIZES[request.param], tmp_path) as made:
        yield made


class SpaceChecks:
    """A counter of the checks of the free space."""

    def __init__(self) -> None:
        self._count = 0
        self._more = threading.Condition()

    def add(self) -> None:
        """Count a check that finds no clone to make or to delete."""
        with self._more:
            self._count += 1
            self._more.notify_all()

    def pass_while(self, condition: Callable[[], bool], count: int = 20) -> None:
        """Fail if ``condition`` does not hold after each of the next ``count`` checks."""
        for _ in range(count):
            with self._more:
                seen = self._count
                while self._count == seen:
                    assert self._more.wait(WAIT_TIMEOUT)
            assert condition()


@pytest.fixture(autouse=True)
def space_checks(monkeypatch: pytest.MonkeyPatch) -> SpaceChecks:
    """Make the service check the free space every 5 ms, and count the checks."""
    space_checks, real = SpaceChecks(), standby.Standby._take_a_step

    def step(self: standby.Standby) -> bool:
        more = real(self)
        if not more:
            space_checks.add()
        return more

    monkeypatch.setattr(standby, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(standby.Standby, "_take_a_step", step)
    return space_checks


@pytest.fixture
def begun_clones(monkeypatch: pytest.MonkeyPatch) -> list[str]:
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


def free_share(filesystem: FileSystem) -> float:
    """Return the share of the space that is free."""
    found = os.statvfs(filesystem.root)
    return found.f_bavail / found.f_blocks


def fill_until(filesystem: FileSystem, part: float, more: int = 0) -> Path:
    """Fill a file system until the share ``part`` and ``more`` bytes are free; return the file."""
    found = os.statvfs(filesystem.root)
    take = int(found.f_bavail - part * found.f_blocks) * found.f_frsize - more
    path = filesystem.root / "filling"
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), path.stat().st_size, take)
    return path


def has_only_base(engine: Snapshotter) -> Callable[[], bool]:
    left = {id_of(engine, "base")}
    return lambda: directories(engine) == left


def test_clones_are_dropped_when_space_is_scarce_and_not_made_again(
    small_disk: FileSystem, begun_clones: list[str], space_checks: SpaceChecks
) -> None:
    with open_engine(small_disk.root / "state") as engine:
        commit_tree(engine)
        request_clones(engine, 3)
        wait_for_clones(engine, 3)
        assert len(begun_clones) == 3
        # Even without any clone, there is no space for one.
        fill_until(small_disk, 0.05 if small_disk.reflink else 0.005)
        wait_until(has_only_base(engine))
        assert engine.standby("base") == (0, 3)
        request_clones(engine, 2)
        space_checks.pass_while(
            lambda: complete_clones(engine) == incomplete_clones(engine) == set()
        )
        assert len(begun_clones) == 3
        assert len(read_names(engine, "work")) == 64


def read_names(engine: Snapshotter, key: str) -> list[str]:
    return os.listdir(engine.prepare(key, "base").source)


def test_clones_are_made_again_when_space_is_free_again(small_disk: FileSystem) -> None:
    with open_engine(small_disk.root / "state") as engine:
        commit_tree(engine)
        request_clones(engine, 1)
        wait_for_clones(engine, 1)
        filling = fill_until(small_disk, 0.04)
        wait_until(has_only_base(engine))
        filling.unlink()
        wait_for_clones(engine, 1)


def test_clones_are_made_after_a_removal_frees_space(
    small_disk: FileSystem, space_checks: SpaceChecks
) -> None:
    with open_engine(small_disk.root / "state") as engine:
        commit_tree(engine)
        root = Path(engine.prepare("large").source)
        fill_until(small_disk, 0.04).rename(root / "large")
        request_clones(engine, 1)
        space_checks.pass_while(lambda: engine.standby("base") == (0, 1))
        engine.remove("large")
        engine.upkeep.cleanup()
        wait_for_clones(engine, 1)


@pytest.mark.parametrize("spare", [-64 << 10, 64 << 10, 3 * MIB, 5 * MIB, 9 * MIB])
def test_clones_are_not_made_and_dropped_repeatedly_at_the_space_limit(
    small_disk: FileSystem, begun_clones: list[str], spare: int, space_checks: SpaceChecks
) -> None:
    """There is space for no clone, for one or for two, but no clone is made again and again."""
    with open_engine(small_disk.root / "state") as engine:
        commit_tree(engine)
        fill_until(small_disk, 0.1, spare)
        request_clones(engine, 4)
        there = max(spare, 0) // (4 * MIB + (64 << 10))
        if not small_disk.reflink:
            wait_until_equal(lambda: engine.standby("base"), (there, 4))
        space_checks.pass_while(lambda: len(begun_clones) <= 6)
        if not small_disk.reflink:
            assert engine.standby("base") == (there, 4)


@pytest.mark.parametrize("spare", [64 << 10, 1 * MIB, 3 * MIB])
def test_clones_of_many_small_files_are_not_made_repeatedly(
    small_disk: FileSystem, begun_clones: list[str], spare: int, space_checks: SpaceChecks
) -> None:
    """A clone that shares its data still needs space for its inodes."""
    with open_engine(small_disk.root / "state") as engine:
        commit_tree(engine, files=3000, size=10)
        fill_until(small_disk, 0.1, spare)
        request_clones(engine, 4)
        space_checks.pass_while(lambda: len(begun_clones) <= 6)


def test_clones_of_many_hard_links_are_not_made_repeatedly(
    small_disk: FileSystem, begun_clones: list[str], space_checks: SpaceChecks
) -> None:
    """While a clone is made, it needs space for a table of its hard links."""
    with open_engine(small_disk.root / "state") as engine:
        root = Path(engine.prepare("preparing").source)
        for number in range(3000):
            os.mknod(root / str(number))
            os.link(root / str(number), root / f"{number} too")
        engine.commit("base", "preparing")
        fill_until(small_disk, 0.1, engine.usage("base").size + (32 << 10))
        request_clones(engine, 1)
        space_checks.pass_while(lambda: len(begun_clones) <= 3)


def test_clones_are_dropped_when_inodes_are_scarce(
    tmp_path: Path, begun_clones: list[str], space_checks: SpaceChecks
) -> None:
    with (
        new_file_system("ext4", 64 * MIB, tmp_path) as small_disk,
        open_engine(small_disk.root / "state") as engine,
    ):
        commit_tree(engine, files=100, size=1)
        request_clones(engine, 3)
        wait_for_clones(engine, 3)
        found = os.statvfs(small_disk.root)
        for number in range(int(found.f_favail - 0.05 * found.f_files)):
            os.mknod(small_disk.root / str(number))
        wait_until(has_only_base(engine))
        space_checks.pass_while(lambda: engine.standby("base") == (0, 3))
        assert len(begun_clones) == 3
        for number in range(int(found.f_files * 0.1)):
            (small_disk.root / str(number)).unlink()
        wait_for_clones(engine, 3)


def test_clones_are_made_where_statvfs_reports_no_inodes(tmp_path: Path) -> None:
    """Btrfs creates inodes as needed and reports a total of 0; so does this tmpfs."""
    with tmpfs_without_inode_count(tmp_path) as root:
        assert os.statvfs(root).f_files == 0
        with open_engine(root / "state") as engine:
            commit_base(engine, 2)
            assert read_files(engine.prepare("work", "base")) == {"file": "base"}


@contextmanager
def tmpfs_without_inode_count(path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "nr_inodes=0,size=64m", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_least_free_sets_the_free_space_that_clones_leave(
    small_disk: FileSystem, space_checks: SpaceChecks
) -> None:
    state = small_disk.root / "state"
    with closing(Snapshotter(state, ignore_change, least_free=0.99)) as engine:
        commit_tree(engine, files=4, size=4096)
        request_clones(engine, 1)
        space_checks.pass_while(lambda: engine.standby("base") == (0, 1))
    with closing(Snapshotter(state, ignore_change, least_free=0)) as engine:
        fill_until(small_disk, 0.02)
        wait_for_clones(engine, 1)
        assert free_share(small_disk) < 0.1
