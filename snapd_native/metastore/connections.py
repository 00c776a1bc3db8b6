"""Connections to the database: one that writes, and as many that read as there are readers."""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from snapd_native.errors import DataLoss, Internal, ResourceExhausted, SnapdError

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR}
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
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        with translated(), ExitStack() as undo:
            self._writer = self._connect()
            undo.callback(self._writer.close)
            self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
            # FULL makes every COMMIT durable before it returns; NORMAL would lose the last ones.
            self._writer.execute("PRAGMA synchronous = FULL")
            undo.pop_all()

    def close(self) -> None:
        """Close everything; the last close leaves a database without a WAL file."""
        with self._lock:
            while not self._readers.empty():
                self._readers.get().close()
            self._writer.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writing connection to one thread at a time, outside any transaction."""
        with self._lock, translated():
            yield self._writer

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

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA foreign_keys = ON")
        return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Make what follows durable as a whole, or undo it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


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
    if code in _FULL or extended in _NO_ROOM:
        return ResourceExhausted("no room is left for the metadata: free some and try again")
    # SQLite has no code of its own for a header that it does not understand.
    if code in _DAMAGED or str(error) == "unsupported file format":
        return DataLoss(f"metadata.db cannot be used ({error}): restore it from a backup")
    return Internal(f"the metadata could not be used ({error}): see the service's log")
