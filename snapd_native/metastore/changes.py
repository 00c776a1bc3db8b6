"""A count of all changes, kept beside the database to find out whether it has lost some."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path


class Changes:
    """The count in the database, compared with a file ``metadata.db.changes``.

    The file has two numbers: all changes so far, and those that a checkpoint has written to the
    database itself. The others are only in the WAL. Both numbers are written after the changes are
    durable, and the file is not synced, so they can be too low. The second can also be too high, if
    the service was killed during a checkpoint.
    """

    def __init__(self, database: Path) -> None:
        """Read how many changes a database that is not open yet has without its WAL.

        Open the file, or create it with access for its owner only.
        """
        self._without_wal = _without_wal(database)
        self._checkpointed = self._without_wal or 0
        self._noted: int | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(database.with_name(database.name + ".changes"), flags, 0o600)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def lost(self, db: sqlite3.Connection) -> int:
        """Return how many durable changes are missing in the database.

        An older copy of the database with a newer WAL lacks the changes between the two.
        """
        count, checkpointed = (_number(os.pread(self._fd, 20, offset)) for offset in (0, 21))
        lost = count - _count(db)
        if self._without_wal is not None:
            lost = max(lost, checkpointed - self._without_wal)
        return max(lost, 0)

    def begin(self, db: sqlite3.Connection) -> None:
        """Accept the database's count as complete, and note it in the file from now on."""
        self._noted = db.total_changes
        # On a full disk the old numbers can remain.
        with suppress(OSError):
            os.pwrite(self._fd, b"%020d\n%020d\n" % (_count(db), self._checkpointed), 0)

    def note(self, db: sqlite3.Connection) -> None:
        """Note the changes of a transaction, if there were any."""
        if self._noted not in (None, db.total_changes):
            with suppress(sqlite3.Error):
                self.begin(db)

    def note_checkpoint(self, db: sqlite3.Connection) -> None:
        """Note that all changes so far are in the database itself."""
        self._checkpointed = _count(db)
        if self._noted is not None:
            self.begin(db)


def _count(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT count FROM changes WHERE id = 1").fetchone()
    # If the disk has lost the count, all changes count as lost.
    return row[0] if row and isinstance(row[0], int) else 0


def _without_wal(path: Path) -> int | None:
    """Return the number of changes in the database without its WAL; None if it is unreadable.

    The database can be incomplete: a checkpoint that was interrupted is repeated from the WAL.
    """
    with suppress(sqlite3.Error, OSError):
        # Opened like this, SQLite ignores the WAL, creates nothing and takes no lock.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as db:
            has_table = "SELECT 1 FROM sqlite_schema WHERE name = 'changes'"
            count = _count(db) if db.execute(has_table).fetchone() else 0
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return count
    return None


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
