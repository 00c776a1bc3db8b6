"""One run of long work for all who ask for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from snapd_native import trees

_POLL_SECONDS = 0.05
"""How often a caller that waits looks whether its own job is cancelled."""

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """Runs work once at a time; calls that come during a run share the next one.

    A caller never gets the result of a run that began before it asked.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        """The number of the last run."""
        self._is_running = False
        self._succeeded = 0
        """The last run that has a result."""
        self._result: _T

    def run(self, work: Callable[[trees.Report], _T], report: trees.Report) -> _T:
        """Return what a run of ``work`` finds that begins now or later.

        ``report`` is told of the progress of a run that this caller does, and is called while it
        waits for another caller's; it may raise. Then the next caller does the work.
        """
        with self._changed:
            wanted = self._begun + 1
            while self._is_running:
                self._changed.wait(_POLL_SECONDS)
                report(0, 0)
                if self._succeeded >= wanted:
                    return self._result
            if self._succeeded >= wanted:
                return self._result
            self._begun += 1
            own = self._begun
            self._is_running = True
        try:
            result = work(report)
            with self._changed:
                self._succeeded, self._result = own, result
            return result
        finally:
            with self._changed:
                self._is_running = False
                self._changed.notify_all()
