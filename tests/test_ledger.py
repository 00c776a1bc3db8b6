"""The oracle of the storms and of the power cuts: neither deaf nor hasty."""

from __future__ import annotations

import json
from itertools import count

import pytest

from tests.vm.ledger import Book


class Load:
    """Tells a book of calls, as clients would."""

    def __init__(self) -> None:
        self.book = Book(("",))
        self.ledger = self.book.ledgers[""]
        self._numbers = count()

    def begin(self, operation: str, key: str, **fields: object) -> int:
        number = next(self._numbers)
        self._tell(call=number, at="begin", operation=operation, key=key, instance="", **fields)
        return number

    def done(self, number: int) -> None:
        self._tell(call=number, at="done")

    def refused(self, number: int, *, gone: bool) -> None:
        self._tell(call=number, at="refused", gone=gone)

    def _tell(self, **fields: object) -> None:
        self.book.read(json.dumps(fields))

    def compare(self, *names: str) -> list[str]:
        self.book.end()
        committed = {"kind": "committed", "files": {}, "labels": {}}
        return self.ledger.compare(
            {"left": [], "snapshots": [{"name": name, **committed} for name in names]}
        )


@pytest.fixture
def load() -> Load:
    """Have committed "base"."""
    load = Load()
    load.done(load.begin("prepare", "key", parent=""))
    load.done(load.begin("commit", "key", name="base", files={}))
    assert load.compare("base") == []
    return load


def test_what_was_committed_is_missed(load: Load) -> None:
    assert load.compare() == ["base is lost"]


def test_what_somebody_began_to_remove_may_be_there_or_not(load: Load) -> None:
    load.begin("remove", "base")
    assert load.compare("base") == []
    load.begin("remove", "base")
    assert load.compare() == []


def test_what_was_removed_must_not_be_there(load: Load) -> None:
    load.done(load.begin("remove", "base"))
    assert load.compare("base") == ["base is there, and was removed or never committed"]


def test_whose_remove_was_refused_is_missed(load: Load) -> None:
    load.refused(load.begin("remove", "base"), gone=False)
    assert load.compare() == ["base is lost"]


def test_another_may_still_remove_what_one_was_refused(load: Load) -> None:
    load.begin("remove", "base")
    load.refused(load.begin("remove", "base"), gone=False)
    assert load.compare() == []


def test_what_two_were_refused_is_missed(load: Load) -> None:
    first, second = load.begin("remove", "base"), load.begin("remove", "base")
    load.refused(first, gone=False)
    load.refused(second, gone=False)
    assert load.compare() == ["base is lost"]


def test_what_one_has_removed_another_cannot_bring_back(load: Load) -> None:
    first, second = load.begin("remove", "base"), load.begin("remove", "base")
    load.refused(first, gone=False)
    load.done(second)
    assert load.compare() == []


def test_a_view_that_another_may_still_remove_is_not_missed(load: Load) -> None:
    load.done(load.begin("view", "look"))
    load.begin("remove", "look")
    load.refused(load.begin("remove", "look"), gone=False)
    assert load.compare("base") == []


def test_a_view_that_another_has_removed_is_not_missed(load: Load) -> None:
    load.done(load.begin("view", "look"))
    load.begin("remove", "look")
    load.refused(load.begin("remove", "look"), gone=True)
    assert load.compare("base") == []


def test_a_view_whose_remove_was_refused_is_missed(load: Load) -> None:
    load.done(load.begin("view", "look"))
    load.refused(load.begin("remove", "look"), gone=False)
    assert load.compare("base") == ["look is lost"]
