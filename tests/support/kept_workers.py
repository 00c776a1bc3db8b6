"""Worker processes that serve the engines of one test after the other.

An engine starts workers at its first copy, and ends them when it is closed. In a run of a thousand
engines, the starts of workers would take more time than the copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest

from snapd_native.trees import crew

_Kept = defaultdict[str, list[crew._Worker]]
"""Workers without an engine, by their priority."""


@pytest.fixture(scope="session")
def idle_workers() -> Iterator[_Kept]:
    """Yield the workers that wait for the next engine, and end them after the last test."""
    kept: _Kept = defaultdict(list)
    yield kept
    for workers in kept.values():
        for worker in workers:
            worker.close()


@pytest.fixture
def kept_workers(idle_workers: _Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let crews take over the workers of closed crews."""
    start = crew._hire

    def hire(priority: str) -> crew._Worker:
        while idle_workers[priority]:
            worker = idle_workers[priority].pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
        return start(priority)

    def close(self: crew.Crew) -> None:
        idle_workers[self._priority] += self._idle
        self._idle.clear()

    monkeypatch.setattr(crew, "_hire", hire)
    monkeypatch.setattr(crew.Crew, "close", close)
