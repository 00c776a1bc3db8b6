"""Cancelling calls of the engine, at whatever instant: all is done, or nothing is left."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd_native.errors import Cancelled
from snapd_native.jobs import Job
from snapd_native.model import Added, Change, Committed, Kind
from snapd_native.snapshotter import Snapshotter
from tests.engines import (
    WAIT,
    directories,
    gated,
    grow,
    identity,
    names,
    opened,
    read,
    state_of,
    write,
)
from tests.filesystems import on_ext4
from tests.service import refused

pytestmark = on_ext4

Call = Callable[[Snapshotter, Job], object]

CALLS: dict[str, Call] = {
    "prepare": lambda engine, job: engine.prepare("new", "base", job=job),
    "prepare nothing": lambda engine, job: engine.prepare("new", job=job),
    "commit": lambda engine, job: engine.commit("new", "work", job=job),
    "usage": lambda engine, job: engine.usage("work", job),
    "cleanup": lambda engine, job: engine.upkeep.cleanup(job),
}
"""Each call that takes a job, on a full engine."""

HELD: dict[str, tuple[str, Call]] = {
    "prepare": ("clone", CALLS["prepare"]),
    "commit": ("measure", CALLS["commit"]),
    "usage": ("measure", CALLS["usage"]),
}
"""Calls that a gate can hold up, and where."""


@pytest.mark.parametrize("member", CALLS)
@pytest.mark.parametrize("when", ["before", "as it begins"])
def test_a_call_that_is_cancelled_at_first_changes_nothing(
    full: Snapshotter, member: str, when: str
) -> None:
    before = state_of(full)
    job = Job() if when == "before" else Job(lambda: job.cancel())
    if when == "before":
        assert job.cancel()
    with refused(Cancelled, "was cancelled"):
        CALLS[member](full, job)
    assert state_of(full) == before
    CALLS[member](full, Job())


@pytest.mark.parametrize("member", CALLS)
def test_after_its_end_a_call_cannot_be_cancelled(full: Snapshotter, member: str) -> None:
    job = Job()
    CALLS[member](full, job)
    assert not job.cancel(), "it says that what is done will be undone"


@pytest.mark.parametrize("member", HELD)
def test_a_call_that_is_cancelled_within_leaves_nothing(full: Snapshotter, member: str) -> None:
    what, call = HELD[member]
    before = state_of(full)
    with ThreadPoolExecutor(1) as pool, gated(what) as gate:
        job = Job()
        running = pool.submit(call, full, job)
        gate.wait_until_reached()
        assert job.cancel()
        gate.open()
        with refused(Cancelled, "was cancelled"):
            running.result(WAIT)
    assert state_of(full) == before
    call(full, Job())


def test_a_copy_is_undone_in_its_middle(engine: Snapshotter) -> None:
    grow(engine, "base", 5000)
    before = state_of(engine)

    class Impatient(Job):
        def report(self, inodes: int, size: int) -> None:
            super().report(inodes, size)
            if inodes:
                assert self.cancel()

    job = Impatient()
    with refused(Cancelled, "was cancelled"):
        engine.prepare("key", "base", job=job)
    assert 0 < job.done.inodes < job.total.inodes
    assert state_of(engine) == before
    copy = Path(engine.prepare("key", "base").source)
    assert sum(1 for _ in copy.rglob("*")) == 5050
    engine.remove("key")
    engine.remove("base")
    engine.upkeep.cleanup()
    assert directories(engine) == set()


def test_a_cancelled_commit_leaves_the_snapshot_active(full: Snapshotter) -> None:
    before = full.stat("work"), full.mounts("work"), full.usage("work")
    with ThreadPoolExecutor(1) as pool, gated("measure") as gate:
        job = Job()
        running = pool.submit(full.commit, "new", "work", {"a": "b"}, "", job)
        gate.wait_until_reached()
        job.cancel()
        gate.open()
        with refused(Cancelled, "was cancelled"):
            running.result(WAIT)
    assert (full.stat("work"), full.mounts("work"), full.usage("work")) == before
    write(full.mounts("work"), more="more")
    full.view("new", "base")
    full.commit("another", "work")
    assert read(full.view("seen", "another")) == {"file": "base", "other": "more", "more": "more"}


def test_one_is_cancelled_and_the_other_is_not(full: Snapshotter) -> None:
    with ThreadPoolExecutor(2) as pool, gated("clone") as gate:
        jobs = {key: Job() for key in ("one", "other")}
        running = {
            key: pool.submit(full.prepare, key, "base", None, job) for key, job in jobs.items()
        }
        gate.wait_until_reached()
        jobs["one"].cancel()
        gate.open()
        with refused(Cancelled, "was cancelled"):
            running["one"].result(WAIT)
        assert read(running["other"].result(WAIT)) == {"file": "base", "other": "more"}
    assert jobs["other"].done == jobs["other"].total
    assert names(full) == ["base", "lone", "look", "other", "work"]


def test_a_cleanup_is_cancelled_while_another_deletion_goes_on(
    full: Snapshotter, caplog: pytest.LogCaptureFixture
) -> None:
    garbage = f"rm-{identity(full, 'work')}"
    orphan = full.state_directory / "snapshots" / "99"
    (orphan / "directory").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, gated("delete") as gate:
        full.remove("work")
        gate.wait_until_reached()
        job = Job()
        running = pool.submit(full.upkeep.cleanup, job)
        while job.operation is None:
            pass
        assert job.cancel()
        with refused(Cancelled, "was cancelled"):
            running.result(WAIT)
        assert garbage in directories(full), "nobody waited for the deletion"
        gate.open()
    full.upkeep.cleanup()
    left = {identity(full, name) for name in ("base", "lone")}
    assert directories(full) == left
    assert caplog.text == ""


def test_a_cleanup_is_cancelled_in_its_own_deletion(
    full: Snapshotter, caplog: pytest.LogCaptureFixture
) -> None:
    before = directories(full)
    (full.state_directory / "snapshots" / "99" / "directory").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, gated("delete") as gate:
        job = Job()
        running = pool.submit(full.upkeep.cleanup, job)
        gate.wait_until_reached()
        assert job.cancel()
        with refused(Cancelled, "was cancelled"):
            running.result(WAIT)
        gate.open()
    full.upkeep.cleanup()
    assert directories(full) == before
    assert caplog.text == ""


RACES: dict[str, tuple[int, Call]] = {
    "prepare nothing": (200, lambda engine, job: engine.prepare("key", job=job)),
    "prepare": (60, lambda engine, job: engine.prepare("key", "base", job=job)),
    "commit": (60, lambda engine, job: engine.commit("name", "work", job=job)),
}
"""How often each race is run: where there is a tree, a cancelled call costs workers."""


@pytest.mark.parametrize("member", RACES)
def test_a_cancel_that_races_with_the_end_is_in_time_or_too_late(
    scratch: Path, member: str
) -> None:
    """The instant is drawn from around the end: later after each that came in time, and back."""
    rounds, call = RACES[member]
    dice, outcomes = random.Random(member), Counter[bool]()
    changes: list[Change] = []
    moment = 0.001
    with (
        opened(scratch / "state", changes.append) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        grow(engine, "base", 1)
        engine.prepare("work", "base")
        while outcomes.total() < rounds or min(outcomes[True], outcomes[False]) <= rounds // 10:
            before = state_of(engine)[1:]
            begun = threading.Event()
            job = Job(begun.set)
            changes.clear()
            running = pool.submit(call, engine, job)
            assert begun.wait(WAIT)
            threading.Event().wait(dice.uniform(0, 2 * moment))
            in_time = job.cancel()
            if in_time:
                with refused(Cancelled, "was cancelled"):
                    running.result(WAIT)
                assert changes == []
                assert state_of(engine)[1:] == before
            else:
                running.result(WAIT)
                undo(engine, changes)
            assert owned(engine) == {identity(engine, name) for name in names(engine)}
            outcomes[in_time] += 1
            moment *= 1.1 if in_time else 0.9
        assert engine._store.reserved() == set()


def undo(engine: Snapshotter, changes: list[Change]) -> None:
    """Take back the one change that a call has made, which must be there."""
    (change,) = changes
    match change:
        case Added(key):
            assert engine.mounts(key).options == ("rbind", "rw")
            engine.remove(key)
        case Committed(name, key):
            assert engine.stat(name).kind is Kind.COMMITTED
            assert key not in names(engine)
            engine.remove(name)
            engine.prepare(key, "base")
        case _:
            raise AssertionError(change)


def owned(engine: Snapshotter) -> set[str]:
    """Return the names of all directories but those that are being deleted."""
    return {name for name in directories(engine) if not name.startswith("rm-")}
