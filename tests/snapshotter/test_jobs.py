"""Jobs: progress and cancellation, of the Job class and in the calls of Snapshotter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from snapd_native.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.jobs import Job, Operation
from snapd_native.model import Usage
from snapd_native.snapshotter import Snapshotter
from tests.support import torture_tree
from tests.support.engine import state_of
from tests.support.holding import hold_at_files
from tests.support.service import expect_error
from tests.support.waiting import WAIT_TIMEOUT, wait_until

Call = Callable[[Snapshotter, Job], object]

REFUSALS: list[tuple[type[SnapdError], Call]] = [
    (InvalidArgument, lambda engine, job: engine.prepare("", job=job)),
    (InvalidArgument, lambda engine, job: engine.prepare("new", labels={"": ""}, job=job)),
    (InvalidArgument, lambda engine, job: engine.prepare("new", "work", job=job)),
    (NotFound, lambda engine, job: engine.prepare("new", "none", job=job)),
    (AlreadyExists, lambda engine, job: engine.prepare("work", "base", job=job)),
    (InvalidArgument, lambda engine, job: engine.commit("", "work", job=job)),
    (InvalidArgument, lambda engine, job: engine.commit("new", "work", parent="look", job=job)),
    (AlreadyExists, lambda engine, job: engine.commit("base", "work", job=job)),
    (NotFound, lambda engine, job: engine.commit("new", "none", job=job)),
    (NotFound, lambda engine, job: engine.commit("new", "lone", parent="none", job=job)),
    (FailedPrecondition, lambda engine, job: engine.commit("new", "base", job=job)),
    (InvalidArgument, lambda engine, job: engine.usage("", job)),
    (NotFound, lambda engine, job: engine.usage("none", job)),
]


def test_a_job_adds_up_the_reported_progress() -> None:
    job = Job()
    assert (job.operation, job.key, job.done, job.total) == (None, "", Usage(0, 0), Usage(0, 0))
    job.begin(Operation.PREPARE, "key", Usage(size=8192, inodes=5))
    for inodes, size in ((1, 4096), (0, 0), (3, 0), (0, 4096)):
        job.report(inodes, size)
    assert (job.done, job.total) == (Usage(size=8192, inodes=4), Usage(size=8192, inodes=5))
    job.conclude()
    assert job.done == Usage(size=8192, inodes=4)


def test_the_begin_callback_gets_operation_key_and_total() -> None:
    begun: list[tuple[Operation | None, str, Usage]] = []
    job = Job(lambda: begun.append((job.operation, job.key, job.total)))
    assert begun == []
    job.begin(Operation.COMMIT, "key")
    assert begun == [(Operation.COMMIT, "key", Usage(0, 0))]


def test_a_cancelled_job_raises_cancelled_at_report_and_at_conclude() -> None:
    for step in (lambda job: job.report(1, 0), lambda job: job.conclude()):
        for operation in Operation:
            job = Job()
            job.begin(operation, "" if operation is Operation.CLEANUP else "my\nkey")
            job.report(1, 1)
            assert job.cancel()
            assert job.cancel(), "it is still cancelled"
            for _ in range(2):
                with expect_error(Cancelled, operation, "was cancelled"):
                    step(job)


def test_a_concluded_job_cannot_be_cancelled() -> None:
    job = Job()
    job.begin(Operation.PREPARE, "key")
    job.conclude()
    assert not job.cancel()
    assert not job.cancel()
    job.report(1, 0)


def test_a_job_is_either_concluded_or_cancelled() -> None:
    start = threading.Barrier(3)

    def conclude(job: Job) -> bool:
        start.wait(WAIT_TIMEOUT)
        try:
            job.conclude()
        except Cancelled:
            return False
        return True

    def cancel(job: Job) -> bool:
        start.wait(WAIT_TIMEOUT)
        return job.cancel()

    with ThreadPoolExecutor(3) as pool:
        for _ in range(1000):
            job = Job()
            concluded, *others = (pool.submit(what, job) for what in (conclude, cancel, cancel))
            assert {other.result(WAIT_TIMEOUT) for other in others} == {
                not concluded.result(WAIT_TIMEOUT)
            }


def test_the_progress_of_prepare_ends_at_the_usage_of_the_parent(engine: Snapshotter) -> None:
    tree = Path(engine.prepare("making").source)
    torture_tree.build(tree)
    # Written so late that none of the data is on the disk when the tree is measured.
    with open(tree / "large", "wb") as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
            file.seek(1 << 20, 1)
    engine.commit("base", "making")
    totals: list[Usage] = []
    job = Job(lambda: totals.append(job.total))
    engine.prepare("key", "base", job=job)
    assert (job.operation, job.key) == (Operation.PREPARE, "key")
    assert totals == [engine.usage("base")]
    assert job.done == job.total == engine.usage("base")


def test_prepare_reports_progress_while_it_copies(engine: Snapshotter) -> None:
    class RecordedJob(Job):
        def report(self, inodes: int, size: int) -> None:
            super().report(inodes, size)
            seen.append(self.done.inodes)

    tree = Path(engine.prepare("making").source)
    for number in range(20):
        (tree / str(number)).touch()
    engine.commit("base", "making")
    job = RecordedJob()
    seen: list[int] = []

    def has_gone_on(since: int) -> bool:
        return job.done.inodes > since

    with ThreadPoolExecutor(1) as pool:
        with hold_at_files(tree) as copy:
            preparing = pool.submit(engine.prepare, "key", "base", job=job)
            for _ in range(3):
                before = job.done.inodes
                copy.release()
                wait_until(partial(has_gone_on, before))
        preparing.result(WAIT_TIMEOUT)
    assert seen == sorted(seen)
    assert job.done == job.total


def test_prepare_without_parent_has_a_total_of_zero(engine: Snapshotter) -> None:
    job = Job()
    engine.prepare("key", job=job)
    assert (job.operation, job.key) == (Operation.PREPARE, "key")
    assert job.done == job.total == Usage(0, 0)


def test_usage_and_commit_report_the_entries_they_measure(engine: Snapshotter) -> None:
    root = Path(engine.prepare("key").source)
    torture_tree.build(root)
    usage = engine.usage("key", measuring := Job())
    assert (measuring.operation, measuring.key) == (Operation.USAGE, "key")
    engine.commit("name", "key", job=(committing := Job()))
    assert (committing.operation, committing.key) == (Operation.COMMIT, "key")
    for job in (measuring, committing):
        assert job.total == Usage(0, 0)
        # Two workers that find names of the same file both count it at first.
        assert job.done.inodes >= usage.inodes - 1
        assert job.done.size > 0


def test_cleanup_reports_the_entries_it_deletes(populated: Snapshotter) -> None:
    for number in range(100):
        (populated.state_directory / "snapshots" / "rm-99" / str(number)).mkdir(parents=True)
    job = Job()
    populated.upkeep.cleanup(job)
    assert (job.operation, job.key) == (Operation.CLEANUP, "")
    assert (job.done.inodes, job.total) == (100, Usage(0, 0))


@pytest.mark.parametrize("early", [False, True], ids=["", "cancelled before"])
def test_a_refused_call_does_not_begin_its_job(populated: Snapshotter, early: bool) -> None:
    before = state_of(populated)
    begun: list[None] = []
    for error, call in REFUSALS:
        job = Job(lambda: begun.append(None))
        if early:
            job.cancel()
        with pytest.raises(error):
            call(populated, job)
        assert job.operation is None
    assert begun == []
    assert state_of(populated) == before


def test_usage_of_a_committed_snapshot_or_a_view_begins_no_job(populated: Snapshotter) -> None:
    for key in ("base", "look"):
        job = Job()
        populated.usage(key, job)
        assert job.operation is None
