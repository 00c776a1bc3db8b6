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

from snapd_native import trees
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
from tests.support.descriptors import THIS_PROCESS, nothing_left_open
from tests.support.engine import (
    POPULATED_NAMES,
    directories,
    failing_function,
    id_of,
    open_engine,
    read_files,
    snapshot_names,
    write_files,
)
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_function
from tests.support.waiting import WAIT_TIMEOUT

pytestmark = long_on_xfs


def test_a_running_prepare_reserves_its_key_and_its_parent(populated: Snapshotter) -> None:
    for key in ("work", "look"):
        populated.remove(key)
    with ThreadPoolExecutor(2) as pool, hold_function(trees.Crew, "clone") as held:
        running = pool.submit(populated.prepare, "new", "base")
        held.wait_until_reached()
        for call in (populated.stat, populated.mounts, populated.usage, populated.remove):
            with pytest.raises(NotFound):
                call("new")
        with pytest.raises(NotFound):
            populated.update("new", {})
        with pytest.raises(NotFound):
            populated.commit("done", "new")
        assert snapshot_names(populated) == ["base", "lone"]
        for call in (
            populated.prepare,
            populated.view,
            lambda name: populated.commit(name, "lone"),
        ):
            with pytest.raises(AlreadyExists):
                call("new")
        with pytest.raises(FailedPrecondition, match="it has children"):
            populated.remove("base")
        pool.submit(call_everything, populated).result(WAIT_TIMEOUT)
        populated.upkeep.cleanup()
        held.release()
        mount = running.result(WAIT_TIMEOUT)
    assert read_files(mount) == {"file": "base", "other": "more"}
    assert populated.mounts("new") == mount


def call_everything(engine: Snapshotter) -> None:
    """Make each call that copies no tree."""
    write_files(engine.prepare("an empty one"), file="x")
    engine.view("another view", "base")
    engine.update("base", {"a": "b"})
    engine.usage("base")
    assert engine.usage("an empty one").inodes == 2
    assert "an empty one" in snapshot_names(engine)
    engine.commit("a committed one", "an empty one")
    engine.mounts("another view")
    for key in ("another view", "a committed one"):
        engine.remove(key)
    engine.check_health()


def test_a_running_commit_reserves_its_key_name_and_parent(populated: Snapshotter) -> None:
    for key in ("work", "look"):
        populated.remove(key)
    with ThreadPoolExecutor(2) as pool, hold_function(trees.Crew, "seal") as held:
        running = pool.submit(populated.commit, "new", "lone", {"of": "new"}, "base")
        held.wait_until_reached()
        for name in ("other", "new"):
            with pytest.raises((FailedPrecondition, AlreadyExists)):
                populated.commit(name, "lone")
        with pytest.raises(FailedPrecondition, match="it is being committed"):
            populated.remove("lone")
        with pytest.raises(FailedPrecondition, match="it has children"):
            populated.remove("base")
        with pytest.raises(NotFound):
            populated.stat("new")
        with pytest.raises(NotFound):
            populated.view("v", "new")
        for call in (populated.prepare, populated.view):
            with pytest.raises(AlreadyExists):
                call("new")
        assert populated.stat("lone").kind is Kind.ACTIVE
        assert populated.mounts("lone").options == ("rbind", "rw")
        assert populated.update("lone", {"x": "y"}).labels == {"x": "y"}
        assert snapshot_names(populated) == ["base", "lone"]
        pool.submit(populated.prepare, "copy", "base").result(WAIT_TIMEOUT)
        populated.upkeep.cleanup()
        held.release()
        running.result(WAIT_TIMEOUT)
    info = populated.stat("new")
    assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"of": "new"})
    assert snapshot_names(populated) == ["base", "copy", "new"]


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("clone", lambda engine: engine.prepare("new", "base")),
        ("seal", lambda engine: engine.commit("new", "work")),
        ("measure", lambda engine: engine.usage("work")),
    ],
    ids=["prepare", "commit", "usage"],
)
def test_stop_undoes_running_calls(
    populated_state: Path, what: str, call: Callable[[Snapshotter], object]
) -> None:
    with open_engine(populated_state) as engine:
        before = directories(engine), engine.list()
        with ThreadPoolExecutor(1) as pool, hold_function(trees.Crew, what) as held:
            running = pool.submit(call, engine)
            held.wait_until_reached()
            engine.stop()
            held.release()
            with pytest.raises(Unavailable):
                running.result(WAIT_TIMEOUT)
        assert (directories(engine), engine.list()) == before
    with open_engine(populated_state) as engine:
        assert (directories(engine), engine.list()) == before
        call(engine)


@pytest.mark.parametrize("parent", ["", "base"])
def test_only_one_of_eight_concurrent_prepares_gets_a_key(
    populated: Snapshotter, parent: str
) -> None:
    start = threading.Barrier(8)

    def prepare(number: int) -> str:
        start.wait(WAIT_TIMEOUT)
        try:
            write_files(populated.prepare("new", parent), winner=str(number))
        except AlreadyExists:
            return "lost"
        return str(number)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(prepare, range(8)))
    assert Counter(results)["lost"] == 7
    assert read_files(populated.mounts("new"))["winner"] in results
    assert len(directories(populated)) == 4


def test_concurrent_calls_leave_records_and_directories_consistent(populated: Snapshotter) -> None:
    keys = [f"key {number}" for number in range(6)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            key, other = chance.choice(keys), chance.choice([*keys, "base"])
            calls: list[Callable[[], object]] = [
                partial(populated.prepare, key, other),
                partial(populated.prepare, key),
                partial(populated.view, key, other),
                partial(populated.commit, key, other),
                partial(populated.mounts, key),
                partial(populated.usage, key),
                partial(populated.update, key, {"a": "b"}),
                partial(populated.remove, key),
                partial(populated.remove, key),
                partial(populated.list, ["kind==active"]),
                populated.upkeep.cleanup,
            ]
            with suppress(NotFound, AlreadyExists, FailedPrecondition, InvalidArgument):
                chance.choice(calls)()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    populated.upkeep.cleanup()
    infos = populated.list()
    owners = {info.name for info in infos if info.kind is not Kind.VIEW or not info.parent}
    assert directories(populated) == {id_of(populated, name) for name in owners}
    assert all(info.parent in ("", *(other.name for other in infos)) for info in infos)
    assert populated._store.reserved() == set()


def test_calls_leave_no_open_files(populated: Snapshotter) -> None:
    def mixed(number: int) -> None:
        key = f"key {number}"
        calls: Mapping[str, Callable[[], object]] = {
            "prepared": lambda: populated.prepare(key, "base"),
            "taken": lambda: populated.prepare(key, "base"),
            "no parent": lambda: populated.prepare(key, "nothing"),
            "no filter": lambda: populated.list(["name="]),
            "paged": lambda: populated.list(["kind==active"], limit=1),
            "slow": lambda: populated.list(["name~=["]),
            "committed": lambda: populated.commit(f"done {number}", key),
            "no mounts": lambda: populated.mounts(f"done {number}"),
            "viewed": lambda: populated.view(key, f"done {number}"),
            "children": lambda: populated.remove(f"done {number}"),
            "removed": lambda: populated.remove(key),
            "also removed": lambda: populated.remove(f"done {number}"),
            "measured": lambda: populated.usage("work"),
        }
        for call in calls.values():
            with suppress(SnapdError):
                call()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateDirectory, "sync", failing_function(errno.EIO))
            with pytest.raises(DataLoss):
                populated.commit(key, "work")

    mixed(0)
    populated.upkeep.cleanup()
    with nothing_left_open(THIS_PROCESS):
        for number in range(1, 16):
            mixed(number)
        populated.upkeep.cleanup()
    assert snapshot_names(populated) == POPULATED_NAMES


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
