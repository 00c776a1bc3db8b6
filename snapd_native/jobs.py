"""Long work as others see it: how far it is, and a way to cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from snapd_native.errors import Cancelled
from snapd_native.model import Usage, quote

_POLL_SECONDS = 0.05
"""How often work that waits for its turn looks whether it is cancelled."""


class Operation(StrEnum):
    """What a job does; the value is its name on the wire."""

    PREPARE = "prepare"
    COMMIT = "commit"
    USAGE = "usage"
    CLEANUP = "cleanup"
    CHECK = "check"
    REPAIR = "repair"
    VERIFY = "verify"


class Job:
    """One piece of work: its thread begins it, reports and concludes; any thread may watch it."""

    def __init__(
        self,
        begun: Callable[[], object] = lambda: None,
        places: threading.Semaphore | None = None,
    ) -> None:
        """Have ``begun`` called when the work begins: what is refused at once never does.

        All jobs with the same ``places`` take turns: only so many of them work at a time.
        """
        self.operation: Operation | None = None
        """What is done; None before it has begun."""
        self.key = ""
        """What it is done to."""
        self.total = Usage(0, 0)
        """What will be done in all; zeros while that is unknown."""
        self._begun = begun
        self._places = places
        self._inodes = 0
        self._size = 0
        self._lock = threading.Lock()
        self._cancelled = False
        self._concluded = False

    @property
    def done(self) -> Usage:
        """What is done so far."""
        return Usage(inodes=self._inodes, size=self._size)

    def begin(self, operation: Operation, key: str, total: Usage | None = None) -> None:
        """Say that the work goes ahead."""
        self.operation = operation
        self.key = key
        if total is not None:
            self.total = total
        self._begun()

    @contextmanager
    def turn(self, report: Callable[[int, int], None]) -> Iterator[None]:
        """Wait for one of the job's places, and keep it for the block.

        ``report`` is called meanwhile; it may raise to end the wait.
        """
        if self._places is None:
            yield
            return
        while not self._places.acquire(timeout=_POLL_SECONDS):
            report(0, 0)
        try:
            yield
        finally:
            self._places.release()

    def report(self, inodes: int, size: int) -> None:
        """Count inodes and bytes that were done since the last report.

        Raises:
            Cancelled: the work is to be undone.
        """
        self._inodes += inodes
        self._size += size
        if self._cancelled:
            raise self._cancellation()

    def conclude(self) -> None:
        """Say that the work takes effect now, and can no longer be cancelled.

        Raises:
            Cancelled: somebody has, and it is to be undone.
        """
        with self._lock:
            if self._cancelled:
                raise self._cancellation()
            self._concluded = True

    def cancel(self) -> bool:
        """Have the work undone; False if it is too late for that."""
        with self._lock:
            self._cancelled = not self._concluded
            return self._cancelled

    def _cancellation(self) -> Cancelled:
        what = f"{self.operation or 'call'} {quote(self.key)}" if self.key else self.operation
        return Cancelled(f"{what} was cancelled, and nothing is changed: call it again if need be")
