"""Standby clones: when they are made, taken by prepare, and dropped."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd_native.errors import InvalidArgument, NotFound
from snapd_native.model import STANDBY_LABEL, Change, Mount
from snapd_native.snapshotter import Snapshotter
from tests.support import torture_tree
from tests.support.descriptors import THIS_PROCESS, nothing_left_open
from tests.support.engine import directories, id_of, open_engine, read_files, write_files
from tests.support.file_systems import long_on_xfs
from tests.support.standby_clones import (
    commit_base,
    complete_clones,
    hold_standby_worker,
    request_clones,
    standby_worker_pid,
    wait_for_clones,
)
from tests.support.waiting import wait_until, wait_until_equal

pytestmark = long_on_xfs


def inode_of(mount: Mount) -> int:
    return Path(mount.source).stat().st_ino


def clone_inodes(engine: Snapshotter) -> list[int]:
    """Return the inodes of all complete clones, in the order in which they were made."""
    top = engine.state_directory / "snapshots"
    by_number = sorted(complete_clones(engine), key=lambda name: int(name.rpartition("-")[2]))
    return [(top / name).stat().st_ino for name in by_number]


def test_commit_with_the_label_makes_clones_that_prepare_takes_by_rename(
    engine: Snapshotter,
) -> None:
    commit_base(engine, 3)
    id_ = id_of(engine, "base")
    assert complete_clones(engine) == {f"ready-{id_}-{number}" for number in (1, 2, 3)}
    first, *_ = clone_inodes(engine)
    mount = engine.prepare("work", "base")
    assert inode_of(mount) == first
    assert Path(mount.source).name == id_of(engine, "work")
    assert read_files(mount) == {"file": "base"}
    assert engine.stat("work").parent == "base"
    wait_for_clones(engine, 3)
    assert complete_clones(engine) == {f"ready-{id_}-{number}" for number in (2, 3, 4)}


def test_update_of_the_label_makes_or_drops_clones(engine: Snapshotter) -> None:
    commit_base(engine, None)
    assert engine.standby("base") == (0, 0)
    assert complete_clones(engine) == set()
    for number in (2, 1, 3, 0):
        request_clones(engine, number)
        wait_for_clones(engine, number)
        assert len(complete_clones(engine)) == number
    request_clones(engine, 2)
    wait_for_clones(engine, 2)
    engine.update("base", {}, [f"labels.{STANDBY_LABEL}"])
    wait_for_clones(engine, 0)
    request_clones(engine, 1)
    wait_for_clones(engine, 1)
    engine.update("base", {"another": "label"})
    wait_for_clones(engine, 0)
    assert directories(engine) == {id_of(engine, "base")}


def test_only_a_committed_snapshot_with_the_label_has_clones(engine: Snapshotter) -> None:
    commit_base(engine, 1)
    engine.prepare("work", "base", {STANDBY_LABEL: "2"})
    engine.view("look", "base", {STANDBY_LABEL: "2"})
    engine.prepare("lone")
    assert engine.standby("work") == engine.standby("look") == engine.standby("lone") == (0, 0)
    engine.commit("done", "work")
    assert engine.standby("done") == (0, 0)
    wait_for_clones(engine, 1)
    id_ = id_of(engine, "base")
    assert all(name.startswith(f"ready-{id_}-") for name in complete_clones(engine))


def test_standby_of_an_unknown_name_raises_not_found(engine: Snapshotter) -> None:
    with pytest.raises(NotFound):
        engine.standby("base")
    with pytest.raises(InvalidArgument):
        engine.standby("")


def test_clones_do_not_show_in_list_usage_mounts_or_signals(state: Path) -> None:
    changes: list[Change] = []
    with open_engine(state, changes.append) as engine:
        commit_base(engine, None)
        engine.prepare("work", "base")

        def seen() -> list[object]:
            usages = [engine.usage(key) for key in ("base", "work")]
            return [[info.name for info in engine.list()], usages, engine.mounts("work")]

        before = seen()
        request_clones(engine, 3)
        count = len(changes)
        wait_for_clones(engine, 3)
        assert seen() == before
        standing = complete_clones(engine)
        engine.upkeep.cleanup()
        assert complete_clones(engine) == standing
        assert engine.standby("base") == (3, 3)
        for name in standing:
            with pytest.raises(NotFound):
                engine.stat(name)
        assert len(changes) == count


def test_remove_of_a_parent_deletes_its_clones(engine: Snapshotter) -> None:
    commit_base(engine, 3)
    engine.remove("base")
    engine.upkeep.cleanup()
    wait_until_equal(lambda: directories(engine), set())
    with pytest.raises(NotFound):
        engine.standby("base")


def test_a_taken_clone_is_an_exact_and_private_copy(engine: Snapshotter) -> None:
    root = Path(engine.prepare("preparing").source)
    torture_tree.build(root)
    engine.commit("base", "preparing", {STANDBY_LABEL: "2"})
    wait_for_clones(engine, 2)
    expected = clone_inodes(engine)
    with hold_standby_worker(engine):
        first = engine.prepare("first", "base")
        second = engine.prepare("second", "base")
    assert [inode_of(first), inode_of(second)] == expected
    assert torture_tree.differences(root, Path(first.source)) == ""
    data = Path(first.source) / "data" / "dense"
    with data.open("r+b") as file:
        file.write(b"another beginning")
    assert torture_tree.differences(root, Path(first.source)) != ""
    assert torture_tree.differences(root, Path(second.source)) == ""


def test_prepare_takes_the_oldest_clone_first(engine: Snapshotter) -> None:
    commit_base(engine, 2)
    for round_ in range(3):
        expected = clone_inodes(engine)
        with hold_standby_worker(engine):
            taken = [inode_of(engine.prepare(f"{round_} {key}", "base")) for key in "ab"]
            assert engine.standby("base") == (0, 2)
        assert taken == expected
        wait_for_clones(engine, 2)
        assert not set(clone_inodes(engine)) & set(taken)


def test_prepare_copies_the_parent_when_no_clone_is_left(engine: Snapshotter) -> None:
    commit_base(engine, 2)
    standing = set(clone_inodes(engine))
    with hold_standby_worker(engine):
        mounts = [engine.prepare(str(number), "base") for number in range(4)]
        assert [inode_of(mount) in standing for mount in mounts] == [True, True, False, False]
        assert all(read_files(mount) == {"file": "base"} for mount in mounts)
        write_files(mounts[0], file="changed")
        assert read_files(mounts[3]) == {"file": "base"}
    wait_for_clones(engine, 2)


def test_concurrent_prepares_take_each_clone_at_most_once(engine: Snapshotter) -> None:
    commit_base(engine, 8)
    standing = set(clone_inodes(engine))
    start = threading.Barrier(8)

    def prepare(number: int) -> Mount:
        start.wait()
        return engine.prepare(str(number), "base")

    with ThreadPoolExecutor(8) as pool:
        mounts = list(pool.map(prepare, range(24)))
    assert len({mount.source for mount in mounts}) == 24
    assert len({inode_of(mount) for mount in mounts}) == 24
    assert standing <= {inode_of(mount) for mount in mounts}
    for number, mount in enumerate(mounts):
        assert read_files(mount) == {"file": "base"}
        write_files(mount, file=str(number))
    assert [read_files(mount)["file"] for mount in mounts] == [str(number) for number in range(24)]
    wait_for_clones(engine, 8)


@pytest.mark.parametrize(
    "value", ["65", "-1", "+1", "1.5", "many", " 1", "1\n", "\u0661", "001", "1e1"]
)
def test_a_label_that_is_not_a_number_up_to_64_raises_invalid_argument(
    engine: Snapshotter, value: str
) -> None:
    commit_base(engine, 1)
    engine.prepare("work")
    labels = {"other": "label", STANDBY_LABEL: value}
    before = engine.list(), complete_clones(engine)
    for call in (
        lambda: engine.prepare("new", "base", labels),
        lambda: engine.view("new", "base", labels),
        lambda: engine.commit("done", "work", labels),
        lambda: engine.update("base", labels),
        lambda: engine.update("base", labels, ["labels.other", f"labels.{STANDBY_LABEL}"]),
    ):
        with pytest.raises(InvalidArgument, match=STANDBY_LABEL):
            call()
    assert (engine.list(), complete_clones(engine)) == before
    assert engine.standby("base") == (1, 1)


def test_a_parent_can_have_64_clones(engine: Snapshotter) -> None:
    commit_base(engine, 64)
    assert len(complete_clones(engine)) == 64


def test_each_parent_has_its_own_clones(engine: Snapshotter) -> None:
    commit_base(engine, 2)
    write_files(engine.prepare("preparing", "base"), file="next")
    engine.commit("next", "preparing", {STANDBY_LABEL: "1"})
    wait_for_clones(engine, 1, "next")
    wait_for_clones(engine, 2)
    assert read_files(engine.prepare("of next", "next")) == {"file": "next"}
    assert read_files(engine.prepare("of base", "base")) == {"file": "base"}


def test_complete_clones_survive_a_restart_and_are_used(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, 2)
        standing = clone_inodes(engine)
    with open_engine(state) as engine:
        assert engine.standby("base") == (2, 2)
        assert clone_inodes(engine) == standing
        taken = inode_of(engine.prepare("work", "base"))
        assert taken in standing
        wait_for_clones(engine, 2)
        assert set(clone_inodes(engine)) & set(standing) == set(standing) - {taken}


@pytest.mark.parametrize("how", ["label", "remove"])
def test_unwanted_clones_are_deleted_at_start(state: Path, how: str) -> None:
    with open_engine(state) as engine:
        commit_base(engine, 2)
        # Without this thread, the state is as after a kill right after the next call.
        engine._standby.close()
        if how == "label":
            engine.update("base", {})
        else:
            engine.remove("base")
        assert len(complete_clones(engine)) == 2
    with open_engine(state) as engine:
        left = {id_of(engine, "base")} if how == "label" else set()
        wait_until_equal(lambda: directories(engine), left)


def test_the_standby_state_of_a_removed_parent_is_forgotten(engine: Snapshotter) -> None:
    commit_base(engine, 1)
    engine.remove("base")
    wait_until(lambda: not directories(engine) and not engine._standby._ready)


def test_only_the_standby_worker_has_idle_priority(engine: Snapshotter) -> None:
    commit_base(engine, 1)
    standby = standby_worker_pid(engine)
    with hold_standby_worker(engine):
        for key in ("a", "b"):
            engine.prepare(key, "base")
        assert os.sched_getscheduler(standby) == os.SCHED_IDLE
    others = [worker.process.pid for worker in engine._workers._crew._idle]
    assert others
    assert {os.sched_getscheduler(pid) for pid in others} == {os.SCHED_OTHER}


def test_standby_clones_leak_no_descriptors_and_no_threads(state: Path) -> None:
    before = set(threading.enumerate())
    with nothing_left_open(THIS_PROCESS), open_engine(state) as engine:
        commit_base(engine, 2)

        def cycle() -> None:
            engine.prepare("work", "base")
            engine.remove("work")
            wait_for_clones(engine, 2)
            request_clones(engine, 1)
            wait_for_clones(engine, 1)
            request_clones(engine, 2)
            wait_for_clones(engine, 2)
            engine.upkeep.cleanup()

        cycle()
        threads = set(threading.enumerate())
        with nothing_left_open(THIS_PROCESS):
            for _ in range(20):
                cycle()
        assert set(threading.enumerate()) <= threads
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("filesystem", ["xfs"], indirect=True)
def test_clones_and_trees_from_before_a_quota_project_are_copied_and_deleted(
    engine: Snapshotter,
) -> None:
    """A directory whose project new files inherit accepts no rename from another project."""
    commit_base(engine, 2)
    old = clone_inodes(engine)
    engine.prepare("lone")
    top = engine.state_directory / "snapshots"
    subprocess.run(["chattr", "-p", "100", "+P", str(top)], check=True)
    for key in ("one", "two"):
        mount = engine.prepare(key, "base")
        assert inode_of(mount) not in old
        assert read_files(mount) == {"file": "base"}
    wait_for_clones(engine, 2)
    for key in ("one", "two", "lone", "base"):
        engine.remove(key)
    engine.upkeep.cleanup()
    wait_until(lambda: directories(engine) == set())
    assert engine.upkeep.check() == []
