"""Check the rules of the database without relying on its triggers and constraints."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias

from snapd_native.errors import DataLoss
from snapd_native.metastore import ledger, records
from snapd_native.metastore.connections import transaction
from snapd_native.metastore.failures import directory_of, translated
from snapd_native.metastore.schema import missing
from snapd_native.model import Finding, Trouble, is_name, quote, quote_path, shown

Remedy: TypeAlias = tuple[str, ...]
"""Statements that repair something without loss or guess; empty if only a backup helps."""


class Broken(NamedTuple):
    """A finding, and the statements that repair it."""

    finding: Finding
    repair: Remedy = ()


def broken_rules(db: sqlite3.Connection) -> Sequence[Broken]:
    """Return what is damaged in a database, and which of its rules are broken."""
    found: list[Broken] = []
    for part in _PARTS:
        try:
            with translated(directory_of(db)):
                found.extend(part(db))
        except DataLoss as error:
            # The other checks may still find something.
            found.append(Broken(Finding(Trouble.DATABASE, "", error.message)))
    return [*dict.fromkeys(found)]


def repair(db: sqlite3.Connection, broken: Sequence[Broken]) -> None:
    """Repair what can be repaired, each finding in one transaction."""
    for statements in dict.fromkeys(each.repair for each in broken if each.repair):
        # If a repair fails, the next check reports the same finding.
        with (
            suppress(DataLoss),
            translated(directory_of(db)),
            suppress(sqlite3.IntegrityError),
            transaction(db),
        ):
            for statement in statements:
                db.execute(statement)


def _damage(db: sqlite3.Connection) -> Iterator[Broken]:
    """Find what SQLite reports as damage."""
    told = _integrity(db)
    # An index is rebuilt from its table, if both can be read and no value is there twice.
    whole = not any("page" in what for what in told) and not _doubles(db)
    for what in told:
        index = re.search(r" index (\w+)$", what)
        if whole and index and not what.startswith("non-unique"):
            yield _broken("", f"metadata.db is damaged ({what})", (f"REINDEX {index[1]}",))
        else:
            yield _broken("", f"metadata.db is damaged ({what})")


def _integrity(db: sqlite3.Connection) -> Sequence[str]:
    try:
        rows = db.execute("PRAGMA integrity_check").fetchall()
    except sqlite3.OperationalError:
        # A CHECK cannot read a record; `_records` finds that record.
        db.execute("PRAGMA ignore_check_constraints = ON")
        try:
            rows = db.execute("PRAGMA integrity_check").fetchall()
        finally:
            db.execute("PRAGMA ignore_check_constraints = OFF")
    return [what for row in rows for what in row[0].splitlines() if what != "ok"]


def _schema(db: sqlite3.Connection) -> Iterator[Broken]:
    """Find missing parts of the schema."""
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    for part in missing(db):
        what = f"metadata.db has not its {part.type} {part.name}"
        yield _broken("", what, () if part.name in there else (part.sql,))


def _records(db: sqlite3.Connection) -> Iterator[Broken]:
    """Find records with invalid values."""
    for row in db.execute(f"SELECT {records.COLUMNS}"):
        if what := records.fault(row):
            name = row[1]
            about = "its record" if is_name(name) else f"the record {row[0]}, {quote(str(name))},"
            yield _broken(name, f"{about} is damaged ({what})")
    for name in _doubles(db):
        yield _broken(name, "its name is that of two snapshots")


def _doubles(db: sqlite3.Connection) -> Sequence[str]:
    return [
        name
        for (name,) in db.execute(
            "SELECT name FROM snapshots NOT INDEXED GROUP BY name HAVING count(*) > 1"
        )
    ]


def _lineage(db: sqlite3.Connection) -> Iterator[Broken]:
    """Find invalid ids and parents."""
    for rule, (query, statements) in _RULES.items():
        for (name,) in db.execute(query):
            yield _broken(name, rule, statements)
    yield from _loops(db)


def _loops(db: sqlite3.Connection) -> Iterator[Broken]:
    """Find snapshots that are ancestors of themselves."""
    rows = db.execute("SELECT id, parent, name FROM snapshots NOT INDEXED").fetchall()
    names = {id_: name for id_, _, name in rows}
    children: dict[object, list[object]] = {}
    for id_, parent, _ in rows:
        children.setdefault(parent if parent in names else None, []).append(id_)
    pending: list[object] = [None]
    while pending:
        pending += children.pop(pending.pop(), [])
    for id_ in itertools.chain.from_iterable(children.values()):
        yield _broken(names[id_], "it is its own ancestor")


def _mounts(db: sqlite3.Connection) -> Iterator[Broken]:
    """Find invalid records of mounts."""
    for name in ledger.damaged(db):
        yield _broken(name, "what is recorded of a mount of it is damaged")
    for (target,) in db.execute(f"SELECT target FROM mounts WHERE {_NOBODYS}"):  # noqa: S608
        what = f"what is mounted on {quote_path(str(target))} is recorded, but of no snapshot"
        yield _broken("", what, (f"DELETE FROM mounts WHERE {_NOBODYS}",))  # noqa: S608


def _broken(name: object, what: str, statements: Remedy = ()) -> Broken:
    key = name if isinstance(name, str) and is_name(name) else ""
    remedy = "call Repair" if statements else "restore metadata.db from a backup"
    return Broken(Finding(Trouble.DATABASE, key, f"{shown(what)}: {remedy}"), statements)


_PARTS: Sequence[Callable[[sqlite3.Connection], Iterator[Broken]]] = (
    _damage,
    _schema,
    _records,
    _lineage,
    _mounts,
)

# With a damaged index a snapshot could seem to be missing.
_NOBODYS = "snapshot NOT IN (SELECT id FROM snapshots NOT INDEXED)"

_RULES: dict[str, tuple[str, Remedy]] = {
    "its parent is not there, or not committed": (
        """
        SELECT s.name FROM snapshots AS s NOT INDEXED LEFT JOIN snapshots AS p ON p.id = s.parent
        WHERE s.parent IS NOT NULL AND p.kind IS NOT 'committed'
        """,
        (),
    ),
    "its id may be given again": (
        """
        SELECT name FROM snapshots
        WHERE id > (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'snapshots')
        """,
        (
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'snapshots', 0"
            " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'snapshots')",
            "UPDATE sqlite_sequence"
            " SET seq = max(seq, (SELECT coalesce(max(id), 0) FROM snapshots))"
            " WHERE name = 'snapshots'",
        ),
    ),
}
"""Queries for rows that break the constraints of the schema, and statements that repair them."""
