"""Standby clones: when they are made, taken and dropped, and who notices."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from snapd_native.errors import InvalidArgument, NotFound
from snapd_native.model import STANDBY_LABEL, Change, Mount
from snapd_native.snapshotter import Snapshotter
from tests import torture
from tests.engines import directories, identity, opened, read, write
from tests.standbys import await_standby, based, clones, frozen, idle_worker, label
from tests.waiting import eventually


def inode(mount: Mount) -> int:
    return Path(mount.source).stat().st_ino


def fds() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def inodes(engine: Snapshotter) -> list[int]:
    """Tell the inodes of all complete clones, in the order in which they were made."""
    top = engine.state_directory / "snapshots"
    by_number = sorted(clones(engine), key=lambda name: int(name.rpartition("-")[2]))
    return [(top / name).stat().st_ino for name in by_number]


def test_a_label_at_commit_has_clones_made_and_prepare_takes_them_by_rename(
    engine: Snapshotter,
) -> None:
    based(engine, 3)
    id_ = identity(engine, "base")
    assert clones(engine) == {f"ready-{id_}-{number}" for number in (1, 2, 3)}
    first, *_ = inodes(engine)
    mount = engine.prepare("work", "base")
    assert inode(mount) == first
    assert Path(mount.source).name == identity(engine, "work")
    assert read(mount) == {"file": "base"}
    assert engine.stat("work").parent == "base"
    await_standby(engine, 3)
    assert clones(engine) == {f"ready-{id_}-{number}" for number in (2, 3, 4)}


def test_a_label_by_update_counts_from_that_moment_on(engine: Snapshotter) -> None:
    based(engine, None)
    assert engine.standby("base") == (0, 0)
    assert clones(engine) == set()
    for number in (2, 1, 3, 0):
        label(engine, number)
        await_standby(engine, number)
        assert len(clones(engine)) == number
    label(engine, 2)
    await_standby(engine, 2)
    engine.update("base", {}, [f"labels.{STANDBY_LABEL}"])
    await_standby(engine, 0)
    label(engine, 1)
    await_standby(engine, 1)
    engine.update("base", {"another": "label"})
    await_standby(engine, 0)
    assert directories(engine) == {identity(engine, "base")}


def test_what_has_no_label_has_no_clones(engine: Snapshotter) -> None:
    based(engine, 1)
    engine.prepare("work", "base", {STANDBY_LABEL: "2"})
    engine.view("look", "base", {STANDBY_LABEL: "2"})
    engine.prepare("lone")
    assert engine.standby("work") == engine.standby("look") == engine.standby("lone") == (0, 0)
    engine.commit("done", "work")
    assert engine.standby("done") == (0, 0)
    await_standby(engine, 1)
    id_ = identity(engine, "base")
    assert all(name.startswith(f"ready-{id_}-") for name in clones(engine))


def test_standby_of_what_is_not_there_is_refused(engine: Snapshotter) -> None:
    with pytest.raises(NotFound):
        engine.standby("base")
    with pytest.raises(InvalidArgument):
        engine.standby("")


def test_nobody_sees_clones(state: Path) -> None:
    changes: list[Change] = []
    with opened(state, changes.append) as engine:
        based(engine, None)
        engine.prepare("work", "base")

        def seen() -> list[object]:
            usages = [engine.usage(key) for key in ("base", "work")]
            return [[info.name for info in engine.list()], usages, engine.mounts("work")]

        before = seen()
        label(engine, 3)
        told = len(changes)
        await_standby(engine, 3)
        assert seen() == before
        standing = clones(engine)
        engine.upkeep.cleanup()
        assert clones(engine) == standing
        assert engine.standby("base") == (3, 3)
        for name in standing:
            with pytest.raises(NotFound):
                engine.stat(name)
        assert len(changes) == told


def test_a_parent_with_clones_is_removed_with_them(engine: Snapshotter) -> None:
    based(engine, 3)
    engine.remove("base")
    engine.upkeep.cleanup()
    eventually(lambda: directories(engine) == set())
    with pytest.raises(NotFound):
        engine.standby("base")


def test_the_clone_taken_is_faithful_and_private(engine: Snapshotter) -> None:
    root = Path(engine.prepare("preparing").source)
    torture.build(root)
    engine.commit("base", "preparing", {STANDBY_LABEL: "2"})
    await_standby(engine, 2)
    expected = inodes(engine)
    with frozen(engine):
        first = engine.prepare("first", "base")
        second = engine.prepare("second", "base")
    assert [inode(first), inode(second)] == expected
    assert torture.differences(root, Path(first.source)) == ""
    data = Path(first.source) / "data" / "dense"
    with data.open("r+b") as file:
        file.write(b"another beginning")
    assert torture.differences(root, Path(first.source)) != ""
    assert torture.differences(root, Path(second.source)) == ""


def test_clones_are_taken_in_the_order_they_were_made(engine: Snapshotter) -> None:
    based(engine, 2)
    for round_ in range(3):
        expected = inodes(engine)
        with frozen(engine):
            taken = [inode(engine.prepare(f"{round_} {key}", "base")) for key in "ab"]
            assert engine.standby("base") == (0, 2)
        assert taken == expected
        await_standby(engine, 2)
        assert not set(inodes(engine)) & set(taken)


def test_when_clones_are_used_up_prepare_copies_as_usual(engine: Snapshotter) -> None:
    based(engine, 2)
    standing = set(inodes(engine))
    with frozen(engine):
        mounts = [engine.prepare(str(number), "base") for number in range(4)]
        assert [inode(mount) in standing for mount in mounts] == [True, True, False, False]
        assert all(read(mount) == {"file": "base"} for mount in mounts)
        write(mounts[0], file="changed")
        assert read(mounts[3]) == {"file": "base"}
    await_standby(engine, 2)


def test_many_prepares_at_once_take_each_clone_at_most_once(engine: Snapshotter) -> None:
    based(engine, 8)
    standing = set(inodes(engine))
    start = threading.Barrier(8)

    def prepare(number: int) -> Mount:
        start.wait()
        return engine.prepare(str(number), "base")

    with ThreadPoolExecutor(8) as pool:
        mounts = list(pool.map(prepare, range(24)))
    assert len({mount.source for mount in mounts}) == 24
    assert len({inode(mount) for mount in mounts}) == 24
    assert standing <= {inode(mount) for mount in mounts}
    for number, mount in enumerate(mounts):
        assert read(mount) == {"file": "base"}
        write(mount, file=str(number))
    assert [read(mount)["file"] for mount in mounts] == [str(number) for number in range(24)]
    await_standby(engine, 8)


@pytest.mark.parametrize(
    "value", ["65", "-1", "+1", "1.5", "many", " 1", "1\n", "\u0661", "001", "1e1"]
)
def test_a_label_that_is_no_number_is_refused_and_changes_nothing(
    engine: Snapshotter, value: str
) -> None:
    based(engine, 1)
    engine.prepare("work")
    labels = {"other": "label", STANDBY_LABEL: value}
    before = engine.list(), clones(engine)
    for call in (
        lambda: engine.prepare("new", "base", labels),
        lambda: engine.view("new", "base", labels),
        lambda: engine.commit("done", "work", labels),
        lambda: engine.update("base", labels),
        lambda: engine.update("base", labels, ["labels.other", f"labels.{STANDBY_LABEL}"]),
    ):
        with pytest.raises(InvalidArgument, match=STANDBY_LABEL):
            call()
    assert (engine.list(), clones(engine)) == before
    assert engine.standby("base") == (1, 1)


def test_as_many_clones_as_may_be_wanted_are_made(engine: Snapshotter) -> None:
    based(engine, 64)
    assert len(clones(engine)) == 64


def test_several_parents_have_clones_of_their_own(engine: Snapshotter) -> None:
    based(engine, 2)
    write(engine.prepare("preparing", "base"), file="next")
    engine.commit("next", "preparing", {STANDBY_LABEL: "1"})
    await_standby(engine, 1, "next")
    await_standby(engine, 2)
    assert read(engine.prepare("of next", "next")) == {"file": "next"}
    assert read(engine.prepare("of base", "base")) == {"file": "base"}


def test_complete_clones_survive_a_restart_and_are_used(state: Path) -> None:
    with opened(state) as engine:
        based(engine, 2)
        standing = inodes(engine)
    with opened(state) as engine:
        assert engine.standby("base") == (2, 2)
        assert inodes(engine) == standing
        taken = inode(engine.prepare("work", "base"))
        assert taken in standing
        await_standby(engine, 2)
        assert set(inodes(engine)) & set(standing) == set(standing) - {taken}


@pytest.mark.parametrize("how", ["label", "remove"])
def test_what_nobody_wants_anymore_is_dropped_at_start(state: Path, how: str) -> None:
    with opened(state) as engine:
        based(engine, 2)
        # As if it had been killed just after what comes next.
        engine._standby.close()
        if how == "label":
            engine.update("base", {})
        else:
            engine.remove("base")
        assert len(clones(engine)) == 2
    with opened(state) as engine:
        left = {identity(engine, "base")} if how == "label" else set()
        eventually(lambda: directories(engine) == left)


def test_nothing_is_remembered_of_what_is_gone(engine: Snapshotter) -> None:
    based(engine, 1)
    engine.remove("base")
    eventually(lambda: not directories(engine) and not engine._standby._ready)


def test_only_the_standby_worker_has_idle_priority(engine: Snapshotter) -> None:
    based(engine, 1)
    standby = idle_worker(engine)
    with frozen(engine):
        for key in ("a", "b"):
            engine.prepare(key, "base")
        assert os.sched_getscheduler(standby) == os.SCHED_IDLE
    others = [worker.process.pid for worker in engine._contents._crew._idle]
    assert others
    assert {os.sched_getscheduler(pid) for pid in others} == {os.SCHED_OTHER}


def test_fds_and_threads_do_not_grow(state: Path) -> None:
    def held() -> tuple[int, int]:
        # The database has a connection for each of those who read at the same time.
        return len([fd for fd in fds() if "metadata.db" not in fd]), threading.active_count()

    before = held()
    with opened(state) as engine:
        based(engine, 2)

        def cycle() -> None:
            engine.prepare("work", "base")
            engine.remove("work")
            await_standby(engine, 2)
            label(engine, 1)
            await_standby(engine, 1)
            label(engine, 2)
            await_standby(engine, 2)
            engine.upkeep.cleanup()

        cycle()
        warm = held()
        for _ in range(20):
            cycle()
        assert held() == warm
    assert held() == before
