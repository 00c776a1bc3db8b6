"""The ledger: a record of each mount that the service has made."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from snapd_native.metastore.connections import Connections, transaction
from snapd_native.model import Lifetime, is_name, is_text

_COLUMNS = """
    m.id, m.snapshot, iif(s.kind = 'view', coalesce(s.parent, s.id), s.id), s.name, m.target,
    m.read_only, m.lifetime, m.uid, m.owner, m.boot, m.mount
"""


@dataclass(frozen=True, slots=True)
class Line:
    """The record of a mount."""

    id: int
    snapshot: int
    tree: int
    """The id of the snapshot that owns the mounted directory."""
    key: str
    target: str
    """The target of Mount, as the kernel writes that path."""
    read_only: bool
    lifetime: Lifetime
    uid: int
    """The user that called Mount."""
    owner: str
    """The client whose disconnection ends the mount; empty for a persistent mount."""
    boot: str
    """The boot during which it was made; see `linux.boot`."""
    mount: int
    """Its id in the kernel's table of mounts during that boot; 0 if it is gone."""


class Ledger:
    """The records of all mounts that the service has made."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def lines(self, snapshot: int | None = None) -> Sequence[Line]:
        """Return the records of all mounts, or of one snapshot's, in the order of their making.

        Damaged records are left out; see `damaged`.
        """
        with self._connections.reading() as db:
            return [_line(row) for row in _rows(db, snapshot) if not _is_damaged(row)]

    def add(
        self,
        snapshot: int,
        target: str,
        read_only: bool,
        uid: int,
        owner: str,
        boot: str,
        mount: int,
        absent: Iterable[int] = (),
    ) -> int:
        """Record a mount that is about to be attached; return the id of the record.

        The records in ``absent`` lose their mount ids: the kernel can give those to other mounts.
        """
        lifetime = Lifetime.CLIENT if owner else Lifetime.PERSISTENT
        with self._connections.writing() as db, transaction(db):
            db.executemany("UPDATE mounts SET mount = 0 WHERE id = ?", ((id_,) for id_ in absent))
            (id_,) = db.execute(
                "INSERT INTO mounts"
                " (snapshot, target, read_only, lifetime, uid, owner, boot, mount)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                (snapshot, target, read_only, lifetime.value, uid, owner, boot, mount),
            ).fetchone()
            return int(id_)

    def recreated(self, id_: int, boot: str, mount: int) -> None:
        """Record that a mount was made again, during this boot."""
        with self._connections.writing() as db, transaction(db):
            db.execute("UPDATE mounts SET boot = ?, mount = ? WHERE id = ?", (boot, mount, id_))

    def forget(self, ids: Iterable[int]) -> None:
        """Delete the records of mounts that are gone."""
        with self._connections.writing() as db:
            rows = ((id_,) for id_ in ids)
            self._connections.delete(db, "DELETE FROM mounts WHERE id = ?", rows)


def turn_read_only(db: sqlite3.Connection, snapshot: int) -> None:
    """Record, inside a transaction, that all mounts of a snapshot are read-only now."""
    db.execute("UPDATE mounts SET read_only = 1 WHERE snapshot = ?", (snapshot,))


def damaged(db: sqlite3.Connection) -> Iterator[object]:
    """Yield the name of the snapshot of each damaged record."""
    for row in _rows(db, None):
        if _is_damaged(row):
            yield row[3]


def _rows(db: sqlite3.Connection, snapshot: int | None) -> sqlite3.Cursor:
    which = "" if snapshot is None else "WHERE m.snapshot = ?"
    return db.execute(
        f"SELECT {_COLUMNS} FROM mounts AS m"  # noqa: S608 - constants
        f" JOIN snapshots AS s ON s.id = m.snapshot {which} ORDER BY m.id",
        () if snapshot is None else (snapshot,),
    )


def _is_damaged(row: Sequence[Any]) -> bool:
    id_, snapshot, tree, key, target, read_only, lifetime, uid, owner, boot, mount = row
    return not (
        is_name(key)
        and all(is_text(text) for text in (target, owner, boot))
        and all(isinstance(number, int) for number in (id_, snapshot, tree, mount))
        and isinstance(uid, int)
        and 0 <= uid < 1 << 32
        and read_only in (0, 1)
        and lifetime in {each.value for each in Lifetime}
    )


def _line(row: Sequence[Any]) -> Line:
    id_, snapshot, tree, key, target, read_only, lifetime, *rest = row
    return Line(id_, snapshot, tree, key, target, bool(read_only), Lifetime(lifetime), *rest)
