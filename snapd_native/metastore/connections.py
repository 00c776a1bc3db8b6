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
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from snapd_native.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.metastore.changes import Changes
from snapd_native.metastore.readers import Readers
from snapd_native.model import quote_path

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

# A damaged header can say that the database is read-only.
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY}
_NOT_UNDERSTOOD = ("unsupported file format", "malformed JSON", "Could not decode")
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
_REFUSED = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


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
        self._lock = threading.Lock()
        self._readers = Readers(self._connect_reader)
        self._counted: int | None = None
        self._put = 0
        _make(path)
        self._without_log = _changes_without_log(path)
        self._put_back_changes = self._without_log or 0
        with translated(self._path.parent), ExitStack() as undo:
            self._writer = self._connect()
            undo.callback(self._writer.close)
            self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
            # FULL makes every COMMIT durable before it returns; NORMAL would lose the last ones.
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA wal_autocheckpoint = 0")
            # SQLite opens its files at the first read.
            self._writer.execute("PRAGMA schema_version").fetchone()
            self._files = _identities(path)
            self._changes = Changes(path.with_name(path.name + ".changes"))
            undo.pop_all()
        with suppress(OSError):
            self._reserve()

    def close(self) -> None:
        """Close all connections. SQLite puts the WAL into the database and deletes it."""
        with self._lock:
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
            raise _unreachable(os.strerror(error.errno or errno.EIO)) from error
        if found != self._files:
            raise DataLoss(
                "metadata.db was moved or replaced while the service runs: restore it from a"
                " backup and restart the service"
            )

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let no other thread write during the block."""
        with self._lock:
            yield

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writing connection to one thread at a time, outside any transaction.

        Raises:
            DataLoss: as `check_in_place`.
        """
        with self._lock, translated(self._path.parent):
            self.check_in_place()
            try:
                yield self._writer
            finally:
                self._count()
            if self._writer.total_changes - self._put >= _CHANGES:
                self._put_back(_PAUSE)
                # If readers have prevented it, it is due again after as many changes.
                self._put = self._writer.total_changes

    def lost_changes(self) -> int:
        """Return how many durable changes are missing in the database.

        An older copy of the database with a newer WAL lacks the changes between the two.
        """
        with self._lock, translated(self._path.parent):
            count, put_back = self._changes.read()
            lost = count - _changes(self._writer)
            if self._without_log is not None:
                lost = max(lost, put_back - self._without_log)
            return max(lost, 0)

    def count_changes(self) -> None:
        """Accept the database's number of changes as complete, and count from there."""
        with self._lock, translated(self._path.parent):
            self._note()

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
                self._put_back(_LONG_PAUSE)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that sees all committed changes and cannot write."""
        with translated(self._path.parent), self._readers.reading() as db:
            yield db

    def _count(self) -> None:
        if self._counted not in (None, self._writer.total_changes):
            with suppress(sqlite3.Error):
                self._note()

    def _note(self) -> None:
        self._counted = self._writer.total_changes
        self._changes.write(_changes(self._writer), self._put_back_changes)

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

    def _put_back(self, seconds: float) -> None:
        """Run a checkpoint if all readers end within ``seconds``."""
        # The changes are durable already, so that a failure is no error of the call.
        with self._readers.paused(seconds) as nobody_reads, suppress(sqlite3.Error):
            if not nobody_reads:
                return
            busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            if not busy:
                self._put_back_changes = _changes(self._writer)
                if self._counted is not None:
                    self._note()

    def _reserve(self) -> None:
        # SQLite ignores what follows the last frame.
        fd = os.open(f"{self._path}-wal", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.posix_fallocate(fd, 0, WAL_ROOM)
        finally:
            os.close(fd)


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
        if _code(error) == sqlite3.SQLITE_IOERR:
            _overwrite(db)
        raise


@contextmanager
def translated(directory: Path) -> Iterator[None]:
    """Turn SQLite's errors into the contract's; ``directory`` contains the database."""
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(error, directory) from error


def directory_of(db: sqlite3.Connection) -> Path:
    """Return the directory that contains the database."""
    (_, _, path) = db.execute("PRAGMA database_list").fetchone()
    return Path(path).parent


def _changes(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT count FROM changes WHERE id = 1").fetchone()
    # If the disk has lost the count, all changes count as lost.
    return row[0] if row and isinstance(row[0], int) else 0


def _changes_without_log(path: Path) -> int | None:
    """Return the number of changes in the database without its WAL; None if it is unreadable.

    The database can be incomplete: a checkpoint that was interrupted is repeated from the WAL.
    """
    with suppress(sqlite3.Error, OSError):
        # Opened like this, SQLite ignores the WAL, creates nothing and takes no lock.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as db:
            has_table = "SELECT 1 FROM sqlite_schema WHERE name = 'changes'"
            count = _changes(db) if db.execute(has_table).fetchone() else 0
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return count
    return None


def _overwrite(db: sqlite3.Connection) -> None:
    """Make sure that a failed transaction is not recovered from the WAL after a crash.

    A transaction that could not be synced may still be complete in the WAL. The next transaction
    overwrites it there, and its frames become invalid, since each checksum includes the one before.
    """
    with suppress(sqlite3.Error):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        db.execute(f"PRAGMA user_version = {version}")


def _meaning(error: sqlite3.Error, directory: Path) -> SnapdError:
    code = _code(error)
    if code == sqlite3.SQLITE_BUSY:
        path = quote_path(str(directory / "metadata.db"))
        return Unavailable(f"{path} is open in another program: end that one (fuser names it)")
    refusal = _refusal(directory) if code in _REFUSED else 0
    if code in _FULL or refusal in _NO_ROOM:
        return ResourceExhausted("no room is left for the metadata: free some and try again")
    if code == sqlite3.SQLITE_IOERR or refusal:
        return _unreachable(os.strerror(refusal) if refusal else str(error))
    # SQLite has no code of its own for content that it does not understand. It reports a page that
    # the disk cannot read like a damaged one.
    if code in _DAMAGED or str(error).startswith(_NOT_UNDERSTOOD):
        return DataLoss(
            f"metadata.db cannot be used ({error}): check the disk and the kernel's log, and if all"
            " is well there restore it from a backup"
        )
    return Internal(f"the metadata could not be used ({error}): see the service's log")


def _unreachable(reason: str) -> DataLoss:
    return DataLoss(
        f"metadata.db cannot be read or written ({reason.lower()}): check the disk and the kernel's"
        " log"
    )


def _code(error: BaseException) -> int:
    # The primary result code is the low byte of the extended one.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _refusal(directory: Path) -> int:
    """Try to write a file; return the errno, or 0 if that works.

    SQLite has the same code for a full disk and a failing one.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(_PROBE))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


_PROBE = 1 << 16
"""Bytes; more than most transactions write."""
