"""Translate errors of SQLite to errors of the contract."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapd_native.errors import DataLoss, Internal, ResourceExhausted, SnapdError, Unavailable
from snapd_native.model import quote_path

# A damaged header can say that the database is read-only.
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY}
_NOT_UNDERSTOOD = ("unsupported file format", "malformed JSON", "Could not decode")
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
_REFUSED = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

_PROBE = 1 << 16
"""Bytes; more than most transactions write."""


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


def _meaning(error: sqlite3.Error, directory: Path) -> SnapdError:
    code = primary_code(error)
    if code == sqlite3.SQLITE_BUSY:
        path = quote_path(str(directory / "metadata.db"))
        return Unavailable(f"{path} is open in another program: end that one (fuser names it)")
    refusal = _refusal(directory) if code in _REFUSED else 0
    if code in _FULL or refusal in _NO_ROOM:
        return ResourceExhausted("no room is left for the metadata: free some and try again")
    if code == sqlite3.SQLITE_IOERR or refusal:
        return unreachable(os.strerror(refusal) if refusal else str(error))
    if code == sqlite3.SQLITE_CANTOPEN:
        # There was perhaps no free inode a moment ago: xfs frees inodes in the background.
        return Unavailable(
            f"a file of {quote_path(str(directory / 'metadata.db'))} could not be opened:"
            " try again, and if that fails look at the files with this name"
        )
    # SQLite has no code of its own for content that it does not understand. It reports a page that
    # the disk cannot read like a damaged one.
    if code in _DAMAGED or str(error).startswith(_NOT_UNDERSTOOD):
        return DataLoss(
            f"metadata.db cannot be used ({error}): check the disk and the kernel's log, and if all"
            " is well there restore it from a backup"
        )
    return Internal(f"the metadata could not be used ({error}): see the service's log")


def unreachable(reason: str) -> DataLoss:
    """Return the error for a database that the kernel cannot read or write."""
    return DataLoss(
        f"metadata.db cannot be read or written ({reason.lower()}): check the disk and the kernel's"
        " log"
    )


def primary_code(error: BaseException) -> int:
    """Return the primary result code of SQLite, the low byte of the extended one."""
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
