"""A disk without a free block: calls are complete or undone, and reads and removals work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import ResourceExhausted
from snapd_native.snapshotter import Snapshotter
from tests.support.daemon_process import Notifications, start_daemon
from tests.support.engine import directories, open_engine, snapshot_names
from tests.support.file_systems import FileSystem, new_file_system
from tests.support.full_disk import (
    BTRFS_SIZE,
    MIB,
    SMALL_SIZES,
    check_reads,
    check_refused,
    fill_wal,
    free_space,
    leave_as_killed,
    populate_large,
    use_all_space,
)
from tests.support.kernel_mounts import mounted_on
from tests.support.service import (
    commit_snapshot,
    expect_error,
    run_daemon,
    snapshots_and_directories,
)
from tests.support.waiting import wait_until


@pytest.fixture(params=[*SMALL_SIZES, pytest.param("btrfs", marks=pytest.mark.long)])
def small_disk(request: pytest.FixtureRequest, loop_directory: Path) -> Iterator[FileSystem]:
    """Yield a small file system; on btrfs, overwriting a page needs free space, too."""
    with new_file_system(
        request.param, SMALL_SIZES.get(request.param, BTRFS_SIZE), loop_directory
    ) as made:
        yield made


only_where_pages_are_overwritten = pytest.mark.parametrize("small_disk", SMALL_SIZES, indirect=True)
"""For tests without any free block, in which only existing pages of the WAL can be written."""


def test_a_call_refused_on_a_full_disk_changes_nothing(
    small_disk: FileSystem, tmp_path: Path
) -> None:
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        use_all_space(small_disk.root)
        fill_wal(engine)
        many = {str(number): "x" * 4000 for number in range(250)}
        calls: dict[str, Callable[[], object]] = {
            "copy": lambda: engine.prepare("copy", "base 1"),
            "empty": lambda: engine.prepare("empty"),
            "view": lambda: engine.view("view", "base 1"),
            "update": lambda: engine.update("base 1", {"a": "b"}),
            "large update": lambda: engine.update("base 2", many),
            "mount": lambda: engine.mounter.mount("look", str(tmp_path)),
            "mount on a directory of its own": lambda: engine.mounter.mount("look"),
            "commit": lambda: engine.commit("done", "work"),
        }
        check_refused(engine, calls)
        assert mounted_on(tmp_path) is None
        free_space(small_disk.root)
        before = {*snapshot_names(engine)}
        for call in calls.values():
            call()
        assert {*snapshot_names(engine)} == before - {"work"} | {"copy", "empty", "view", "done"}
        for mounted_tree in engine.mounter.list_mounts():
            engine.mounter.unmount(mounted_tree.target)
        assert engine.upkeep.check() == []


def test_remove_works_on_a_full_disk_and_frees_space(small_disk: FileSystem) -> None:
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        use_all_space(small_disk.root)
        for _ in range(3):
            with pytest.raises(ResourceExhausted):
                engine.prepare("new", "base 1")
        for key in ("look", "work"):
            engine.remove(key)
        engine.upkeep.cleanup()
        for number in range(2):
            use_all_space(small_disk.root)
            engine.remove(f"base {number}")
            engine.upkeep.cleanup()
        engine.remove("base 2")
        engine.upkeep.cleanup()
        assert snapshot_names(engine) == ["base 3"]
        engine.prepare("new", "base 3")
        assert len(directories(engine)) == 2
        assert engine.upkeep.check() == []


@only_where_pages_are_overwritten
def test_every_snapshot_can_be_removed_while_others_take_the_freed_space(
    small_disk: FileSystem,
) -> None:
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        for number in range(20):
            engine.view(f"view {number}", "base 0")
        use_all_space(small_disk.root)
        fill_wal(engine)
        remove_all_snapshots(engine, small_disk.root)
        free_space(small_disk.root)
        populate_large(engine)
        assert engine.upkeep.check() == []


def remove_all_snapshots(engine: Snapshotter, root: Path) -> None:
    """Remove every snapshot; each time another program takes the freed space before the ballast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._state.ballast, "take", lambda: None)
        for info in sorted(engine.list(), key=lambda info: info.created, reverse=True):
            use_all_space(root)
            engine.remove(info.name)
            engine.upkeep.cleanup()
    assert snapshot_names(engine) == []
    assert directories(engine) == set()


@only_where_pages_are_overwritten
def test_a_full_disk_that_blocks_the_wal_checkpoint_loses_no_record(small_disk: FileSystem) -> None:
    """The WAL keeps its largest size, so many records fit into it on a full disk.

    Then the database has to grow, which fails.
    """
    long = {"long": "x" * 3000}
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        for number in range(200):
            engine.view(f"view {number}", "base 0", long)
        use_all_space(small_disk.root)
        added = []
        with suppress(ResourceExhausted):
            for number in count():
                engine.view(f"more {number}", "base 0", long)
                added.append(f"more {number}")
        assert len(added) > 10
        assert {*added} < {*snapshot_names(engine)}
        check_refused(engine, {"view": lambda: engine.view("view", "base 0", long)})
        before = engine.list()
    with open_engine(small_disk.root / "state") as engine:
        assert engine.list() == before
        remove_all_snapshots(engine, small_disk.root)


@pytest.mark.parametrize("killed", [False, True])
def test_start_works_on_a_full_disk(small_disk: FileSystem, killed: bool) -> None:
    """Start also works when SQLite recovers from a WAL and directories have to be deleted."""
    state = small_disk.root / "state"
    with open_engine(state) as engine:
        populate_large(engine)
    if killed:
        leave_as_killed(state)
    for _ in range(2):
        use_all_space(small_disk.root)
        with open_engine(state) as engine:
            check_reads(engine)
            wait_until(lambda: len(directories(engine)) == 5)
            assert engine.upkeep.check() == []
            assert engine.stat("work").labels == ({"killed": "after this"} if killed else {})
            assert ("last" in snapshot_names(engine)) is killed
    with open_engine(state) as engine:
        for key in (*["last"] * killed, "look", "work", "base 2", "base 1"):
            engine.remove(key)
        engine.upkeep.cleanup()
        engine.prepare("work", "base 0")


def test_unmount_works_on_a_full_disk(small_disk: FileSystem) -> None:
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        target = engine.mounter.mount("work")
        use_all_space(small_disk.root)
        fill_wal(engine)
        engine.mounter.unmount(target)
        engine.remove("work")
        assert engine.mounter.list_mounts() == []
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("small_disk", ["ext4"], indirect=True)
def test_remove_works_when_the_snapshots_directory_is_full(small_disk: FileSystem) -> None:
    snapshots = small_disk.root / "state" / "snapshots"
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        use_all_space(small_disk.root)
        with suppress(OSError):
            for number in count():
                os.mknod(snapshots / f"f{number}")
        with pytest.raises(OSError, match="No space left"):
            os.mknod(snapshots / "one")
        engine.remove("look")
        engine.remove("work")
        engine._reaper.catch_up(lambda *_: None)
        for path in snapshots.glob("f*"):
            path.unlink()
        assert len(directories(engine)) == 4
        assert engine.upkeep.check() == []


def test_the_first_start_on_a_full_disk_raises_resource_exhausted(small_disk: FileSystem) -> None:
    use_all_space(small_disk.root)
    for _ in range(2):
        with pytest.raises(ResourceExhausted, match="free"), open_engine(small_disk.root / "state"):
            pass
    free_space(small_disk.root)
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
        assert engine.upkeep.check() == []


def test_the_daemon_keeps_serving_on_a_full_disk(on_bus: str, small_disk: FileSystem) -> None:
    with run_daemon(on_bus, small_disk.root / "state") as service, BlockingClient() as client:
        base = commit_snapshot(client, "base", files={"file": "x" * MIB})
        client.view("look", "base")
        use_all_space(small_disk.root)
        with suppress(ResourceExhausted):
            while True:
                client.update("base", {"many": "x" * 1000})
        before = snapshots_and_directories(client, service)
        for _ in range(3):
            with expect_error(ResourceExhausted, '"work"', "free space"):
                client.prepare("work", "base")
            with expect_error(ResourceExhausted, '"empty"', "free space"):
                client.prepare("empty")
            with expect_error(ResourceExhausted, "metadata", "free"):
                client.view("view", "base")
        assert snapshots_and_directories(client, service) == before
        assert client.check() == []
        client.remove("look")
        free_space(small_disk.root)
        copy = Path(client.prepare("work", "base").source)
        assert (copy / "file").read_bytes() == (base / "file").read_bytes()
        client.commit("more", "work")
        assert client.check() == []


def test_watchdog_pings_continue_on_a_full_disk(
    on_bus: str, small_disk: FileSystem, notifications: Notifications
) -> None:
    with open_engine(small_disk.root / "state") as engine:
        populate_large(engine)
    (small_disk.root / "state-run").mkdir()
    use_all_space(small_disk.root)
    with start_daemon(
        on_bus, small_disk.root / "state", notifications, WATCHDOG_USEC="200000"
    ) as daemon:
        notifications.read_until("READY=1")
        use_all_space(small_disk.root)
        # After this many pings, the last ones were sent while the disk was full.
        for _ in range(20):
            assert notifications.read_until("WATCHDOG=1")[-1] == "WATCHDOG=1"
        daemon.terminate()
