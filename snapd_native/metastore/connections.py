"""Connections to the database: one for writing, and one for each reader.

They use SQLite's VFS ``unix-excl``: no other process can open the database while the service runs,
and the index of the WAL is in memory. With the VFS ``unix`` the index is a mapped file, and the
kernel kills the process when the file system has no room for a page of it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from snapd_native.errors import DataLoss, FailedPrecondition, ResourceExhausted
from snapd_native.metastore.changes import Changes
from snapd_native.metastore.failures import primary_code, translated, unreachable

WAL_ROOM = 1 << 18
"""Bytes that the WAL file has from the beginning; see `Connections.delete`."""

_CHANGES = 64
"""Changed rows after which a checkpoint is due. Each row changes a few pages, so the database grows
by less than `Connections.delete` can free for it."""

BUSY_SECONDS = 5.0
"""How long a start waits until another process closes the database."""

_PAUSE = 0.02
"""Seconds for which new readers are held back until the others end, for a checkpoint."""

_LONG_PAUSE = 5.0
"""The same, when a deletion on a full disk needs the checkpoint."""


class Connections:
    """Opens ``metadata.db`` in WAL mode, so that readers do not wait for the writer.

    A checkpoint runs only while nobody reads: SQLite does not sync a checkpoint that readers have
    stopped half-way, and does not repeat it after a failed sync, so that records could be lost. So
    a new reader waits for a checkpoint, some milliseconds, and before it for the readers that have
    begun: `_PAUSE` at most, or `_LONG_PAUSE` during a deletion on a full disk.
    """

    def __init__(self, path: Path, make_room: Callable[[], bool]) -> None:
        """Open the database for writing, or create it with access for its owner only.

        ``make_room`` is called when the disk is too full for a deletion. It returns whether it has
        freed something.

        Raises:
            Unavailable: another process has it open.
        """
        self._path = path
        self._make_room = make_room
        self.lock = threading.Lock()
        """Held while a thread writes."""
        self._readers = Readers(self._connect_reader)
        self._checkpointed = 0
        """The changed rows of this connection before the last checkpoint."""
        _make(path)
        with translated(self._path.parent), ExitStack() as undo:
            self._changes = Changes(path)
            undo.callback(self._changes.close)
            self._writer = self._connect()
            undo.callback(self._writer.close)
            self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
            # FULL makes every COMMIT durable before it returns; NORMAL would lose the last ones.
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA wal_autocheckpoint = 0")
            # SQLite opens its files at the first read.
            self._writer.execute("PRAGMA schema_version").fetchone()
            self._files = _identities(path)
            undo.pop_all()
        with suppress(OSError):
            self._reserve()

    def close(self) -> None:
        """Close all connections. SQLite puts the WAL into the database and deletes it."""
        with self.lock:
            self._readers.close()
            self._writer.close()
            self._changes.close()

    def check_in_place(self) -> None:
        """Check that the files of the database are still those that SQLite has open.

        Raises:
            DataLoss: they are not, so that changes would be lost when the service ends.
        """
        try:
            found = _identities(self._path)
        except OSError as error:
            raise unreachable(os.strerror(error.errno or errno.EIO)) from error
        if found != self._files:
            raise DataLoss(
                "metadata.db was moved or replaced while the service runs: restore it from a"
                " backup and restart the service"
            )

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writing connection to one thread at a time, outside any transaction.

        Raises:
            DataLoss: as `check_in_place`.
        """
        with self.lock, translated(self._path.parent):
            self.check_in_place()
            try:
                yield self._writer
            finally:
                self._changes.note(self._writer)
            if self._writer.total_changes - self._checkpointed >= _CHANGES:
                self._checkpoint(_PAUSE)
                # If readers have prevented it, it is due again after as many changes.
                self._checkpointed = self._writer.total_changes

    def lost_changes(self) -> int:
        """Return how many durable changes are missing in the database."""
        with self.lock, translated(self._path.parent):
            return self._changes.lost(self._writer)

    def count_changes(self) -> None:
        """Accept the database's number of changes as complete, and count from there."""
        with self.lock, translated(self._path.parent):
            self._changes.begin(self._writer)

    def delete(self, db: sqlite3.Connection, statement: str, rows: Iterable[tuple[int]]) -> None:
        """Delete rows durably, even on a full disk. ``db`` is the connection for writing.

        After a checkpoint SQLite writes the WAL from its beginning again, where it has room. The
        checkpoint itself needs room only for rows that were inserted since the last one.
        """
        ids = [*rows]
        remedies: Iterator[Callable[[], bool]] = iter((lambda: True, self._make_room))
        while True:
            try:
                with translated(self._path.parent), transaction(db):
                    db.executemany(statement, ids)
                return
            except ResourceExhausted:
                if not any(remedy() for remedy in remedies):
                    raise
                self._checkpoint(_LONG_PAUSE)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that sees all committed changes and cannot write."""
        with translated(self._path.parent), self._readers.reading() as db:
            yield db

    def _connect(self) -> sqlite3.Connection:
        address = f"{self._path.absolute().as_uri()}?vfs=unix-excl"
        db = sqlite3.connect(
            address,
            timeout=BUSY_SECONDS,
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
        # Invalid UTF-8 in one record must not make the other records of a query unreadable.
        db.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    def _connect_reader(self) -> sqlite3.Connection:
        db = self._connect()
        db.execute("PRAGMA query_only = ON")
        return db

    def _checkpoint(self, seconds: float) -> None:
        """Run a checkpoint if all readers end within ``seconds``."""
        # The changes are durable already, so that a failure is no error of the call.
        with self._readers.paused(seconds) as nobody_reads, suppress(sqlite3.Error):
            if not nobody_reads:
                return
            busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            if not busy:
                self._changes.note_checkpoint(self._writer)

    def _reserve(self) -> None:
        # SQLite ignores what follows the last frame.
        fd = os.open(f"{self._path}-wal", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.posix_fallocate(fd, 0, WAL_ROOM)
        finally:
            os.close(fd)


class Readers:
    """Lends connections to threads, and keeps them open for the next reader."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        """``connect`` opens a connection."""
        self._connect = connect
        self._idle: list[sqlite3.Connection] = []
        self._reading = 0
        self._paused = False
        self._changed = threading.Condition()

    def close(self) -> None:
        """Close all connections. No thread may be reading."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection. A thread that has one must not ask for another."""
        with self._changed:
            self._changed.wait_for(lambda: not self._paused)
            self._reading += 1
            db = self._idle.pop() if self._idle else None
        try:
            db = db or self._connect()
            yield db
        finally:
            with self._changed:
                self._reading -= 1
                if db:
                    self._idle.append(db)
                self._changed.notify_all()

    @contextmanager
    def paused(self, seconds: float) -> Iterator[bool]:
        """Hold back new readers in the block; yield whether the others ended within ``seconds``."""
        try:
            with self._changed:
                self._paused = True
                nobody_reads = self._changed.wait_for(lambda: not self._reading, seconds)
            yield nobody_reads
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()


def _make(path: Path) -> None:
    """Create the file if it does not exist.

    Raises:
        FailedPrecondition: the path is not a file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
        is_file = False
    else:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        os.close(fd)
    if not is_file:
        raise FailedPrecondition(
            f"{path} is not a file: move it away and restore metadata.db from a backup"
        )


def _identities(path: Path) -> Sequence[tuple[int, int] | None]:
    """Return the device and inode of the database and of its WAL."""
    found: list[tuple[int, int] | None] = []
    for name in (path, f"{path}-wal"):
        try:
            status = os.stat(name)
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino))
    return found


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Make all changes of the block durable together, or none if it raises."""
    before = db.total_changes
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        if db.total_changes != before:
            db.execute("UPDATE changes SET count = count + 1 WHERE id = 1")
        db.execute("COMMIT")
    except BaseException as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if primary_code(error) == sqlite3.SQLITE_IOERR:
            _overwrite(db)
        raise


def _overwrite(db: sqlite3.Connection) -> None:
    """Make sure that a failed transaction is not recovered from the WAL after a crash.

    A transaction that could not be synced may still be complete in the WAL. The next transaction
    overwrites it there, and its frames become invalid, since each checksum includes the one before.
    """
    with suppress(sqlite3.Error):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        db.execute(f"PRAGMA user_version = {version}")
