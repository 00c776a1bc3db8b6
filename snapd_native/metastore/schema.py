"""The schema of ``metadata.db``, and its parts that a database lacks."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from snapd_native.errors import DataLoss

VERSION = 5
"""The ``user_version`` of the first release."""

SCHEMA = """
    CREATE TABLE snapshots (
        id      INTEGER PRIMARY KEY AUTOINCREMENT,
        name    TEXT    NOT NULL UNIQUE
                        CHECK (length(CAST(name AS BLOB)) BETWEEN 1 AND 4096),
        kind    TEXT    NOT NULL CHECK (kind IN ('view', 'active', 'committed')),
        parent  INTEGER REFERENCES snapshots (id) CHECK (parent <> id),
        created INTEGER NOT NULL,
        updated INTEGER NOT NULL,
        labels  TEXT    NOT NULL CHECK (json_type(labels) = 'object'),
        size    INTEGER CHECK (size >= 0),
        inodes  INTEGER CHECK (inodes >= 0), boot TEXT CHECK (boot IS NULL OR kind = 'active'),
        CHECK ((kind = 'committed') = (size IS NOT NULL AND inodes IS NOT NULL))
    ) STRICT;
    -- The boot is that in which an active snapshot was prepared, until its tree is on disk: in any
    -- other boot that tree can be incomplete.

    CREATE INDEX children ON snapshots (parent) WHERE parent IS NOT NULL;
    CREATE INDEX unsettled ON snapshots (id) WHERE boot IS NOT NULL;
    -- This needs no JSON, which a damaged disk can have made invalid.
    CREATE INDEX standbys ON snapshots (id)
        WHERE kind = 'committed' AND instr(labels, 'snapd-native.standby') > 0;

    CREATE TRIGGER parent_is_committed BEFORE INSERT ON snapshots
    WHEN new.parent IS NOT NULL
        AND (SELECT kind FROM snapshots WHERE id = new.parent) IS NOT 'committed'
    BEGIN
        SELECT RAISE (ABORT, 'the parent is not committed');
    END;

    CREATE TRIGGER new_parent_is_committed BEFORE UPDATE OF parent ON snapshots
    WHEN new.parent IS NOT NULL
        AND (SELECT kind FROM snapshots WHERE id = new.parent) IS NOT 'committed'
    BEGIN
        SELECT RAISE (ABORT, 'the parent is not committed');
    END;

    CREATE TRIGGER only_labels_change
    BEFORE UPDATE OF id, name, kind, parent, created, size, inodes ON snapshots
    WHEN old.kind <> 'active' OR new.id <> old.id OR new.kind <> 'committed'
        OR (old.parent IS NOT NULL AND new.parent IS NOT old.parent)
    BEGIN
        SELECT RAISE (ABORT, 'only Commit changes more than labels');
    END;

    CREATE TABLE mounts (
        id        INTEGER PRIMARY KEY,
        snapshot  INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
        target    TEXT    NOT NULL,
        read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
        lifetime  TEXT    NOT NULL CHECK (lifetime IN ('persistent', 'client')),
        uid       INTEGER NOT NULL,
        owner     TEXT    NOT NULL CHECK ((owner = '') = (lifetime = 'persistent')),
        boot      TEXT    NOT NULL,
        mount     INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX mounted ON mounts (snapshot);

    -- How many transactions there were; see `Changes`.
    CREATE TABLE changes (id INTEGER PRIMARY KEY CHECK (id = 1), count INTEGER NOT NULL) STRICT;
    INSERT INTO changes VALUES (1, 0);
"""
"""The schema. SQLite keeps the text of each statement, and `missing` compares it."""

_RESTORE = "restore it from a backup"


class Part(NamedTuple):
    """A table, an index or a trigger."""

    type: str
    name: str
    sql: str


def ensure_schema(db: sqlite3.Connection, *, may_be_new: bool = True) -> None:
    """Create the schema in a new database, or check that the program knows the one that is there.

    Raises:
        DataLoss: another version of the program has made the database, it has lost a table, or it
            is new and ``may_be_new`` is false.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        remedy = "install the newer version again" if version > VERSION else _RESTORE
        raise DataLoss(
            f"metadata.db has schema version {version}, this program knows {VERSION}: {remedy}"
        )
    if version == 0 and not may_be_new:
        raise DataLoss(
            f"metadata.db has lost its records, but its snapshots are there: {_RESTORE},"
            " or move the snapshots away"
        )
    if version == 0:
        try:
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA}; PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise
            raise DataLoss(
                f"metadata.db has tables, but no schema version ({error}): {_RESTORE}"
            ) from error
    if lost := [part.name for part in missing(db) if part.type == "table"]:
        raise DataLoss(f"metadata.db has lost its table {' and '.join(lost)}: {_RESTORE}")


def missing(db: sqlite3.Connection) -> Sequence[Part]:
    """Return the parts of the schema that a database lacks, or has in another form."""
    there = _parts(db)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        model.executescript(SCHEMA)
        return [part for part in _parts(model) if part not in there]


def _parts(db: sqlite3.Connection) -> Sequence[Part]:
    rows = db.execute(
        "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite%' ORDER BY rowid"
    )
    return [Part(*row) for row in rows]
