"""Check and repair the agreement of records, directories and mounts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

from snapd_native import trees
from snapd_native.errors import DataLoss, FailedPrecondition
from snapd_native.jobs import Job, Operation
from snapd_native.metastore import Metastore
from snapd_native.model import DIGEST_LABEL, Finding, Trouble, check_name, is_name, quote
from snapd_native.snapshotter.failures import explained, unless_removed
from snapd_native.snapshotter.labels import recorded_digest
from snapd_native.snapshotter.mounter import Mounter
from snapd_native.snapshotter.reaping import Reaper
from snapd_native.snapshotter.sealing import Seals
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.snapshotter.workers import Workers

_POLL_SECONDS = 0.05
"""Seconds after which a waiting caller checks again whether its own job is cancelled."""

_T = TypeVar("_T")


class Upkeep:
    """Checks, repairs and verifies a state. A method raises `Cancelled` if its ``job`` is."""

    def __init__(
        self,
        state: StateDirectory,
        store: Metastore,
        workers: Workers,
        mounter: Mounter,
        reaper: Reaper,
        seals: Seals,
        stopping: threading.Event,
    ) -> None:
        self._state = state
        self._store = store
        self._workers = workers
        self._mounter = mounter
        self._reaper = reaper
        self._seals = seals
        self._stopping = stopping
        self._checks: Shared[Sequence[Finding]] = Shared()

    def cleanup(self, job: Job | None = None) -> None:
        """Wait until all pending deletions are done and no orphan is left.

        Raises:
            FailedPrecondition: something in a directory is mounted on, protected, or leased.
            Unavailable: the service is stopping.
        """
        job = job or Job()
        job.begin(Operation.CLEANUP, "", stopping=self._stopping)
        with explained("delete what was removed"):
            try:
                self._reaper.finish(job.report)
            except PermissionError:
                raise FailedPrecondition(
                    "cannot delete what was removed: some of it is immutable, append-only or an"
                    " active swap file, chattr -R -f -ia the directories rm-* of the state"
                    " directory, or swapoff"
                ) from None
            except BlockingIOError:
                raise FailedPrecondition(
                    "cannot delete what was removed: a process has a lease on a file in it, try"
                    " again in a minute, or end the process, which /proc/locks names"
                ) from None
        job.conclude()

    def check(self, job: Job | None = None) -> Sequence[Finding]:
        """Return all findings, after the running deletions are done.

        Nothing is changed. Changes by other calls are not findings. One check runs at a time; calls
        during a check share the result of the next one.
        """
        job = job or Job()
        job.begin(Operation.CHECK, "", stopping=self._stopping)
        with explained("check the state"):
            found = self._checks.run(self._findings, job.report)
        job.conclude()
        return found

    def repair(self, job: Job | None = None) -> Sequence[Finding]:
        """Repair what `check` finds without loss or guess; return what is repaired.

        Other users are denied the files of the service. Trees of committed snapshots are made
        immutable. Indexes of the database are rebuilt from its tables. What no snapshot owns is
        deleted, as by `cleanup`. Mounts are made as the ledger records them.
        """
        job = job or Job()
        job.begin(Operation.REPAIR, "", stopping=self._stopping)
        with explained("repair the state"):
            found = self._findings(job.report)
            job.conclude()
            if not found:
                return []
            for step in (
                self._state.close_to_others,
                self._store.repair,
                partial(self._reaper.finish, job.report),
                self._mounter.repair,
                partial(self._seals.repair, job.report),
            ):
                with suppress(DataLoss, OSError):
                    step()
            left = self._findings(job.report)
        return [finding for finding in found if finding not in left]

    def verify(self, name: str, job: Job | None = None) -> str:
        """Compare the tree of a committed snapshot with the recorded digest, and return that.

        The whole tree is read from the disk, at idle priority.

        Raises:
            InvalidArgument: the name is invalid.
            NotFound: the snapshot does not exist.
            FailedPrecondition: it has no digest.
            DataLoss: the tree has another digest, is damaged, or is gone.
        """
        record = self._store.get(check_name(name, "name"))
        expected = recorded_digest(record)
        job = job or Job()
        job.begin(Operation.VERIFY, name, record.usage, self._stopping)
        with job.turn(), unless_removed(self._store, record), explained(f"verify {quote(name)}"):
            found = self._workers.digest(record.id, job.report, from_disk=True)
        if found != expected:
            raise DataLoss(
                f"{quote(name)} is not what was committed: its tree was changed or damaged,"
                " check the disk and restore it from a backup"
            )
        job.conclude()
        return record.info.labels[DIGEST_LABEL]

    def _findings(self, report: trees.Report) -> list[Finding]:
        found: list[Finding] = []
        for part in (
            self._state.findings,
            self._store.findings,
            self._lost,
            partial(self._left, report),
            self._set_aside,
            self._mounter.findings,
            self._seals.findings,
        ):
            try:
                found.extend(part())
            except DataLoss as error:
                found.append(Finding(Trouble.DATABASE, "", error.message))
        return [*dict.fromkeys(found)]

    def _lost(self) -> Iterator[Finding]:
        """Yield the snapshots without a directory."""
        before = self._store.directories()
        there = self._state.ids()
        # Ids are never reused, so a record that is seen before and after existed all the time.
        for id_, name in self._store.directories().items():
            if id_ in before and id_ not in there:
                what = "its directory is gone: restore it from a backup, or remove the snapshot"
                yield Finding(Trouble.TREE, name if is_name(name) else "", what)

    def _left(self, report: trees.Report) -> Iterator[Finding]:
        """Yield the directories without a snapshot."""
        before = set(self._reaper.orphans())
        # This waits for a Remove that has deleted the record but not yet renamed the directory.
        with self._mounter.unmounted():
            pass
        self._reaper.catch_up(report)
        for name in sorted(before.intersection(self._reaper.orphans())):
            if name.startswith("rm-"):
                what = f"{name} was removed and is not deleted: call Cleanup, which says why"
                yield Finding(Trouble.LEFTOVER, "", what)
            else:
                yield Finding(Trouble.ORPHAN, "", f"{name} is no snapshot's: call Cleanup")

    def _set_aside(self) -> Iterator[Finding]:
        """Yield the trees that were set aside."""
        for name, prefix, _ in self._state.listing():
            if prefix == "found-":
                what = (
                    f"{name} is a tree whose record was lost: restore a metadata.db that has it and"
                    " restart the service, or move the tree away"
                )
                yield Finding(Trouble.ORPHAN, "", what)


class Shared(Generic[_T]):
    """Runs work for one caller at a time. Calls during a run share the result of the next run.

    A caller never gets the result of a run that began before its call.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        """The number of the last run."""
        self._is_running = False
        self._succeeded = 0
        """The last run that has a result."""
        self._result: _T

    def run(self, work: Callable[[trees.Report], _T], report: trees.Report) -> _T:
        """Return the result of a run of ``work`` that begins now or later.

        ``report`` is called with the progress of the run, or while another caller runs it. It may
        raise; then the next caller does the work.
        """
        with self._changed:
            wanted = self._begun + 1
            while self._is_running:
                self._changed.wait(_POLL_SECONDS)
                report(0, 0)
                if self._succeeded >= wanted:
                    return self._result
            if self._succeeded >= wanted:
                return self._result
            self._begun += 1
            own = self._begun
            self._is_running = True
        try:
            result = work(report)
            with self._changed:
                self._succeeded, self._result = own, result
            return result
        finally:
            with self._changed:
                self._is_running = False
                self._changed.notify_all()
