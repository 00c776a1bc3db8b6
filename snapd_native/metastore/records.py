"""Read records of snapshots from the database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from snapd_native.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from snapd_native.model import Info, Kind, Usage, is_name, is_text, quote

COLUMNS = """
    s.id, s.name, s.kind, s.parent, coalesce(p.name, ''), s.created, s.updated, s.labels,
    s.size, s.inodes
    FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent
"""

Row: TypeAlias = Sequence[Any]
"""A row of `COLUMNS`. On a damaged disk any value can be in it."""

_DESCRIPTIONS: Mapping[str, str] = {
    Kind.VIEW: "a view",
    Kind.ACTIVE: "an active snapshot",
    Kind.COMMITTED: "a committed snapshot",
}

_LIST = "list them to see which there are"


@dataclass(frozen=True, slots=True)
class Record:
    """The record of a snapshot: ``info`` for callers, the rest for the service."""

    id: int
    parent_id: int | None
    info: Info
    usage: Usage | None
    """Measured at Commit, so None for a view or an active snapshot."""

    @property
    def tree_id(self) -> int:
        """The id of the snapshot that owns the directory; a view shows its parent's."""
        if self.info.kind is Kind.VIEW and self.parent_id is not None:
            return self.parent_id
        return self.id

    def check_mountable(self) -> None:
        """Check that a snapshot can be mounted.

        Raises:
            FailedPrecondition: it is committed.
        """
        if self.info.kind is Kind.COMMITTED:
            raise FailedPrecondition(
                f"{quote(self.info.name)} is committed and has no mount: make a view of it"
            )


def packed(labels: Mapping[str, str]) -> str:
    """Return labels as the database stores them."""
    return json.dumps(dict(labels), ensure_ascii=False, separators=(",", ":"))


def fault(row: Row) -> str:
    """Name the invalid parts of a row; empty if there are none."""
    wrong = [what for what, is_right in _RULES.items() if not is_right(row)]
    if _unpacked(row[7]) is None:
        wrong.append("labels")
    return ", ".join(wrong)


def readable(row: Row) -> Record | None:
    """Return the record in a row; None if it is damaged."""
    labels = _unpacked(row[7])
    if labels is None or not all(is_right(row) for is_right in _RULES.values()):
        return None
    id_, name, kind, parent_id, parent, created, updated, _, size, inodes = row
    info = Info(name, Kind(kind), parent, created, updated, labels)
    return Record(id_, parent_id, info, None if size is None else Usage(size, inodes))


def get_even_damaged(db: sqlite3.Connection, key: str) -> Record:
    """Return what Remove needs of a record, even if the rest is damaged.

    Raises:
        NotFound: there is none.
    """
    row = _row(db, key, f"there is no snapshot {quote(key)}: {_LIST}")
    id_, _, kind, parent_id, *_ = row
    known = Kind(kind) if kind in _DESCRIPTIONS else Kind.ACTIVE
    return Record(id_, parent_id, Info(key, known, "", 0, 0, {}), None)


def get(db: sqlite3.Connection, key: str) -> Record:
    """Return the record of a snapshot.

    Raises:
        NotFound: there is none.
        DataLoss: it is damaged.
    """
    return _record(_row(db, key, f"there is no snapshot {quote(key)}: {_LIST}"))


def committed_parent(db: sqlite3.Connection, parent: str) -> Record:
    """Return the record of a snapshot that is to become a parent.

    Raises:
        NotFound: there is none.
        InvalidArgument: it is not committed.
        DataLoss: it is damaged.
    """
    record = _record(_row(db, parent, f"there is no parent {quote(parent)}: commit it first"))
    if record.info.kind is not Kind.COMMITTED:
        kind = described(record.info.kind)
        raise InvalidArgument(
            f"the parent {quote(parent)} is {kind}, not committed: commit it first"
        )
    return record


def described(kind: str) -> str:
    """Return a kind of snapshot in words."""
    return _DESCRIPTIONS.get(kind, "a damaged record")


def check_parent(db: sqlite3.Connection, record: Record) -> None:
    """Check that the recorded parent exists and is committed.

    Raises:
        DataLoss: it does not, or is not.
    """
    if record.parent_id is None:
        return
    kind = db.execute("SELECT kind FROM snapshots WHERE id = ?", (record.parent_id,)).fetchone()
    if kind != (Kind.COMMITTED,):
        raise DataLoss(
            f"the parent of {quote(record.info.name)} is not there, or not committed:"
            " restore metadata.db from a backup"
        )


def last_id(db: sqlite3.Connection) -> int:
    """Return the highest id so far, even if the counter of ids was lost."""
    (last,) = db.execute(
        "SELECT max((SELECT coalesce(max(seq), 0) FROM sqlite_sequence),"
        " (SELECT coalesce(max(id), 0) FROM snapshots))"
    ).fetchone()
    return int(last)


def _row(db: sqlite3.Connection, name: str, missing: str) -> Row:
    row: Row | None = db.execute(f"SELECT {COLUMNS} WHERE s.name = ?", (name,)).fetchone()
    if row is None:
        raise NotFound(missing)
    return row


def _record(row: Row) -> Record:
    record = readable(row)
    if record is None:
        raise DataLoss(
            f"the record of {quote(str(row[1]))} is damaged ({fault(row)}):"
            " restore metadata.db from a backup, or remove the snapshot"
        )
    return record


def _is_parent(id_: object, name: object) -> bool:
    return id_ is None or (isinstance(id_, int) and (name == "" or is_name(name)))


def _is_usage(kind: object, size: object, inodes: object) -> bool:
    if kind == Kind.COMMITTED:
        return _is_count(size) and _is_count(inodes)
    return size is None and inodes is None


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 0


def _unpacked(labels: object) -> Mapping[str, str] | None:
    """Undo `packed`; None if the text is not one of its results."""
    try:
        found = json.loads(labels) if isinstance(labels, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return found if all(is_text(text) for pair in found.items() for text in pair) else None


_RULES: Mapping[str, Callable[[Row], bool]] = {
    "name": lambda row: is_name(row[1]),
    "kind": lambda row: row[2] in _DESCRIPTIONS,
    "parent": lambda row: _is_parent(row[3], row[4]),
    "times": lambda row: _is_count(row[5]) and _is_count(row[6]),
    "usage": lambda row: _is_usage(row[2], row[8], row[9]),
}
"""Rules for the columns of a row, except for the labels."""
