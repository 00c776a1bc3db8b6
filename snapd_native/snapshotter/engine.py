"""The calls of the contract on one state directory: Prepare, View, Commit and the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from snapd_native import linux
from snapd_native.errors import FailedPrecondition, InvalidArgument, Unavailable
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
from snapd_native.snapshotter.background import Background
from snapd_native.snapshotter.failures import explained, unless_removed
from snapd_native.snapshotter.labels import update_of, wants_digest, with_digest
from snapd_native.snapshotter.mounter import Mounter
from snapd_native.snapshotter.reaping import Reaper
from snapd_native.snapshotter.sealing import Seals
from snapd_native.snapshotter.standby import Standby
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.snapshotter.state.privacy import close_runtime
from snapd_native.snapshotter.upkeep import Upkeep
from snapd_native.snapshotter.workers import Workers
from snapd_native.snapshotter.write_back import WriteBack

DEFAULT_LIMIT = 1000
"""Snapshots in a page of `Snapshotter.list` by default."""

MAX_LIMIT = 10000
"""Snapshots in a page of `Snapshotter.list` at most."""

LEAST_FREE = 0.1
"""The share of a file system's space and inodes that standby clones leave free."""

RUNTIME = Path("/run/snapd-native")
"""The default directory for mounts without a target."""


class Snapshotter:
    """containerd's native snapshotter on one state directory.

    All methods are thread-safe. Arguments are checked first, and a call that fails has changed
    nothing. No call waits for the copy of another call: nothing is copied, measured or deleted
    inside a transaction. A ``job`` shows the progress of a call. When it is cancelled, the call
    undoes its changes and raises `Cancelled`.
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
        """Open the state directory, delete leftovers of crashes and removals, and mount again.

        ``announce`` is called for each change after it is durable, in the order of the changes.
        Setting ``stopping`` is the same as `stop`, and ends this constructor too. Standby clones
        leave the share ``least_free`` (0 to 1) of the space and inodes free. ``runtime`` contains
        the directories for mounts without a target. ``soft_reboots`` counts the restarts of user
        space since the kernel was booted: each has unmounted all persistent mounts.

        Raises:
            Unavailable: another process uses the directory or the database, ``stopping`` is set,
                or the kernel is older than 5.12.
            FailedPrecondition: another user owns the directory, the database is not a file, or
                the process may not mount or make files immutable.
            DataLoss: the database is damaged, gone, or was made by a newer version.
            ResourceExhausted: the disk is full.
        """
        if not linux.has_mount_setattr():
            raise Unavailable("the kernel is too old: boot Linux 5.12 or newer")
        if not linux.may_mount():
            raise FailedPrecondition(
                "the kernel does not permit mounts here: run the service on the host,"
                " or give its container the capability CAP_SYS_ADMIN"
            )
        self._stopping = stopping or threading.Event()
        with explained(f"use {quote_path(str(state))}"), ExitStack() as undo:
            self._state = StateDirectory(state)
            undo.callback(self._state.close)
            self._store = self._state.open_store(announce)
            undo.callback(self._store.close)
            close_runtime(runtime)
            self.mounter = Mounter(
                self._state, self._store, runtime, self._stopping, linux.boot(soft_reboots)
            )
            """Mounts snapshots for others."""
            undo.callback(self.mounter.close)
            self._write_back = WriteBack(self._state, self._store, runtime / "doubt")
            self._workers = Workers(self._state)
            undo.callback(self._workers.close)
            self._seals = Seals(self._state, self._store, self._workers, self._stopping)
            self._syncer = Background("syncer", "a new snapshot could not be put on disk")
            undo.callback(self._syncer.close)
            self._syncer.submit(self._write_back.settle)
            self._reaper = Reaper(self._state, self._store, self._stopping)
            undo.callback(self._reaper.close)
            self._store.count_changes()
            # This needs space, which the deletion of leftovers may have freed.
            self._state.try_reflink()
            self._state.try_sealing()
            self._standby = Standby(self._state, self._store, self._write_back, least_free)
            undo.callback(self._standby.close)
            self._state.ballast.take()
            self.upkeep = Upkeep(
                self._state,
                self._store,
                self._workers,
                self.mounter,
                self._reaper,
                self._seals,
                self._stopping,
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
        """Let calls that copy, measure or wait undo their work and raise Unavailable."""
        self._stopping.set()

    def close(self) -> None:
        """End the work in the background and close everything; no call may be running."""
        self.stop()
        self._resources.close()

    @property
    def state_directory(self) -> Path:
        """The state directory."""
        return self._state.path

    @property
    def filesystem_type(self) -> str:
        """The type of the file system of the state directory, such as ``ext4``."""
        return self._state.filesystem_type

    @property
    def reflink(self) -> bool:
        """Whether copies are made by reflink."""
        return self._state.reflink

    def prepare(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        job: Job | None = None,
    ) -> Mount:
        """Create the active snapshot ``key``: empty, or a full private copy of ``parent``.

        It survives an end of the service at once. It survives a power cut after some seconds, when
        it is on disk, or when it was committed; before that a power cut removes it completely.

        Raises:
            InvalidArgument: a name or label is invalid, or the parent is not committed.
            NotFound: the parent does not exist.
            AlreadyExists: the key is taken.
            ResourceExhausted: the disk is full.
            DataLoss: the tree of the parent is damaged or gone.
        """
        return self._create(Kind.ACTIVE, key, parent, labels, job or Job())

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Mount:
        """Create the view ``key`` of ``parent``, or an empty one; raises as `prepare`."""
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
        """Turn the active snapshot ``key`` into the committed snapshot ``name``.

        When this returns, its data and its record survive a power cut. ``labels`` replace the old
        ones. ``parent`` becomes the parent of a snapshot that was prepared without one. With
        ``digest``, or with the label `DIGEST_LABEL`, the digest of the tree is recorded in that
        label for `verify`. If the label already contains a digest, the tree must have it.

        Raises:
            InvalidArgument: a name or label is invalid, the snapshot has another parent, or the
                parent is not committed.
            AlreadyExists: the name is taken.
            NotFound: the key or the parent does not exist.
            FailedPrecondition: the key is not active, or its tree has not the digest of the label.
            ResourceExhausted: the disk is full.
            DataLoss: the tree could not be read or written.
        """
        check_name(name, "name")
        check_name(key)
        if parent:
            check_name(parent, "parent")
        stored = check_labels(labels or {})
        digest = wants_digest(stored, digest)
        job = job or Job()
        with ExitStack() as undo:
            held = self._store.reserve_commit(name, key, parent)
            undo.callback(self._store.release, held)
            job.begin(Operation.COMMIT, key, stopping=self._stopping)
            # The data is written to the disk while the tree is sealed.
            self._syncer.submit(self._write_back.sync)
            with self.mounter.frozen(key, held.id), ExitStack() as sealed:
                with explained(f"commit {quote(key)}"):
                    usage = sealed.enter_context(self._seals.sealed(key, held.id, job.report))
                    if digest:
                        # The tree counts once in the progress of the job.
                        found = self._workers.digest(held.id, lambda *_: job.report(0, 0))
                        stored = with_digest(key, stored, found)
                    self._write_back.sync_tree(held.id)
                job.conclude()
                self._store.publish_commit(held, usage, stored)
        self._standby.wake()

    def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view.

        Raises:
            InvalidArgument: the key is invalid.
            NotFound: it does not exist.
            FailedPrecondition: it is committed.
            DataLoss: its directory is gone.
        """
        record = self._store.get(check_name(key))
        record.check_mountable()
        with unless_removed(self._store, record), explained(f"mount {quote(key)}"):
            self._state.check_exists(record.tree_id)
        return self._mount(record.info.kind, record.tree_id)

    def stat(self, key: str) -> Info:
        """Return the record of a snapshot.

        Raises:
            InvalidArgument: the key is invalid.
            NotFound: it does not exist.
        """
        return self._store.get(check_name(key)).info

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Info:
        """Set labels of a snapshot and return the new record.

        The field path ``labels`` replaces all labels. ``labels.KEY`` sets that one, or deletes it
        if its value in ``labels`` is missing or empty. Paths are applied in order; no path means
        ``labels``. This is containerd's ``storage.UpdateInfo``.

        Raises:
            InvalidArgument: the name, a label or a path is invalid.
            NotFound: the snapshot does not exist.
        """
        info = self._store.update(check_name(name, "name"), update_of(labels, fieldpaths))
        self._standby.wake()
        return info

    def standby(self, name: str) -> tuple[int, int]:
        """Return how many standby clones of a snapshot are complete, and how many it wants.

        Raises:
            InvalidArgument: the name is invalid.
            NotFound: the snapshot does not exist.
        """
        record = self._store.get(check_name(name, "name"))
        if record.info.kind is not Kind.COMMITTED:
            return 0, 0
        return self._standby.count(record.id), standby_number(record.info.labels)

    def usage(self, key: str, job: Job | None = None, *, idle: bool = False) -> Usage:
        """Return the usage of a snapshot: measured now if active, by Commit if committed.

        The usage of a view is zero. With ``idle``, measure at idle priority.

        Raises:
            InvalidArgument: the key is invalid.
            NotFound: it does not exist.
            FailedPrecondition: directories are moved while it is measured.
            DataLoss: the tree is damaged or gone.
        """
        record = self._store.get(check_name(key))
        if record.usage is not None:
            return record.usage
        if record.info.kind is Kind.VIEW:
            return Usage(0, 0)
        job = job or Job()
        job.begin(Operation.USAGE, key, stopping=self._stopping)
        with job.turn(), unless_removed(self._store, record), explained(f"measure {quote(key)}"):
            usage = self._workers.measure(record.id, job.report, idle=idle)
        job.conclude()
        return usage

    def list(
        self,
        filters: Sequence[str] = (),
        after: str = "",
        limit: int = DEFAULT_LIMIT,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> list[Info]:
        """Return a page of the snapshots that match a filter, in byte order of names.

        The page begins after the name ``after``. A page with less than ``limit`` snapshots is the
        last. ``is_wanted`` is called now and then.

        Raises:
            Cancelled: ``is_wanted`` returned false.
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
        """Remove a snapshot; its data is deleted in the background.

        Raises:
            InvalidArgument: the key is invalid.
            NotFound: it does not exist.
            FailedPrecondition: it has children, is being committed, or is mounted.
        """
        check_name(key)
        with self.mounter.unmounted() as check, explained(f"remove {quote(key)}"):
            record = self._store.remove(key, check)
            self._reaper.retire(record)
        # The removal may have freed the ballast.
        self._state.ballast.take()
        self._standby.wake()

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
                total = held.parent.usage if held.parent else None
                job.begin(Operation.PREPARE, key, total, self._stopping)
            doing = f"{'view' if kind is Kind.VIEW else 'prepare'} {quote(key)}"
            boot = None
            with explained(f"{doing} from {quote(parent)}" if parent else doing):
                if held.parent is None:
                    undo.callback(self._reaper.discard, held.id)
                    self._state.create_empty(held.id, sealed=kind is Kind.VIEW)
                elif kind is Kind.ACTIVE:
                    undo.callback(self._reaper.discard, held.id)
                    on_disk = self._make_tree(held.id, held.parent, job)
                    boot = None if on_disk else self._state.mounting
                else:
                    self._state.check_exists(held.parent.id)
            job.conclude()
            self._store.publish(held, kind, stored, boot)
            undo.pop_all()
        if boot is not None:
            self._syncer.submit(self._write_back.settle)
        shown = held.parent if kind is Kind.VIEW and held.parent else held
        return self._mount(kind, shown.id)

    def _make_tree(self, id_: int, parent: Record, job: Job) -> bool:
        """Create the tree of a new snapshot: from a standby clone, or by a copy of the parent.

        Return whether it is on disk.
        """
        ready = self._standby.take(parent.id)
        if ready:
            if self._state.adopt_standby(ready, id_):
                job.report(job.total.inodes, job.total.size)
                return True
            self._standby.refuse(ready)
        self._workers.copy(id_, parent.id, job.report)
        return False

    def _mount(self, kind: Kind, tree: int) -> Mount:
        options = ("rbind", "ro" if kind is Kind.VIEW else "rw")
        return Mount("bind", self._state.source(tree), options)
