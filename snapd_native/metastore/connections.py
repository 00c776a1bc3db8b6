"""Connections to the database: one that writes, and as many that read as there are readers."""

from __future__ import annotations

import errno
import os
import queue
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from snapd_native.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    SnapdError,
)
from snapd_native.metastore.changes import Changes

_DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR,
    # What a header may forbid that is not understood.
    sqlite3.SQLITE_READONLY,
}
_NOT_UNDERSTOOD = ("unsupported file format", "malformed JSON", "Could not decode")
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
_NO_ROOM = {sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_NOMEM}


class Connections:
    """Opens ``metadata.db`` in WAL mode, so that readers never wait for the writer."""

    def __init__(self, path: Path, make_room: Callable[[], bool]) -> None:
        """Open the database for writing; it is made if there is none, readable by its owner.

        ``make_room`` is called where there is none for a deletion, and tells whether it helped.
        """
        self._path = path
        self._make_room = make_room
        self._lock = threading.Lock()
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._counted: int | None = None
        _make(path)
        with translated(), ExitStack() as undo:
            self._writer = self._connect()
            undo.callback(self._writer.close)
            self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
            # FULL makes every COMMIT durable before it returns; NORMAL would lose the last ones.
            self._writer.execute("PRAGMA synchronous = FULL")
            # Whatever is read first has SQLite open all files.
            self._writer.execute("PRAGMA schema_version").fetchone()
            self._files = _identities(path)
            self._changes = Changes(path.with_name(path.name + ".changes"))
            undo.pop_all()

    def close(self) -> None:
        """Close everything; the last close leaves a database without a WAL file."""
        with self._lock:
            while not self._readers.empty():
                self._readers.get().close()
            self._writer.close()
            self._changes.close()

    def check_in_place(self) -> None:
        """Make sure that the paths of the database still lead to what SQLite has open.

        Raises:
            DataLoss: they do not, so that nothing that is written outlasts the service.
        """
        if _identities(self._path) != self._files:
            raise DataLoss(
                "metadata.db was moved or replaced while the service runs: restore it from a"
                " backup and restart the service"
            )

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep all others from writing."""
        with self._lock:
            yield

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writing connection to one thread at a time, outside any transaction.

        Raises:
            DataLoss: as `check_in_place`.
        """
        with self._lock, translated():
            self.check_in_place()
            try:
                yield self._writer
            finally:
                self._count()

    def lost_changes(self) -> int:
        """Return how many of the changes that were once durable the database does not have."""
        with self._lock, translated():
            return max(self._changes.read() - _changes(self._writer), 0)

    def count_changes(self) -> None:
        """Take for all that there is what the database has, and count on from there."""
        with self._lock, translated():
            self._note()

    def delete(self, db: sqlite3.Connection, statement: str, rows: Iterable[tuple[int]]) -> None:
        """Delete rows with the connection for writing, durably, also where the disk is full."""
        ids = [*rows]
        try:
            with translated(), transaction(db):
                db.executemany(statement, ids)
        except ResourceExhausted:
            if not self._make_room():
                raise
            with transaction(db):
                db.executemany(statement, ids)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that sees the last commit and cannot write."""
        with translated():
            try:
                db = self._readers.get_nowait()
            except queue.Empty:
                db = self._connect()
                db.execute("PRAGMA query_only = ON")
            try:
                yield db
            finally:
                self._readers.put(db)

    def _count(self) -> None:
        if self._counted not in (None, self._writer.total_changes):
            with suppress(sqlite3.Error):
                self._note()

    def _note(self) -> None:
        self._counted = self._writer.total_changes
        self._changes.write(_changes(self._writer))

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        # What is no UTF-8 anymore is one record's damage, not that of all that are read with it.
        db.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        db.execute("PRAGMA foreign_keys = ON")
        return db


def _make(path: Path) -> None:
    """Make the file if there is none.

    Raises:
        FailedPrecondition: there is something else.
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
            f"{path} is no file: move it away and restore metadata.db from a backup"
        )


def _identities(path: Path) -> Sequence[tuple[int, int] | None]:
    """Return device and inode of the database and of its WAL file."""
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
    """Make what follows durable as a whole, or undo it."""
    before = db.total_changes
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        if db.total_changes != before:
            db.execute("UPDATE changes SET count = count + 1 WHERE id = 1")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _changes(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT count FROM changes WHERE id = 1").fetchone()
    # Where the disk has lost the count, all changes are taken for lost.
    return row[0] if row and isinstance(row[0], int) else 0


@contextmanager
def translated() -> Iterator[None]:
    """Turn errors of SQLite into those of the contract."""
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(error) from error


def _meaning(error: sqlite3.Error) -> SnapdError:
    # The primary result code is the low byte of the extended one.
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = extended & 0xFF
    text = str(error)
    if code in _FULL or extended in _NO_ROOM:
        return ResourceExhausted("no room is left for the metadata: free some and try again")
    # SQLite has no codes of their own for what it does not understand.
    if code in _DAMAGED or text.startswith(_NOT_UNDERSTOOD):
        return DataLoss(f"metadata.db cannot be used ({error}): restore it from a backup")
    return Internal(f"the metadata could not be used ({error}): see the service's log")
