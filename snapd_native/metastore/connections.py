"""Connections to the database: one that writes, and as many that read as there are readers.

They use SQLite's VFS ``unix-excl``: no other process can open the database meanwhile, and the index
of the WAL is in memory. That of the VFS ``unix`` is a file that is mapped: where the file system
has no room for a page of it, the kernel kills the process.
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
"""Bytes of the WAL file that are there from the beginning; see `Connections.delete`."""

_CHANGES = 64
"""Rows changed, of some pages each, until the WAL is put into the database. That grows by as many
pages at most, which is less than what `Connections.delete` can have freed."""

BUSY_SECONDS = 5.0
"""How long a start waits until another process closes the database."""

_PAUSE = 0.02
"""Seconds that new readers wait for others to end, so that the WAL can be put into the database."""

_LONG_PAUSE = 5.0
"""Seconds, where a deletion needs the room that this makes."""

# A header that is not understood may forbid to write.
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY}
_NOT_UNDERSTOOD = ("unsupported file format", "malformed JSON", "Could not decode")
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
_REFUSED = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Connections:
    """Opens ``metadata.db`` in WAL mode, so that readers do not wait for the writer.

    Only while the WAL is put into the database, some milliseconds now and then, none begins. SQLite
    would do a part of that beside readers, but it does not sync that part and does not repeat it
    after a failed sync, so that records could be lost.
    """

    def __init__(self, path: Path, make_room: Callable[[], bool]) -> None:
        """Open the database for writing; it is made if there is none, readable by its owner.

        ``make_room`` is called where there is none for a deletion, and tells whether it helped.

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
        """Close everything; the last close leaves a database without a WAL file."""
        with self._lock:
            self._readers.close()
            self._writer.close()
            self._changes.close()

    def check_in_place(self) -> None:
        """Make sure that the paths of the database still lead to what SQLite has open.

        Raises:
            DataLoss: they do not, so that nothing that is written outlasts the service.
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
        """Keep all others from writing."""
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
                # If readers went on, the next attempt is after as many changes again.
                self._put = self._writer.total_changes

    def lost_changes(self) -> int:
        """Return how many of the changes that were once durable the database does not have.

        An older copy under the newer log has the last ones, and not those between the two.
        """
        with self._lock, translated(self._path.parent):
            count, put_back = self._changes.read()
            lost = count - _changes(self._writer)
            if self._without_log is not None:
                lost = max(lost, put_back - self._without_log)
            return max(lost, 0)

    def count_changes(self) -> None:
        """Take for all that there is what the database has, and count on from there."""
        with self._lock, translated(self._path.parent):
            self._note()

    def delete(self, db: sqlite3.Connection, statement: str, rows: Iterable[tuple[int]]) -> None:
        """Delete rows with the connection for writing, durably, also where the disk is full.

        A WAL whose pages are all in the database is written from its beginning again, and has room
        there. Putting them there takes room only for what was inserted since the last time.
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
        """Lend a connection that sees the last commit and cannot write."""
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
            address, BUSY_SECONDS, uri=True, isolation_level=None, check_same_thread=False
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
        """Put the WAL into the database, if all readers end within ``seconds``."""
        # The change itself stands, so a disk that fails is no error here.
        with self._readers.paused(seconds) as nobody_reads, suppress(sqlite3.Error):
            if not nobody_reads:
                return
            busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            if not busy:
                self._put_back_changes = _changes(self._writer)
                if self._counted is not None:
                    self._note()

    def _reserve(self) -> None:
        # SQLite takes what follows the last frame for nothing.
        fd = os.open(f"{self._path}-wal", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.posix_fallocate(fd, 0, WAL_ROOM)
        finally:
            os.close(fd)


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
    except BaseException as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if _code(error) == sqlite3.SQLITE_IOERR:
            _overwrite(db)
        raise


@contextmanager
def translated(directory: Path) -> Iterator[None]:
    """Turn errors of SQLite into those of the contract; the database lies in ``directory``."""
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(error, directory) from error


def directory_of(db: sqlite3.Connection) -> Path:
    """Return where the database lies."""
    (_, _, path) = db.execute("PRAGMA database_list").fetchone()
    return Path(path).parent


def _changes(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT count FROM changes WHERE id = 1").fetchone()
    # Where the disk has lost the count, all changes are taken for lost.
    return row[0] if row and isinstance(row[0], int) else 0


def _changes_without_log(path: Path) -> int | None:
    """Return the number of changes that a closed database records on disk; None if unknown.

    It need not be whole: what was being put into it when the service ended is in the log too.
    """
    with suppress(sqlite3.Error, OSError):
        # It is read as if there were no log, and nothing is made or locked.
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
    """See to it that a transaction that failed is not found in the WAL after a crash.

    One that could not be synced may be there as a whole. Each frame's checksum goes on from the
    one before it: the next transaction, such as one that changes nothing, makes it invalid.
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
    # SQLite has no codes of their own for what it does not understand, and that of a damaged page
    # for one that the disk does not give.
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
    """Return the errno with which the kernel refuses to make a file, 0 if it does not.

    SQLite does not tell it: it has the same codes for a disk that is full and one that fails.
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
"""Bytes, more than a transaction usually writes."""
