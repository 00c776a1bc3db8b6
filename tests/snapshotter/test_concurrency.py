"""Concurrent calls of Snapshotter."""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from snapd_native.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
    Unavailable,
)
from snapd_native.model import Kind
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests.support import torture_tree
from tests.support.descriptors import THIS, nothing_left_open
from tests.support.engine import (
    BEFORE,
    directories,
    fail,
    gated,
    identity,
    names,
    opened,
    read,
    write,
)
from tests.support.file_systems import long_on_xfs
from tests.support.waiting import WAIT

pytestmark = long_on_xfs


def test_a_running_prepare_reserves_its_key_and_its_parent(full: Snapshotter) -> None:
    for key in ("work", "look"):
        full.remove(key)
    with ThreadPoolExecutor(2) as pool, gated("clone") as gate:
        running = pool.submit(full.prepare, "new", "base")
        gate.wait_until_reached()
        for call in (full.stat, full.mounts, full.usage, full.remove):
            with pytest.raises(NotFound):
                call("new")
        with pytest.raises(NotFound):
            full.update("new", {})
        with pytest.raises(NotFound):
            full.commit("done", "new")
        assert names(full) == ["base", "lone"]
        for call in (full.prepare, full.view, lambda name: full.commit(name, "lone")):
            with pytest.raises(AlreadyExists):
                call("new")
        with pytest.raises(FailedPrecondition, match="it has children"):
            full.remove("base")
        pool.submit(call_everything, full).result(WAIT)
        full.upkeep.cleanup()
        gate.open()
        mount = running.result(WAIT)
    assert read(mount) == {"file": "base", "other": "more"}
    assert full.mounts("new") == mount


def call_everything(engine: Snapshotter) -> None:
    """Make each call that copies no tree."""
    write(engine.prepare("an empty one"), file="x")
    engine.view("another view", "base")
    engine.update("base", {"a": "b"})
    engine.usage("base")
    assert engine.usage("an empty one").inodes == 2
    assert "an empty one" in names(engine)
    engine.commit("a committed one", "an empty one")
    engine.mounts("another view")
    for key in ("another view", "a committed one"):
        engine.remove(key)
    engine.check_health()


def test_a_running_commit_reserves_its_key_name_and_parent(full: Snapshotter) -> None:
    for key in ("work", "look"):
        full.remove(key)
    with ThreadPoolExecutor(2) as pool, gated("measure") as gate:
        running = pool.submit(full.commit, "new", "lone", {"of": "new"}, "base")
        gate.wait_until_reached()
        for name in ("other", "new"):
            with pytest.raises((FailedPrecondition, AlreadyExists)):
                full.commit(name, "lone")
        with pytest.raises(FailedPrecondition, match="it is being committed"):
            full.remove("lone")
        with pytest.raises(FailedPrecondition, match="it has children"):
            full.remove("base")
        with pytest.raises(NotFound):
            full.stat("new")
        with pytest.raises(NotFound):
            full.view("v", "new")
        for call in (full.prepare, full.view):
            with pytest.raises(AlreadyExists):
                call("new")
        assert full.stat("lone").kind is Kind.ACTIVE
        assert full.mounts("lone").options == ("rbind", "rw")
        assert full.update("lone", {"x": "y"}).labels == {"x": "y"}
        assert names(full) == ["base", "lone"]
        pool.submit(full.prepare, "copy", "base").result(WAIT)
        full.upkeep.cleanup()
        gate.open()
        running.result(WAIT)
    info = full.stat("new")
    assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"of": "new"})
    assert names(full) == ["base", "copy", "new"]


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("clone", lambda engine: engine.prepare("new", "base")),
        ("measure", lambda engine: engine.commit("new", "work")),
        ("measure", lambda engine: engine.usage("work")),
    ],
    ids=["prepare", "commit", "usage"],
)
def test_stop_undoes_running_calls(
    left: Path, what: str, call: Callable[[Snapshotter], object]
) -> None:
    with opened(left) as engine:
        before = directories(engine), engine.list()
        with ThreadPoolExecutor(1) as pool, gated(what) as gate:
            running = pool.submit(call, engine)
            gate.wait_until_reached()
            engine.stop()
            gate.open()
            with pytest.raises(Unavailable):
                running.result(WAIT)
        assert (directories(engine), engine.list()) == before
    with opened(left) as engine:
        assert (directories(engine), engine.list()) == before
        call(engine)


@pytest.mark.parametrize("parent", ["", "base"])
def test_only_one_of_eight_concurrent_prepares_gets_a_key(full: Snapshotter, parent: str) -> None:
    start = threading.Barrier(8)

    def prepare(number: int) -> str:
        start.wait(WAIT)
        try:
            write(full.prepare("new", parent), winner=str(number))
        except AlreadyExists:
            return "lost"
        return str(number)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(prepare, range(8)))
    assert Counter(results)["lost"] == 7
    assert read(full.mounts("new"))["winner"] in results
    assert len(directories(full)) == 4


def test_concurrent_calls_leave_records_and_directories_consistent(full: Snapshotter) -> None:
    keys = [f"key {number}" for number in range(6)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            key, other = chance.choice(keys), chance.choice([*keys, "base"])
            calls: list[Callable[[], object]] = [
                partial(full.prepare, key, other),
                partial(full.prepare, key),
                partial(full.view, key, other),
                partial(full.commit, key, other),
                partial(full.mounts, key),
                partial(full.usage, key),
                partial(full.update, key, {"a": "b"}),
                partial(full.remove, key),
                partial(full.remove, key),
                partial(full.list, ["kind==active"]),
                full.upkeep.cleanup,
            ]
            with suppress(NotFound, AlreadyExists, FailedPrecondition, InvalidArgument):
                chance.choice(calls)()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    full.upkeep.cleanup()
    infos = full.list()
    owners = {info.name for info in infos if info.kind is not Kind.VIEW or not info.parent}
    assert directories(full) == {identity(full, name) for name in owners}
    assert all(info.parent in ("", *(other.name for other in infos)) for info in infos)
    assert full._store.reserved() == set()


def test_calls_leave_no_open_files(full: Snapshotter) -> None:
    def mixed(number: int) -> None:
        key = f"key {number}"
        calls: Mapping[str, Callable[[], object]] = {
            "prepared": lambda: full.prepare(key, "base"),
            "taken": lambda: full.prepare(key, "base"),
            "no parent": lambda: full.prepare(key, "nothing"),
            "no filter": lambda: full.list(["name="]),
            "paged": lambda: full.list(["kind==active"], limit=1),
            "slow": lambda: full.list(["name~=["]),
            "committed": lambda: full.commit(f"done {number}", key),
            "no mounts": lambda: full.mounts(f"done {number}"),
            "viewed": lambda: full.view(key, f"done {number}"),
            "children": lambda: full.remove(f"done {number}"),
            "removed": lambda: full.remove(key),
            "also removed": lambda: full.remove(f"done {number}"),
            "measured": lambda: full.usage("work"),
        }
        for call in calls.values():
            with suppress(SnapdError):
                call()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateDirectory, "sync", fail(errno.EIO))
            with pytest.raises(DataLoss):
                full.commit(key, "work")

    mixed(0)
    full.upkeep.cleanup()
    with nothing_left_open(THIS):
        for number in range(1, 16):
            mixed(number)
        full.upkeep.cleanup()
    assert names(full) == BEFORE


def test_commit_and_prepare_copy_the_torture_tree_exactly(engine: Snapshotter) -> None:
    tree = Path(engine.prepare("preparing").source)
    torture_tree.build(tree)
    engine.commit("base", "preparing")
    copy = Path(engine.prepare("work", "base").source)
    assert torture_tree.differences(tree, copy) == ""
    engine.commit("again", "work")
    second = Path(engine.prepare("second", "again").source)
    assert torture_tree.differences(tree, second) == ""
    assert engine.usage("second").inodes == engine.usage("base").inodes
    for name in ("second", "again", "base"):
        engine.remove(name)
    engine.upkeep.cleanup()
    assert directories(engine) == set()
