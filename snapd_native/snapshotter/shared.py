"""One run of long work for several callers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from snapd_native import trees

_POLL_SECONDS = 0.05
"""Seconds after which a waiting caller checks again whether its own job is cancelled."""

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """Runs work for one caller at a time. Calls during a run share the result of the next run.

    A caller never gets the result of a run that began before its call.
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
        """Return the result of a run of ``work`` that begins now or later.

        ``report`` is called with the progress of the run, or while another caller runs it. It may
        raise; then the next caller does the work.
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
