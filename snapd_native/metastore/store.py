"""Record, reserve, find and delete snapshots."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from snapd_native.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument
from snapd_native.filters import Filter
from snapd_native.metastore import listing, records
from snapd_native.metastore.connections import Connections, transaction
from snapd_native.metastore.ledger import Ledger, turn_read_only
from snapd_native.metastore.records import Record
from snapd_native.metastore.reservations import Reservation, Reservations
from snapd_native.metastore.rules import broken_rules, repair
from snapd_native.metastore.schema import ensure_schema
from snapd_native.model import (
    STANDBY_LABEL,
    Added,
    Change,
    Committed,
    Finding,
    Info,
    Kind,
    Removed,
    Trouble,
    Updated,
    Usage,
    quote,
    standby_number,
)


class Metastore:
    """The records of all snapshots. Each change is one short transaction.

    ``announce`` is called for each change after it is durable, in the order of the changes.
    """

    def __init__(
        self,
        path: Path,
        announce: Callable[[Change], None],
        first_id: int = 1,
        make_room: Callable[[], bool] = lambda: False,
        *,
        may_be_new: bool = True,
    ) -> None:
        """Open or create the database. The ids of new snapshots are ``first_id`` or higher.

        ``make_room`` is called when the disk is too full for a deletion. It returns whether it has
        freed something.

        Raises:
            FailedPrecondition: the path is not a file.
            Unavailable: another process has the database open.
            DataLoss: it is damaged; or it is new and ``may_be_new`` is false.
        """
        self._announce = announce
        self._connections = Connections(path, make_room)
        self.ledger = Ledger(self._connections)
        with ExitStack() as undo:
            undo.callback(self._connections.close)
            with self._connections.writing() as db:
                ensure_schema(db, may_be_new=may_be_new)
                self._reservations = Reservations(max(records.last_id(db) + 1, first_id))
            self.lost_changes = self._connections.lost_changes()
            undo.pop_all()

    def close(self) -> None:
        """Close the database."""
        self._connections.close()

    def check_health(self) -> None:
        """Check that the database can be read."""
        with self._connections.reading() as db:
            db.execute("SELECT 1 FROM snapshots LIMIT 1").fetchone()

    def get(self, key: str) -> Record:
        """Return the record of a snapshot.

        Raises:
            NotFound: it does not exist, or is still being prepared.
        """
        with self._connections.reading() as db:
            return records.get(db, key)

    def get_mountable(self, key: str) -> Record:
        """Return the record of a view, or of an active snapshot that no Commit is running for.

        Raises:
            NotFound: it does not exist.
            FailedPrecondition: it is committed, or a Commit is running.
        """
        with self._connections.writing() as db:
            record = records.get(db, key)
            record.check_mountable()
            self._reservations.check_not_committing(record, "mount")
        return record

    def list(
        self, chosen: Filter, after: str, limit: int, is_wanted: Callable[[], bool] = lambda: True
    ) -> list[Info]:
        """Return the first ``limit`` matching snapshots after ``after``, in byte order of names.

        Damaged records are left out. ``is_wanted`` is called before each record.

        Raises:
            Cancelled: ``is_wanted`` returned false.
            InvalidArgument: the filters take too long.
            ResourceExhausted: the page is over `listing.MAX_PAGE`.
        """
        with self._connections.reading() as db:
            return listing.page(db, chosen, after, limit, is_wanted)

    def directories(self) -> Mapping[int, str]:
        """Return the ids and names of all snapshots that own a directory."""
        with self._connections.reading() as db:
            return dict(
                db.execute(
                    "SELECT id, name FROM snapshots WHERE kind IS NOT 'view' OR parent IS NULL"
                )
            )

    def of_kind(self, kind: Kind) -> Mapping[int, str]:
        """Return the ids and names of all snapshots of a kind."""
        with self._connections.reading() as db:
            return dict(db.execute("SELECT id, name FROM snapshots WHERE kind = ?", [str(kind)]))

    def findings(self) -> Sequence[Finding]:
        """Return what is damaged in the database, and which of its rules are broken."""
        lost = self.lost_changes
        found = []
        if lost:
            what = f"metadata.db has lost {lost} changes: restore it from a newer backup"
            found.append(Finding(Trouble.DATABASE, "", what))
        try:
            self._connections.check_in_place()
        except DataLoss as error:
            found.append(Finding(Trouble.DATABASE, "", error.message))
        with self._connections.reading() as db:
            return [*found, *(broken.finding for broken in broken_rules(db))]

    def is_whole(self) -> bool:
        """Tell whether the database is complete: then directories without a record may go."""
        try:
            return not self.findings()
        except DataLoss:
            return False

    def count_changes(self) -> None:
        """Accept the number of changes that the database has; see `lost_changes`.

        Until this is called, each start reports the same loss.
        """
        self._connections.count_changes()

    def repair(self) -> None:
        """Repair those findings that can be repaired without loss or guess."""
        with self._connections.reading() as db:
            broken = broken_rules(db)
        with self._connections.writing() as db:
            repair(db, broken)
            self._reservations.skip(records.last_id(db))

    def last_id(self) -> int:
        """Return the highest id so far."""
        with self._connections.lock:
            return self._reservations.last_id

    def reserved(self) -> set[int]:
        """Return the ids of all reservations."""
        with self._connections.lock:
            return self._reservations.ids()

    def reserve(self, key: str, parent: str) -> Reservation:
        """Reserve ``key`` for a new snapshot of ``parent``; the parent cannot be removed meanwhile.

        The order of checks is that of containerd's ``storage.CreateSnapshot``.

        Raises:
            NotFound: the parent does not exist.
            InvalidArgument: the parent is not committed.
            AlreadyExists: the key is taken or reserved.
        """
        with self._connections.writing() as db:
            base = records.committed_parent(db, parent) if parent else None
            self._check_free(db, key, "key")
            return self._reservations.hold(key, base)

    def reserve_commit(self, name: str, key: str, parent: str) -> Reservation:
        """Reserve ``name`` for the Commit of ``key``; neither it nor its parent can be removed.

        The order of checks is that of containerd's ``storage.CommitActive``. ``parent`` becomes the
        parent of a snapshot that has none.

        Raises:
            AlreadyExists: the name is taken or reserved.
            NotFound: the key or the parent does not exist.
            FailedPrecondition: the key is not active, or is being committed already.
            InvalidArgument: the snapshot has another parent, or the parent is not committed.
            DataLoss: the parent that it was prepared from is missing.
        """
        with self._connections.writing() as db:
            self._check_free(db, name, "name")
            record = records.get(db, key)
            if record.info.kind is not Kind.ACTIVE:
                kind = records.described(record.info.kind)
                raise FailedPrecondition(f"cannot commit {quote(key)}: it is {kind}, not active")
            self._reservations.check_not_committing(record, "commit")
            records.check_parent(db, record)
            base = None
            if parent and record.info.parent not in ("", parent):
                raise InvalidArgument(
                    f"cannot commit {quote(key)} with the parent {quote(parent)}:"
                    f" it was prepared from {quote(record.info.parent)}"
                )
            if parent:
                base = records.committed_parent(db, parent)
            return self._reservations.hold_commit(name, record, base)

    def release(self, reservation: Reservation) -> None:
        """End a reservation; one that was published has ended already."""
        with self._connections.lock:
            self._reservations.release(reservation)

    def publish(
        self,
        reservation: Reservation,
        kind: Kind,
        labels: Mapping[str, str],
        boot: str | None = None,
    ) -> None:
        """Turn a reservation of `reserve` into a snapshot, durably.

        ``boot``, a `linux.mounting_id`, means that the tree is not on disk yet. Until `settle` is
        called, the snapshot exists only during that mounting; see `forget_unsettled`.
        """
        parent = reservation.parent
        with self._connections.writing() as db:
            now = _now()
            with transaction(db):
                db.execute(
                    "INSERT INTO snapshots"
                    " (id, name, kind, parent, created, updated, labels, boot)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        reservation.id,
                        reservation.name,
                        kind.value,
                        parent.id if parent else None,
                        now,
                        now,
                        records.packed(labels),
                        boot,
                    ),
                )
            self._reservations.release(reservation)
            self._announce(Added(reservation.name, kind, parent.info.name if parent else ""))

    def publish_commit(
        self, reservation: Reservation, usage: Usage, labels: Mapping[str, str]
    ) -> None:
        """Turn a reservation of `reserve_commit` into the committed snapshot, durably.

        The labels are replaced, and the times of creation and update are now, as in containerd's
        ``storage.CommitActive``.
        """
        record = reservation.committing
        assert record is not None  # noqa: S101 - reserve_commit sets it
        parent_id = reservation.parent.id if reservation.parent else record.parent_id
        with self._connections.writing() as db:
            now = _now()
            with transaction(db):
                db.execute(
                    "UPDATE snapshots SET name = ?, kind = 'committed', parent = ?, created = ?,"
                    " updated = ?, labels = ?, size = ?, inodes = ?, boot = NULL WHERE id = ?",
                    (
                        reservation.name,
                        parent_id,
                        now,
                        now,
                        records.packed(labels),
                        usage.size,
                        usage.inodes,
                        record.id,
                    ),
                )
                turn_read_only(db, record.id)
            self._reservations.release(reservation)
            self._announce(Committed(reservation.name, record.info.name))

    def standbys(self) -> Mapping[int, tuple[int, Usage]]:
        """Return, by id, how many standby clones a snapshot wants, and the usage of one."""
        with self._connections.reading() as db:
            rows = db.execute(
                f"SELECT {records.COLUMNS} WHERE s.kind = 'committed'"
                f" AND instr(s.labels, '{STANDBY_LABEL}') > 0"
            )
            found = {
                record.id: (standby_number(record.info.labels), record.usage)
                for record in map(records.readable, rows)
                if record and record.usage
            }
            return {id_: wanted for id_, wanted in found.items() if wanted[0]}

    def unsettled(self) -> set[int]:
        """Return the ids of snapshots whose trees are perhaps not on disk yet."""
        with self._connections.reading() as db:
            return {id_ for (id_,) in db.execute("SELECT id FROM snapshots WHERE boot IS NOT NULL")}

    def settle(self, ids: Iterable[int]) -> None:
        """Record that the trees of snapshots are on disk."""
        with self._connections.writing() as db, transaction(db):
            db.executemany("UPDATE snapshots SET boot = NULL WHERE id = ?", ((id_,) for id_ in ids))

    def forget_unsettled(self, boot: str) -> Sequence[str]:
        """Delete the records of unsettled snapshots of other mountings; return their names."""
        with self._connections.writing() as db, transaction(db):
            rows = db.execute(
                "DELETE FROM snapshots WHERE kind = 'active' AND boot <> ? RETURNING name", (boot,)
            )
            return [name for (name,) in rows.fetchall()]

    def update(self, name: str, change: Callable[[Info], Mapping[str, str]]) -> Info:
        """Replace the labels of a snapshot by what ``change`` returns, durably.

        Raises:
            NotFound: it does not exist.
            SnapdError: what ``change`` raises; nothing is changed then.
        """
        with self._connections.writing() as db:
            with transaction(db):
                record = records.get(db, name)
                db.execute(
                    "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
                    (records.packed(change(record.info)), _now(), record.id),
                )
                updated = records.get(db, name).info
            self._announce(Updated(name))
        return updated

    def remove(self, key: str, check: Callable[[Record], None] = lambda _: None) -> Record:
        """Delete the record of a snapshot durably, unless ``check`` raises; return it.

        The record may be damaged.

        Raises:
            NotFound: it does not exist.
            FailedPrecondition: it has children, or a running call uses it.
        """
        with self._connections.writing() as db:
            record = records.get_even_damaged(db, key)
            child = "SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1"
            has_child = db.execute(child, (record.id,)).fetchone()
            if has_child or self._reservations.is_parent(record):
                raise FailedPrecondition(
                    f"cannot remove {quote(key)}: it has children, remove them first"
                )
            self._reservations.check_not_committing(record, "remove")
            check(record)
            self._connections.delete(db, "DELETE FROM snapshots WHERE id = ?", [(record.id,)])
            self._announce(Removed(key))
        return record

    def _check_free(self, db: sqlite3.Connection, name: str, what: str) -> None:
        taken = db.execute("SELECT kind FROM snapshots WHERE name = ?", (name,)).fetchone()
        if taken:
            raise AlreadyExists(
                f"the {what} {quote(name)} is taken by {records.described(taken[0])}:"
                " choose another or remove that one"
            )
        self._reservations.check_free(name, what)


def _now() -> int:
    return time.time_ns() // 1000
