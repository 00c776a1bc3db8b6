"""Callers that ask for long work during a run of it share the next run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapd_native import trees
from snapd_native.snapshotter.upkeep import Shared
from tests.support.waiting import WAIT_TIMEOUT, wait_until_equal


class Work:
    """Work that counts its runs. Each run waits for `let_go`, and returns its number."""

    def __init__(self) -> None:
        self.begun = 0
        self.waiting: set[int] = set()
        """The threads of callers that wait for another caller's run."""
        self._go = threading.Semaphore(0)

    def __call__(self, report: trees.Report) -> int:
        self.begun += 1
        number = self.begun
        assert self._go.acquire(timeout=WAIT_TIMEOUT)
        report(1, 1)
        return number

    def let_go(self) -> None:
        self._go.release()

    def wait(self, *_: int) -> None:
        """Note that the calling thread waits for the run of another; a report of `Shared.run`."""
        self.waiting.add(threading.get_ident())


class GivenUp(Exception):
    """Raised by the report of a caller that gives up."""


def give_up(*_: int) -> None:
    raise GivenUp


def test_callers_during_a_run_share_the_next_run() -> None:
    work, shared = Work(), Shared[int]()
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(shared.run, work, work.wait)
        wait_until_equal(lambda: work.begun, 1)
        others = [pool.submit(shared.run, work, work.wait) for _ in range(15)]
        wait_until_equal(lambda: len(work.waiting), 15)
        work.let_go()
        work.let_go()
        assert first.result(WAIT_TIMEOUT) == 1
        assert {other.result(WAIT_TIMEOUT) for other in others} == {2}
    assert work.begun == 2


def test_when_a_caller_gives_up_the_next_caller_does_the_work() -> None:
    work, shared = Work(), Shared[int]()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.run, work, give_up)
        wait_until_equal(lambda: work.begun, 1)
        second = pool.submit(shared.run, work, work.wait)
        wait_until_equal(lambda: len(work.waiting), 1)
        with pytest.raises(GivenUp):
            shared.run(work, give_up)
        work.let_go()
        work.let_go()
        with pytest.raises(GivenUp):
            first.result(WAIT_TIMEOUT)
        assert second.result(WAIT_TIMEOUT) == 2
