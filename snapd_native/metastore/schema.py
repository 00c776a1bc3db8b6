"""The schema of ``metadata.db``, as a list of migrations."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from snapd_native.errors import DataLoss

MIGRATIONS = (
    """
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
        inodes  INTEGER CHECK (inodes >= 0),
        CHECK ((kind = 'committed') = (size IS NOT NULL AND inodes IS NOT NULL))
    ) STRICT;

    CREATE INDEX children ON snapshots (parent) WHERE parent IS NOT NULL;

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
    """,
    """
    -- The boot of the machine during which an active snapshot was prepared, until its tree is on
    -- disk: at any other boot that tree may be half there.
    ALTER TABLE snapshots ADD COLUMN boot TEXT CHECK (boot IS NULL OR kind = 'active');
    CREATE INDEX unsettled ON snapshots (id) WHERE boot IS NOT NULL;
    CREATE INDEX standbys ON snapshots (id)
        WHERE kind = 'committed' AND json_extract(labels, '$."snapd-native.standby"') IS NOT NULL;
    """,
    """
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
    """,
    """
    -- How many transactions there were; see `Changes`.
    CREATE TABLE changes (id INTEGER PRIMARY KEY CHECK (id = 1), count INTEGER NOT NULL) STRICT;
    INSERT INTO changes VALUES (1, 0);
    """,
    """
    -- What a damaged disk has made of labels, this index can still do without.
    DROP INDEX standbys;
    CREATE INDEX standbys ON snapshots (id)
        WHERE kind = 'committed' AND instr(labels, 'snapd-native.standby') > 0;
    """,
)
"""The migrations in order; ``user_version`` is the number of those that were applied."""


class Part(NamedTuple):
    """A table, an index or a trigger."""

    type: str
    name: str
    sql: str


def migrate(db: sqlite3.Connection, *, may_be_new: bool = True) -> None:
    """Apply the missing migrations, each in a transaction of its own.

    Raises:
        DataLoss: a newer version of the program has made the database, its schema is not that of
            its version, or it is new and ``may_be_new`` is false.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise DataLoss(
            f"metadata.db has schema version {version}, this program knows {len(MIGRATIONS)}:"
            " install the newer version again"
        )
    if version == 0 and not may_be_new:
        raise DataLoss(
            "metadata.db has lost its records, but its snapshots are there: restore it from a"
            " backup, or move the snapshots away"
        )
    try:
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        raise DataLoss(
            f"metadata.db does not have its schema version {version} ({error}):"
            " restore it from a backup"
        ) from error
    if lost := [part.name for part in missing(db) if part.type == "table"]:
        raise DataLoss(
            f"metadata.db has lost its table {' and '.join(lost)}: restore it from a backup"
        )


def missing(db: sqlite3.Connection) -> Sequence[Part]:
    """Return the parts of the newest schema that a database lacks, or has in another form."""
    there = _parts(db)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        for script in MIGRATIONS:
            model.executescript(script)
        return [part for part in _parts(model) if part not in there]


def _parts(db: sqlite3.Connection) -> Sequence[Part]:
    rows = db.execute(
        "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite%' ORDER BY rowid"
    )
    return [Part(*row) for row in rows]
