"""Translate the simple part of a filter to SQL."""

from __future__ import annotations

from itertools import islice

from snapd_native.filters import Filter, Operator, Selector

MAX_TERMS = 8
"""Selectors of one filter that are translated at most. SQLite limits the depth to 1000."""

_COLUMNS = {"name": "s.name", "parent": "coalesce(p.name, '')", "kind": "s.kind"}


def condition(chosen: Filter) -> tuple[str, list[str]]:
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
