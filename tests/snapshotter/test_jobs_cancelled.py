"""Cancellation of calls of Snapshotter at any instant: each call is complete or undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from snapd_native.errors import Cancelled
from snapd_native.jobs import Job, Operation
from snapd_native.model import Added, Change, Committed, Kind, Usage
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import (
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
from tests.support.file_systems import on_ext4
from tests.support.holding import held
from tests.support.service import refused
from tests.support.waiting import WAIT

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
"""Calls that a gate can stop, and the function at which it stops them."""


@pytest.mark.parametrize("member", CALLS)
@pytest.mark.parametrize("when", ["before", "as it begins"])
def test_a_call_cancelled_before_or_at_its_begin_changes_nothing(
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
def test_a_completed_call_cannot_be_cancelled(full: Snapshotter, member: str) -> None:
    job = Job()
    CALLS[member](full, job)
    assert not job.cancel(), "it says that what is done will be undone"


@pytest.mark.parametrize("member", HELD)
def test_a_call_cancelled_while_it_works_changes_nothing(full: Snapshotter, member: str) -> None:
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


def test_prepare_cancelled_in_the_middle_of_the_copy_is_undone(engine: Snapshotter) -> None:
    grow(engine, "base", 20)
    tree = Path(engine.view("look", "base").source)
    before = state_of(engine)

    class Impatient(Job):
        def report(self, inodes: int, size: int) -> None:
            super().report(inodes, size)
            if inodes:
                assert self.cancel()

    job = Impatient()
    with held(tree / "0", after=10), refused(Cancelled, "was cancelled"):
        engine.prepare("key", "base", job=job)
    assert 0 < job.done.inodes < job.total.inodes
    assert state_of(engine) == before
    copy = Path(engine.prepare("key", "base").source)
    assert sum(1 for _ in copy.rglob("*")) == 21
    for key in ("key", "look", "base"):
        engine.remove(key)
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


def test_cancel_of_one_prepare_does_not_affect_another(full: Snapshotter) -> None:
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


def test_a_cancelled_cleanup_does_not_wait_for_a_running_deletion(
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


def test_cleanup_can_be_cancelled_during_its_own_deletion(
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


RACES: dict[str, Call] = {
    "prepare nothing": lambda engine, job: engine.prepare("key", job=job),
    "prepare": lambda engine, job: engine.prepare("key", "base", job=job),
    "commit": lambda engine, job: engine.commit("name", "work", job=job),
}


class Stepped(Job):
    """A job that another thread cancels at a step. Calls use their jobs at these steps only."""

    def __init__(self, pool: Executor, step: str) -> None:
        super().__init__()
        self.in_time: bool | None = None
        """The result of Cancel in the other thread."""
        self._pool = pool
        self._step = step

    def begin(
        self,
        operation: Operation,
        key: str,
        total: Usage | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        super().begin(operation, key, total, stopping)
        self._reach("begun")

    def report(self, inodes: int, size: int) -> None:
        self._reach("working")
        super().report(inodes, size)

    def conclude(self) -> None:
        self._reach("concluding")
        super().conclude()
        self._reach("concluded")

    def _reach(self, step: str) -> None:
        if step == self._step and self.in_time is None:
            self.in_time = self._pool.submit(self.cancel).result(WAIT)


@pytest.mark.parametrize(
    ("member", "step", "in_time"),
    [
        (member, step, step != "concluded")
        for member in RACES
        for step in ("begun", "working", "concluding", "concluded")
        if (member, step) != ("prepare nothing", "working")
    ],
)
def test_cancel_at_each_step_undoes_the_call_or_returns_false(
    scratch: Path, member: str, step: str, in_time: bool
) -> None:
    changes: list[Change] = []
    with opened(scratch / "state", changes.append) as engine, ThreadPoolExecutor(1) as pool:
        grow(engine, "base", 1)
        engine.prepare("work", "base")
        before = state_of(engine)[1:]
        changes.clear()
        job = Stepped(pool, step)
        with refused(Cancelled, "was cancelled") if in_time else nullcontext():
            RACES[member](engine, job)
        assert job.in_time is in_time
        if in_time:
            assert changes == []
            assert state_of(engine)[1:] == before
        else:
            undo(engine, changes)
        assert owned(engine) == {identity(engine, name) for name in names(engine)}
        assert engine._store.reserved() == set()


def undo(engine: Snapshotter, changes: list[Change]) -> None:
    """Check that a call has made exactly one change, and undo it."""
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
