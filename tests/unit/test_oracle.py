"""The oracle of the storm and power-cut tests: what it reports and what it accepts."""

from __future__ import annotations

import json
from itertools import count

import pytest

from tests.support.oracle import Oracle


class ReportedLoad:
    """Reports calls to an oracle, as clients do."""

    def __init__(self) -> None:
        self.oracle = Oracle(("",))
        self.expected = self.oracle.instances[""]
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
        self.oracle.read(json.dumps(fields))

    def compare(self, *names: str) -> list[str]:
        self.oracle.end()
        committed = {"kind": "committed", "files": {}, "labels": {}}
        return self.expected.compare(
            {"orphans": [], "snapshots": [{"name": name, **committed} for name in names]}
        )


@pytest.fixture
def load() -> ReportedLoad:
    """Return a load that has committed "base"."""
    load = ReportedLoad()
    load.done(load.begin("prepare", "key", parent=""))
    load.done(load.begin("commit", "key", name="base", files={}))
    assert load.compare("base") == []
    return load


def test_the_oracle_reports_a_lost_commit(load: ReportedLoad) -> None:
    assert load.compare() == ["base is lost"]


def test_the_oracle_accepts_both_outcomes_of_an_open_remove(load: ReportedLoad) -> None:
    load.begin("remove", "base")
    assert load.compare("base") == []
    load.begin("remove", "base")
    assert load.compare() == []


def test_the_oracle_reports_a_removed_snapshot_that_exists(load: ReportedLoad) -> None:
    load.done(load.begin("remove", "base"))
    assert load.compare("base") == ["base is there, and was removed or never committed"]


def test_the_oracle_reports_a_loss_after_a_refused_remove(load: ReportedLoad) -> None:
    load.refused(load.begin("remove", "base"), gone=False)
    assert load.compare() == ["base is lost"]


def test_the_oracle_accepts_a_loss_while_another_remove_is_open(load: ReportedLoad) -> None:
    load.begin("remove", "base")
    load.refused(load.begin("remove", "base"), gone=False)
    assert load.compare() == []


def test_the_oracle_reports_a_loss_after_two_refused_removes(load: ReportedLoad) -> None:
    first, second = load.begin("remove", "base"), load.begin("remove", "base")
    load.refused(first, gone=False)
    load.refused(second, gone=False)
    assert load.compare() == ["base is lost"]


def test_the_oracle_accepts_a_loss_when_one_of_two_removes_succeeds(load: ReportedLoad) -> None:
    first, second = load.begin("remove", "base"), load.begin("remove", "base")
    load.refused(first, gone=False)
    load.done(second)
    assert load.compare() == []


def test_the_oracle_accepts_a_lost_view_while_another_remove_is_open(load: ReportedLoad) -> None:
    load.done(load.begin("view", "look"))
    load.begin("remove", "look")
    load.refused(load.begin("remove", "look"), gone=False)
    assert load.compare("base") == []


def test_the_oracle_accepts_a_lost_view_when_remove_found_it_gone(load: ReportedLoad) -> None:
    load.done(load.begin("view", "look"))
    load.begin("remove", "look")
    load.refused(load.begin("remove", "look"), gone=True)
    assert load.compare("base") == []


def test_the_oracle_reports_a_lost_view_after_a_refused_remove(load: ReportedLoad) -> None:
    load.done(load.begin("view", "look"))
    load.refused(load.begin("remove", "look"), gone=False)
    assert load.compare("base") == ["look is lost"]
