"""The calls of the contract on one state directory: Prepare, View, Commit and the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from snapd_native import linux
from snapd_native.errors import InvalidArgument, Unavailable
from snapd_native.filters import parse
from snapd_native.jobs import Job, Operation
from snapd_native.metastore import Record
from snapd_native.model import (
    Change,
    Info,
    Kind,
    Mount,
    Usage,
    check_labels,
    check_name,
    quote,
    quote_path,
    standby_number,
)
from snapd_native.snapshotter import digests
from snapd_native.snapshotter.background import Background
from snapd_native.snapshotter.contents import Contents
from snapd_native.snapshotter.directories import close_runtime
from snapd_native.snapshotter.failures import explained, unless_removed
from snapd_native.snapshotter.labels import changed, label_key
from snapd_native.snapshotter.mounter import Mounter
from snapd_native.snapshotter.opening import open_store
from snapd_native.snapshotter.reaping import Reaper
from snapd_native.snapshotter.standby import Standby
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.snapshotter.upkeep import Upkeep
from snapd_native.snapshotter.watching import Watch
from snapd_native.snapshotter.write_back import WriteBack

DEFAULT_LIMIT = 1000
"""Snapshots in a page of `Snapshotter.list`, unless the caller says."""

MAX_LIMIT = 10000
"""Snapshots in a page of `Snapshotter.list` at most."""

LEAST_FREE = 0.1
"""The part of a file system's space and inodes that standby clones leave free."""

RUNTIME = Path("/run/snapd-native")
"""Where mounts without a target are made, unless the caller says."""


class Snapshotter:
    """containerd's native snapshotter on one state directory.

    Every method may be called by any thread. Arguments are checked before the state is looked at,
    and a call that fails has changed nothing. No call waits for another one's copy: nothing is
    copied, measured or deleted inside a transaction. A ``job`` shows how far a call is, and can
    have it end with `Cancelled`, all undone.
    """

    def __init__(
        self,
        state: Path,
        announce: Callable[[Change], None],
        stopping: threading.Event | None = None,
        least_free: float = LEAST_FREE,
        runtime: Path = RUNTIME,
        soft_reboots: int = 0,
    ) -> None:
        """Open the state directory, delete what a crash or an earlier removal left, and remount.

        ``announce`` is told of each change after it is durable, in the order of the changes.
        Setting ``stopping`` is the same as `stop`, and stops this too. Standby clones are kept only
        where ``least_free`` of 1 is free of the file system's space and inodes. In ``runtime``
        are the directories for mounts without a target. ``soft_reboots`` counts the restarts of
        user space since the kernel was booted: each has unmounted all persistent mounts.

        Raises:
            Unavailable: another process uses the directory, ``stopping`` is set, or the kernel is
                older than 5.12.
            FailedPrecondition: the directory belongs to somebody else, or the database is no file.
            DataLoss: the database is damaged, gone, or was made by a newer version.
            ResourceExhausted: the disk is full.
        """
        if not linux.has_mount_setattr():
            raise Unavailable("the kernel is too old: boot Linux 5.12 or newer")
        self._stopping = stopping or threading.Event()
        self._watch = Watch(self._stopping)
        with explained(f"use {quote_path(str(state))}"), ExitStack() as undo:
            self._state = StateDirectory(state)
            undo.callback(self._state.close)
            self._store = open_store(self._state, announce)
            undo.callback(self._store.close)
            close_runtime(runtime)
            self.mounter = Mounter(
                self._state, self._store, runtime, self._stopping, linux.boot(soft_reboots)
            )
            """Mounts snapshots for others."""
            undo.callback(self.mounter.close)
            self._write_back = WriteBack(self._state, self._store, runtime / "doubt")
            self._contents = Contents(self._state, self._write_back)
            undo.callback(self._contents.close)
            self._syncer = Background("syncer", "a new snapshot could not be put on disk")
            undo.callback(self._syncer.close)
            self._syncer.submit(self._write_back.settle)
            self._reaper = Reaper(self._state, self._store, self._watch.check)
            undo.callback(self._reaper.close)
            self._store.count_changes()
            # The deletion of leftovers may have made the room that this needs.
            self._state.try_reflink()
            self._standby = Standby(self._state, self._store, self._write_back, least_free)
            undo.callback(self._standby.close)
            self._state.ballast.take()
            self.upkeep = Upkeep(
                self._state, self._store, self._contents, self.mounter, self._reaper, self._watch
            )
            """Checks, repairs and verifies all this."""
            self._resources = undo.pop_all()

    def check_health(self) -> None:
        """Read from the metastore; for a watchdog.

        Raises:
            DataLoss: it cannot be read.
        """
        self._store.check_health()

    def stop(self) -> None:
        """Make calls that copy, measure or wait fail soon with Unavailable, undoing their work."""
        self._stopping.set()

    def close(self) -> None:
        """Stop the background deletion and close everything; no call may be running."""
        self.stop()
        self._resources.close()

    @property
    def state_directory(self) -> Path:
        """Where everything lies."""
        return self._state.path

    @property
    def filesystem_type(self) -> str:
        """The type of the file system that holds the state, such as ``ext4``."""
        return self._state.filesystem_type

    @property
    def reflink(self) -> bool:
        """Whether copies share their data with the parent until either is changed."""
        return self._state.reflink

    def prepare(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        job: Job | None = None,
    ) -> Mount:
        """Make the active snapshot ``key``: empty, or a full private copy of ``parent``.

        What it is when this returns survives the end of the service. It survives a power cut once
        it has had some seconds to reach the disk, or was committed: otherwise it is gone then, as
        if it had never been.

        Raises:
            InvalidArgument: a name or label cannot be, or the parent is not committed.
            NotFound: there is no such parent.
            AlreadyExists: the key is taken.
            ResourceExhausted: no room.
            DataLoss: the parent's tree is damaged or gone.
        """
        return self._create(Kind.ACTIVE, key, parent, labels, job or Job())

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Mount:
        """Make the view ``key`` of ``parent``, or of nothing; raises as `prepare`."""
        return self._create(Kind.VIEW, key, parent, labels, Job())

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        parent: str = "",
        job: Job | None = None,
        digest: bool = False,
    ) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name``.

        When this returns, its data and its record survive a power cut. ``labels`` replace those
        it had. ``parent`` gives one to a snapshot that was prepared without. With ``digest``, or
        with the label `DIGEST_LABEL`, the digest of its tree is recorded in that label, for
        `verify`; a label that gives a digest is what that must be.

        Raises:
            InvalidArgument: a name or label cannot be, or the parent is another or not committed.
            AlreadyExists: the name is taken.
            NotFound: there is no such key or parent.
            FailedPrecondition: the key is not active, or has another digest than its label says.
            ResourceExhausted: no room.
            DataLoss: its tree could not be read or written.
        """
        check_name(name, "name")
        check_name(key)
        if parent:
            check_name(parent, "parent")
        stored = check_labels(labels or {})
        digest = digests.wanted(stored, digest)
        job = job or Job()
        with ExitStack() as undo:
            held = self._store.reserve_commit(name, key, parent)
            undo.callback(self._store.release, held)
            job.begin(Operation.COMMIT, key)
            # Most of it is on its way to the disk while the tree is measured.
            self._syncer.submit(self._write_back.sync)
            with self.mounter.frozen(key, held.id):
                with explained(f"commit {quote(key)}"):
                    usage = self._contents.measure(held.id, self._watch.over(job))
                    if digest:
                        found = self._contents.digest(held.id, self._watch.over(job, count=False))
                        stored = digests.recorded(key, stored, found)
                    self._contents.sync(held.id)
                job.conclude()
                self._store.publish_commit(held, usage, stored)
        self._standby.look()

    def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view.

        Raises:
            InvalidArgument: the key cannot be.
            NotFound: there is no such key.
            FailedPrecondition: it is committed.
            DataLoss: its directory is gone.
        """
        record = self._store.get(check_name(key))
        record.check_mountable()
        with unless_removed(self._store, record), explained(f"mount {quote(key)}"):
            self._state.check(record.tree_id)
        return self._mount(record.info.kind, record.tree_id)

    def stat(self, key: str) -> Info:
        """Return a snapshot's record.

        Raises:
            InvalidArgument: the key cannot be.
            NotFound: there is no such snapshot.
        """
        return self._store.get(check_name(key)).info

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Info:
        """Set labels of a snapshot and return its record as it is then.

        The field path ``labels`` replaces all, ``labels.KEY`` sets that one, or deletes it if
        ``labels`` has no or an empty value for it. Paths are applied in their order; none means
        ``labels``. As containerd's ``storage.UpdateInfo``.

        Raises:
            InvalidArgument: the name, a label or a path cannot be.
            NotFound: there is no such snapshot.
        """
        check_name(name, "name")
        given = check_labels(labels)
        keys = [label_key(path) for path in fieldpaths or ("labels",)]
        info = self._store.update(name, partial(changed, given=given, keys=keys))
        self._standby.look()
        return info

    def standby(self, name: str) -> tuple[int, int]:
        """Return how many standby clones of a snapshot are complete, and how many it wants.

        Raises:
            InvalidArgument: the name cannot be.
            NotFound: there is no such snapshot.
        """
        record = self._store.get(check_name(name, "name"))
        if record.info.kind is not Kind.COMMITTED:
            return 0, 0
        return self._standby.count(record.id), standby_number(record.info.labels)

    def usage(self, key: str, job: Job | None = None) -> Usage:
        """Return what a snapshot takes: measured now if active, as of Commit if committed.

        A view takes nothing.

        Raises:
            InvalidArgument: the key cannot be.
            NotFound: there is no such snapshot.
            FailedPrecondition: its directories are moved while it is measured.
            DataLoss: its tree is damaged or gone.
        """
        record = self._store.get(check_name(key))
        if record.usage is not None:
            return record.usage
        if record.info.kind is Kind.VIEW:
            return Usage(0, 0)
        job = job or Job()
        job.begin(Operation.USAGE, key)
        report = self._watch.over(job)
        with (
            job.turn(report),
            unless_removed(self._store, record),
            explained(f"measure {quote(key)}"),
        ):
            usage = self._contents.measure(record.id, report)
        job.conclude()
        return usage

    def list(
        self,
        filters: Sequence[str] = (),
        after: str = "",
        limit: int = DEFAULT_LIMIT,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> list[Info]:
        """Return a page of the snapshots that match any filter, by name in byte order.

        A page begins after the name ``after``; one shorter than ``limit`` is the last. The work
        ends when it is not wanted any more.

        Raises:
            Cancelled: it is not.
            InvalidArgument: a filter is wrong or too slow, or the limit is not 1 to `MAX_LIMIT`.
            ResourceExhausted: the page is too large; a smaller limit helps.
        """
        chosen = parse(filters)
        if after:
            check_name(after, "name to list after")
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidArgument(f"invalid limit {limit}: give 1 to {MAX_LIMIT}")
        return self._store.list(chosen, after, limit, is_wanted)

    def remove(self, key: str) -> None:
        """Forget a snapshot; its data is deleted in the background.

        Raises:
            InvalidArgument: the key cannot be.
            NotFound: there is no such snapshot.
            FailedPrecondition: it has children, is being committed, or is mounted.
        """
        check_name(key)
        with self.mounter.unmounted() as check, explained(f"remove {quote(key)}"):
            record = self._store.remove(key, check)
            self._reaper.retire(record)
        # Removing may have needed it, and leaves some of it.
        self._state.ballast.take()
        self._standby.look()

    def _create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str] | None, job: Job
    ) -> Mount:
        check_name(key)
        if parent:
            check_name(parent, "parent")
        stored = check_labels(labels or {})
        with ExitStack() as undo:
            held = self._store.reserve(key, parent)
            undo.callback(self._store.release, held)
            if kind is Kind.ACTIVE:
                job.begin(Operation.PREPARE, key, held.parent.usage if held.parent else None)
            doing = f"{'view' if kind is Kind.VIEW else 'prepare'} {quote(key)}"
            boot = None
            with explained(f"{doing} from {quote(parent)}" if parent else doing):
                if held.parent is None:
                    undo.callback(self._reaper.discard, held.id)
                    self._state.create_empty(held.id)
                elif kind is Kind.ACTIVE:
                    undo.callback(self._reaper.discard, held.id)
                    on_disk = self._make_tree(held.id, held.parent, job)
                    boot = None if on_disk else self._state.mounting
                else:
                    self._state.check(held.parent.id)
            job.conclude()
            self._store.publish(held, kind, stored, boot)
            undo.pop_all()
        if boot is not None:
            self._syncer.submit(self._write_back.settle)
        shown = held.parent if kind is Kind.VIEW and held.parent else held
        return self._mount(kind, shown.id)

    def _make_tree(self, id_: int, parent: Record, job: Job) -> bool:
        """Make the directory of a new snapshot: one that stands by, or a copy of its parent's.

        Tell whether it is on disk.
        """
        report = self._watch.over(job)
        ready = self._standby.take(parent.id)
        if ready:
            if self._state.adopt_standby(ready, id_):
                report(job.total.inodes, job.total.size)
                return True
            self._standby.refuse(ready)
        self._contents.copy(id_, parent.id, report)
        return False

    def _mount(self, kind: Kind, tree: int) -> Mount:
        options = ("rbind", "ro" if kind is Kind.VIEW else "rw")
        return Mount("bind", self._state.source(tree), options)
