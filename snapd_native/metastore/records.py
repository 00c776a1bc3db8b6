"""Records as they are in the database, and how one is found."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from snapd_native.errors import InvalidArgument, NotFound
from snapd_native.model import Info, Kind, Usage, quote

COLUMNS = """
    s.id, s.name, s.kind, s.parent, coalesce(p.name, ''), s.created, s.updated, s.labels,
    s.size, s.inodes
    FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent
"""


DESCRIPTIONS = {
    Kind.VIEW: "a view",
    Kind.ACTIVE: "an active snapshot",
    Kind.COMMITTED: "a committed snapshot",
}


@dataclass(frozen=True, slots=True)
class Record:
    """A snapshot as the metastore knows it: ``info`` for callers, the rest for the service."""

    id: int
    parent_id: int | None
    info: Info
    usage: Usage | None
    """Measured at Commit, so None for a view or an active snapshot."""

    @property
    def tree_id(self) -> int:
        """Whose directory it shows: a view of a parent has none of its own."""
        if self.info.kind is Kind.VIEW and self.parent_id is not None:
            return self.parent_id
        return self.id


@dataclass(frozen=True, slots=True)
class Reservation:
    """A key or name that is held for one call, and what must stay until that call is done.

    It lives in memory: a crash releases it.
    """

    name: str
    id: int
    """The new snapshot's id; of a Commit, the id of the active one."""
    parent: Record | None
    committing: Record | None = None


def packed(labels: Mapping[str, str]) -> str:
    """Return labels as the database keeps them."""
    return json.dumps(dict(labels), ensure_ascii=False, separators=(",", ":"))


def record_of(row: Iterable[object]) -> Record:
    """Return the record in a row of `COLUMNS`."""
    id_, name, kind, parent_id, parent, created, updated, labels, size, inodes = row
    info = Info(name, Kind(kind), parent, created, updated, json.loads(labels))  # type: ignore[arg-type]
    return Record(id_, parent_id, info, None if size is None else Usage(size, inodes))  # type: ignore[arg-type]


def find(db: sqlite3.Connection, name: str) -> Record | None:
    """Return the record of a snapshot, if there is one."""
    row = db.execute(f"SELECT {COLUMNS} WHERE s.name = ?", (name,)).fetchone()
    return record_of(row) if row else None


def get(db: sqlite3.Connection, key: str) -> Record:
    """Return the record of a snapshot.

    Raises:
        NotFound: there is none.
    """
    record = find(db, key)
    if record is None:
        raise NotFound(f"there is no snapshot {quote(key)}: list them to see which there are")
    return record


def committed_parent(db: sqlite3.Connection, parent: str) -> Record:
    """Return the record of what is to be a parent.

    Raises:
        NotFound: there is none.
        InvalidArgument: it is not committed.
    """
    record = find(db, parent)
    if record is None:
        raise NotFound(f"there is no parent {quote(parent)}: commit it first")
    if record.info.kind is not Kind.COMMITTED:
        raise InvalidArgument(
            f"the parent {quote(parent)} is {described(record)}, not committed: commit it first"
        )
    return record


def described(record: Record) -> str:
    """Say what a snapshot is."""
    return DESCRIPTIONS[record.info.kind]
