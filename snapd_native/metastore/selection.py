"""The part of a filter that SQLite can decide by itself."""

from __future__ import annotations

from itertools import islice

from snapd_native.filters import Filter, Operator, Selector

MAX_TERMS = 8
"""Selectors of one filter that SQLite is told of: its expressions are at most 1000 deep."""

_COLUMNS = {"name": "s.name", "parent": "coalesce(p.name, '')", "kind": "s.kind"}


def condition(chosen: Filter) -> tuple[str, list[str]]:
    """Return an SQL condition, with its values, that holds for every snapshot that matches.

    It may hold for others too: the filter itself has the last word. Equality by name or parent
    is found through an index.
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
