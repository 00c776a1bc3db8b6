"""The rules of the database, looked after once more by who does not trust its triggers."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from snapd_native.metastore.connections import transaction
from snapd_native.model import Finding, Trouble, shown

_RULES = {
    "its parent is not there, or not committed": """
        SELECT s.name FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent
        WHERE s.parent IS NOT NULL AND p.kind IS NOT 'committed'
    """,
    "it is its own ancestor": """
        WITH RECURSIVE reached (id) AS (
            SELECT id FROM snapshots WHERE parent IS NULL
            UNION SELECT s.id FROM snapshots AS s JOIN reached AS r ON s.parent = r.id
        )
        SELECT s.name FROM snapshots AS s JOIN snapshots AS p ON p.id = s.parent
        WHERE s.id NOT IN reached
    """,
    "its id may be given again": """
        SELECT name FROM snapshots
        WHERE id > (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'snapshots')
    """,
    "its mounts are recorded, but it is not": """
        SELECT target FROM mounts WHERE snapshot NOT IN (SELECT id FROM snapshots)
    """,
}
"""What the schema itself should keep from happening, and what finds it all the same."""


def mend(db: sqlite3.Connection) -> None:
    """Make anew, as a whole or not at all, what follows from the tables: indexes and the last id.

    Nothing is done where nothing is wrong.
    """
    with transaction(db):
        if not broken_rules(db):
            return
        db.execute("REINDEX")
        db.execute(
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'snapshots', 0"
            " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'snapshots')"
        )
        db.execute(
            "UPDATE sqlite_sequence"
            " SET seq = max(seq, (SELECT coalesce(max(id), 0) FROM snapshots))"
            " WHERE name = 'snapshots'"
        )


def broken_rules(db: sqlite3.Connection) -> Sequence[Finding]:
    """Return what is wrong with a database and with the rules that it keeps."""
    told = [what for (what,) in db.execute("PRAGMA integrity_check") if what != "ok"]
    found = [
        Finding(
            Trouble.DATABASE,
            "",
            f"metadata.db is damaged ({shown(what)}): restore it from a backup",
        )
        for what in told
    ]
    for rule, query in _RULES.items():
        found += [
            Finding(Trouble.DATABASE, str(name), f"{rule}: restore it from a backup")
            for (name,) in db.execute(query)
        ]
    return found
