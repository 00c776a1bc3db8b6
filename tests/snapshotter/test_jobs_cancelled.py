"""Cancellation of calls of Snapshotter at any instant: each call is complete or undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.errors import Cancelled
from snapd_native.jobs import Job, Operation
from snapd_native.model import Added, Change, Committed, Kind, Usage
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import (
    commit_many_files,
    directories,
    id_of,
    open_engine,
    read_files,
    snapshot_names,
    state_of,
    write_files,
)
from tests.support.file_systems import on_ext4
from tests.support.holding import hold_at_files, hold_function
from tests.support.service import expect_error
from tests.support.waiting import WAIT_TIMEOUT

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

LONG_CALLS: dict[str, tuple[str, Call]] = {
    "prepare": ("clone", CALLS["prepare"]),
    "commit": ("seal", CALLS["commit"]),
    "usage": ("measure", CALLS["usage"]),
}
"""Calls that copy or measure, and the method of `trees.Crew` at which they can be held up."""


@pytest.mark.parametrize("member", CALLS)
@pytest.mark.parametrize("when", ["before", "as it begins"])
def test_a_call_cancelled_before_or_at_its_start_changes_nothing(
    populated: Snapshotter, member: str, when: str
) -> None:
    before = state_of(populated)
    job = Job() if when == "before" else Job(lambda: job.cancel())
    if when == "before":
        assert job.cancel()
    with expect_error(Cancelled, "was cancelled"):
        CALLS[member](populated, job)
    assert state_of(populated) == before
    CALLS[member](populated, Job())


@pytest.mark.parametrize("member", CALLS)
def test_a_completed_call_cannot_be_cancelled(populated: Snapshotter, member: str) -> None:
    job = Job()
    CALLS[member](populated, job)
    assert not job.cancel(), "Cancel succeeded after the call"


@pytest.mark.parametrize("member", LONG_CALLS)
def test_a_call_cancelled_while_it_works_changes_nothing(
    populated: Snapshotter, member: str
) -> None:
    what, call = LONG_CALLS[member]
    before = state_of(populated)
    with ThreadPoolExecutor(1) as pool, hold_function(trees.Crew, what) as held:
        job = Job()
        running = pool.submit(call, populated, job)
        held.wait_until_reached()
        assert job.cancel()
        held.release()
        with expect_error(Cancelled, "was cancelled"):
            running.result(WAIT_TIMEOUT)
    assert state_of(populated) == before
    call(populated, Job())


def test_prepare_cancelled_in_the_middle_of_the_copy_is_undone(engine: Snapshotter) -> None:
    commit_many_files(engine, "base", 20)
    tree = Path(engine.view("look", "base").source)
    before = state_of(engine)

    class CancelledAtReport(Job):
        def report(self, inodes: int, size: int) -> None:
            super().report(inodes, size)
            if inodes:
                assert self.cancel()

    job = CancelledAtReport()
    with hold_at_files(tree / "0", after=10), expect_error(Cancelled, "was cancelled"):
        engine.prepare("key", "base", job=job)
    assert 0 < job.done.inodes < job.total.inodes
    assert state_of(engine) == before
    copy = Path(engine.prepare("key", "base").source)
    assert sum(1 for _ in copy.rglob("*")) == 21
    for key in ("key", "look", "base"):
        engine.remove(key)
    engine.upkeep.cleanup()
    assert directories(engine) == set()


def test_a_cancelled_commit_leaves_the_snapshot_active(populated: Snapshotter) -> None:
    before = populated.stat("work"), populated.mounts("work"), populated.usage("work")
    with ThreadPoolExecutor(1) as pool, hold_function(trees.Crew, "seal") as held:
        job = Job()
        running = pool.submit(populated.commit, "new", "work", {"a": "b"}, "", job)
        held.wait_until_reached()
        job.cancel()
        held.release()
        with expect_error(Cancelled, "was cancelled"):
            running.result(WAIT_TIMEOUT)
    assert (populated.stat("work"), populated.mounts("work"), populated.usage("work")) == before
    write_files(populated.mounts("work"), more="more")
    populated.view("new", "base")
    populated.commit("another", "work")
    assert read_files(populated.view("seen", "another")) == {
        "file": "base",
        "other": "more",
        "more": "more",
    }


def test_cancel_of_one_prepare_does_not_affect_another(populated: Snapshotter) -> None:
    with ThreadPoolExecutor(2) as pool, hold_function(trees.Crew, "clone") as held:
        jobs = {key: Job() for key in ("one", "other")}
        running = {
            key: pool.submit(populated.prepare, key, "base", None, job) for key, job in jobs.items()
        }
        held.wait_until_reached()
        jobs["one"].cancel()
        held.release()
        with expect_error(Cancelled, "was cancelled"):
            running["one"].result(WAIT_TIMEOUT)
        assert read_files(running["other"].result(WAIT_TIMEOUT)) == {
            "file": "base",
            "other": "more",
        }
    assert jobs["other"].done == jobs["other"].total
    assert snapshot_names(populated) == ["base", "lone", "look", "other", "work"]


def test_a_cancelled_cleanup_does_not_wait_for_a_running_deletion(
    populated: Snapshotter, caplog: pytest.LogCaptureFixture
) -> None:
    garbage = f"rm-{id_of(populated, 'work')}"
    orphan = populated.state_directory / "snapshots" / "99"
    (orphan / "directory").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, hold_function(trees, "delete") as held:
        populated.remove("work")
        held.wait_until_reached()
        job = Job()
        running = pool.submit(populated.upkeep.cleanup, job)
        while job.operation is None:
            pass
        assert job.cancel()
        with expect_error(Cancelled, "was cancelled"):
            running.result(WAIT_TIMEOUT)
        assert garbage in directories(populated), "the deletion has ended"
        held.release()
    populated.upkeep.cleanup()
    left = {id_of(populated, name) for name in ("base", "lone")}
    assert directories(populated) == left
    assert caplog.text == ""


def test_cleanup_can_be_cancelled_during_its_own_deletion(
    populated: Snapshotter, caplog: pytest.LogCaptureFixture
) -> None:
    before = directories(populated)
    (populated.state_directory / "snapshots" / "99" / "directory").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, hold_function(trees, "delete") as held:
        job = Job()
        running = pool.submit(populated.upkeep.cleanup, job)
        held.wait_until_reached()
        assert job.cancel()
        with expect_error(Cancelled, "was cancelled"):
            running.result(WAIT_TIMEOUT)
        held.release()
    populated.upkeep.cleanup()
    assert directories(populated) == before
    assert caplog.text == ""


PUBLISHING_CALLS: dict[str, Call] = {
    "prepare nothing": lambda engine, job: engine.prepare("key", job=job),
    "prepare": lambda engine, job: engine.prepare("key", "base", job=job),
    "commit": lambda engine, job: engine.commit("name", "work", job=job),
}


class CancelledAtStep(Job):
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
            self.in_time = self._pool.submit(self.cancel).result(WAIT_TIMEOUT)


@pytest.mark.parametrize(
    ("member", "step", "in_time"),
    [
        (member, step, step != "concluded")
        for member in PUBLISHING_CALLS
        for step in ("begun", "working", "concluding", "concluded")
        if (member, step) != ("prepare nothing", "working")
    ],
)
def test_cancel_at_each_step_undoes_the_call_or_returns_false(
    scratch: Path, member: str, step: str, in_time: bool
) -> None:
    changes: list[Change] = []
    with open_engine(scratch / "state", changes.append) as engine, ThreadPoolExecutor(1) as pool:
        commit_many_files(engine, "base", 1)
        engine.prepare("work", "base")
        before = state_of(engine)[1:]
        changes.clear()
        job = CancelledAtStep(pool, step)
        with expect_error(Cancelled, "was cancelled") if in_time else nullcontext():
            PUBLISHING_CALLS[member](engine, job)
        assert job.in_time is in_time
        if in_time:
            assert changes == []
            assert state_of(engine)[1:] == before
        else:
            undo(engine, changes)
        assert kept_directories(engine) == {id_of(engine, name) for name in snapshot_names(engine)}
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
            assert key not in snapshot_names(engine)
            engine.remove(name)
            engine.prepare(key, "base")
        case _:
            raise AssertionError(change)


def kept_directories(engine: Snapshotter) -> set[str]:
    """Return the names of all directories but those that are being deleted."""
    return {name for name in directories(engine) if not name.startswith("rm-")}
