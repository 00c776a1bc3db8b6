"""List the snapshots that match a filter, the simple part of which becomes SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

from snapd_native.errors import Cancelled, ResourceExhausted
from snapd_native.filters import Filter, Operator, Selector
from snapd_native.metastore import records
from snapd_native.model import Info

MAX_PAGE = 8 << 20
"""Bytes of names, parents and labels in a page at most. A message of the bus has 32 MiB."""

MAX_TERMS = 8
"""Selectors of one filter that are translated at most. SQLite limits the depth to 1000."""

_BLOCK = 16
"""Records that are read before they are compared."""

_COLUMNS = {"name": "s.name", "parent": "coalesce(p.name, '')", "kind": "s.kind"}


def page(
    db: sqlite3.Connection, chosen: Filter, after: str, limit: int, is_wanted: Callable[[], bool]
) -> list[Info]:
    """Return the first ``limit`` matching snapshots after ``after``; see `Metastore.list`."""
    where, values = _condition(chosen)
    found: list[Info] = []
    size = 0
    rows = db.execute(
        f"SELECT {records.COLUMNS} WHERE s.name > ? AND ({where}) ORDER BY s.name",
        (after, *values),
    )
    # Closing the cursor ends the read transaction, also after an error.
    with closing(rows):
        for row in _by_blocks(rows):
            if not is_wanted():
                raise Cancelled("the list is not wanted any more: nothing is changed")
            record = records.readable(row)
            if record and chosen.matches(info := record.info):
                found.append(info)
                size += sum(len(text.encode()) for text in (info.name, info.parent, row[7]))
                if size > MAX_PAGE:
                    raise ResourceExhausted(
                        f"the page is over {MAX_PAGE >> 20} MiB: ask for a smaller limit"
                    )
                if len(found) == limit:
                    break
    return found


def _by_blocks(rows: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
    """Iterate over rows, but read them in blocks.

    SQLite releases the GIL for a moment at each row. That moment is mostly too short for a waiting
    thread, and it restarts the switch interval after which Python forces a thread to hand over the
    GIL. When List compared each row as it was read, other threads waited for half a second.
    """
    while block := rows.fetchmany(_BLOCK):
        yield from block


def _condition(chosen: Filter) -> tuple[str, list[str]]:
    """Return an SQL condition, with its values, that is true for every matching snapshot.

    It can be true for others too, so the caller still applies the filter. Equality of names and
    parents uses an index.
    """
    alternatives: list[str] = []
    values: list[str] = []
    for selectors in chosen.alternatives:
        terms = []
        for selector in islice(filter(_is_plain, selectors), MAX_TERMS):
            value = selector.value
            if selector.path[0] == "parent" and value:
                terms.append("s.parent = (SELECT id FROM snapshots WHERE name = ?)")
            else:
                terms.append(f"{_COLUMNS[selector.path[0]]} = ?")
            values.append(value)
        alternatives.append(" AND ".join(terms) or "TRUE")
    return " OR ".join(f"({terms})" for terms in alternatives) or "TRUE", values


def _is_plain(selector: Selector) -> bool:
    return (
        selector.operator is Operator.EQUAL
        and selector.path[0] in _COLUMNS
        and selector.value.isprintable()
    )
