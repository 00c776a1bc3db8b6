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
from tests.support.daemon_process import Notifications, started
from tests.support.engine import directories, names, opened
from tests.support.file_systems import FileSystem, mounted
from tests.support.full_disk import (
    BTRFS_SIZE,
    MIB,
    SIZES,
    check_reads,
    check_refused,
    fill,
    kill,
    make_room,
    use_up,
    use_up_wal,
)
from tests.support.kernel_mounts import mounted_on
from tests.support.service import committed, everything, refused, serving
from tests.support.waiting import eventually


@pytest.fixture(params=[*SIZES, pytest.param("btrfs", marks=pytest.mark.long)])
def small(request: pytest.FixtureRequest, loop_directory: Path) -> Iterator[FileSystem]:
    """Yield a small file system; on btrfs, overwriting a page needs free space, too."""
    with mounted(request.param, SIZES.get(request.param, BTRFS_SIZE), loop_directory) as made:
        yield made


overwriting = pytest.mark.parametrize("small", SIZES, indirect=True)
"""For tests without any free block, in which only existing pages of the WAL can be written."""


def test_a_call_refused_on_a_full_disk_changes_nothing(small: FileSystem, tmp_path: Path) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
        use_up(small.root)
        use_up_wal(engine)
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
        make_room(small.root)
        before = {*names(engine)}
        for call in calls.values():
            call()
        assert {*names(engine)} == before - {"work"} | {"copy", "empty", "view", "done"}
        for mounted_tree in engine.mounter.list_mounts():
            engine.mounter.unmount(mounted_tree.target)
        assert engine.upkeep.check() == []


def test_remove_works_on_a_full_disk_and_frees_space(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
        use_up(small.root)
        for _ in range(3):
            with pytest.raises(ResourceExhausted):
                engine.prepare("new", "base 1")
        for key in ("look", "work"):
            engine.remove(key)
        engine.upkeep.cleanup()
        for number in range(2):
            use_up(small.root)
            engine.remove(f"base {number}")
            engine.upkeep.cleanup()
        engine.remove("base 2")
        engine.upkeep.cleanup()
        assert names(engine) == ["base 3"]
        engine.prepare("new", "base 3")
        assert len(directories(engine)) == 2
        assert engine.upkeep.check() == []


@overwriting
def test_every_snapshot_can_be_removed_while_others_take_the_freed_space(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
        for number in range(20):
            engine.view(f"view {number}", "base 0")
        use_up(small.root)
        use_up_wal(engine)
        remove_all(engine, small.root)
        make_room(small.root)
        fill(engine)
        assert engine.upkeep.check() == []


def remove_all(engine: Snapshotter, root: Path) -> None:
    """Remove every snapshot; each time another program takes the freed space before the ballast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._state.ballast, "take", lambda: None)
        for info in sorted(engine.list(), key=lambda info: info.created, reverse=True):
            use_up(root)
            engine.remove(info.name)
            engine.upkeep.cleanup()
    assert names(engine) == []
    assert directories(engine) == set()


@overwriting
def test_a_full_disk_that_blocks_the_wal_checkpoint_loses_no_record(small: FileSystem) -> None:
    """The WAL keeps its largest size, so many records fit into it on a full disk.

    Then the database has to grow, which fails.
    """
    long = {"long": "x" * 3000}
    with opened(small.root / "state") as engine:
        fill(engine)
        for number in range(200):
            engine.view(f"view {number}", "base 0", long)
        use_up(small.root)
        added = []
        with suppress(ResourceExhausted):
            for number in count():
                engine.view(f"more {number}", "base 0", long)
                added.append(f"more {number}")
        assert len(added) > 10
        assert {*added} < {*names(engine)}
        check_refused(engine, {"view": lambda: engine.view("view", "base 0", long)})
        before = engine.list()
    with opened(small.root / "state") as engine:
        assert engine.list() == before
        remove_all(engine, small.root)


@pytest.mark.parametrize("killed", [False, True])
def test_start_works_on_a_full_disk(small: FileSystem, killed: bool) -> None:
    """Start also works when SQLite recovers from a WAL and directories have to be deleted."""
    state = small.root / "state"
    with opened(state) as engine:
        fill(engine)
    if killed:
        kill(state)
    for _ in range(2):
        use_up(small.root)
        with opened(state) as engine:
            check_reads(engine)
            eventually(lambda: len(directories(engine)) == 5)
            assert engine.upkeep.check() == []
            assert engine.stat("work").labels == ({"killed": "after this"} if killed else {})
            assert ("last" in names(engine)) is killed
    with opened(state) as engine:
        for key in (*["last"] * killed, "look", "work", "base 2", "base 1"):
            engine.remove(key)
        engine.upkeep.cleanup()
        engine.prepare("work", "base 0")


def test_unmount_works_on_a_full_disk(small: FileSystem) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
        target = engine.mounter.mount("work")
        use_up(small.root)
        use_up_wal(engine)
        engine.mounter.unmount(target)
        engine.remove("work")
        assert engine.mounter.list_mounts() == []
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("small", ["ext4"], indirect=True)
def test_remove_works_when_the_snapshots_directory_is_full(small: FileSystem) -> None:
    snapshots = small.root / "state" / "snapshots"
    with opened(small.root / "state") as engine:
        fill(engine)
        use_up(small.root)
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


def test_the_first_start_on_a_full_disk_raises_resource_exhausted(small: FileSystem) -> None:
    use_up(small.root)
    for _ in range(2):
        with pytest.raises(ResourceExhausted, match="free"), opened(small.root / "state"):
            pass
    make_room(small.root)
    with opened(small.root / "state") as engine:
        fill(engine)
        assert engine.upkeep.check() == []


def test_the_daemon_keeps_serving_on_a_full_disk(on_bus: str, small: FileSystem) -> None:
    with serving(on_bus, small.root / "state") as service, BlockingClient() as client:
        base = committed(client, "base", files={"file": "x" * MIB})
        client.view("look", "base")
        use_up(small.root)
        with suppress(ResourceExhausted):
            while True:
                client.update("base", {"many": "x" * 1000})
        before = everything(client, service)
        for _ in range(3):
            with refused(ResourceExhausted, '"work"', "free space"):
                client.prepare("work", "base")
            with refused(ResourceExhausted, '"empty"', "free space"):
                client.prepare("empty")
            with refused(ResourceExhausted, "metadata", "free"):
                client.view("view", "base")
        assert everything(client, service) == before
        assert client.check() == []
        client.remove("look")
        make_room(small.root)
        copy = Path(client.prepare("work", "base").source)
        assert (copy / "file").read_bytes() == (base / "file").read_bytes()
        client.commit("more", "work")
        assert client.check() == []


def test_watchdog_pings_continue_on_a_full_disk(
    on_bus: str, small: FileSystem, notifications: Notifications
) -> None:
    with opened(small.root / "state") as engine:
        fill(engine)
    (small.root / "state-run").mkdir()
    use_up(small.root)
    with started(on_bus, small.root / "state", notifications, WATCHDOG_USEC="600000") as daemon:
        notifications.until("READY=1")
        use_up(small.root)
        # So many that the last pings are sent when the disk is full.
        for _ in range(20):
            assert notifications.until("WATCHDOG=1")[-1] == "WATCHDOG=1"
        daemon.terminate()
