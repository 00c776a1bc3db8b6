"""Jobs: the progress of long work, and its cancellation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum

from snapd_native.errors import Cancelled, Unavailable
from snapd_native.model import Usage, quote

_POLL_SECONDS = 0.05
"""Seconds after which waiting work checks again whether it is cancelled."""


class Operation(StrEnum):
    """The kind of work of a job; the value is its name on the wire."""

    PREPARE = "prepare"
    COMMIT = "commit"
    USAGE = "usage"
    CLEANUP = "cleanup"
    CHECK = "check"
    REPAIR = "repair"
    VERIFY = "verify"


class Job:
    """A piece of work, run by one thread. Any thread can watch and cancel it."""

    def __init__(
        self,
        begun: Callable[[], object] = lambda: None,
        places: Sequence[threading.Semaphore] = (),
    ) -> None:
        """``begun`` is called when the work begins, but not for a call that is refused at once.

        Each of the ``places`` limits how many of the jobs that share it work at a time. A job takes
        them in their order.
        """
        self.operation: Operation | None = None
        """The operation; None before the work has begun."""
        self.key = ""
        """The key or name that the work is on."""
        self.total = Usage(0, 0)
        """The work in all; zeros while it is unknown."""
        self._begun = begun
        self._places = places
        self._stopping: threading.Event | None = None
        self._inodes = 0
        self._size = 0
        self._lock = threading.Lock()
        self._cancelled = False
        self._concluded = False

    @property
    def done(self) -> Usage:
        """The work so far."""
        return Usage(inodes=self._inodes, size=self._size)

    def begin(
        self,
        operation: Operation,
        key: str,
        total: Usage | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        """Note that the work begins, and must end when ``stopping`` is set."""
        self.operation = operation
        self.key = key
        self._stopping = stopping
        if total is not None:
            self.total = total
        self._begun()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a place of each kind, and keep them during the block; raises as `report`."""
        with ExitStack() as held:
            for places in self._places:
                while not places.acquire(timeout=_POLL_SECONDS):
                    self.report(0, 0)
                held.callback(places.release)
            yield

    def report(self, inodes: int, size: int) -> None:
        """Count inodes and bytes that were done since the last report.

        Raises:
            Cancelled: the job was cancelled, and the work must be undone.
            Unavailable: the same, because the service is stopping.
        """
        if self._stopping and self._stopping.is_set():
            raise Unavailable("the service is stopping: try again when it runs")
        self._inodes += inodes
        self._size += size
        if self._cancelled:
            raise self._cancellation()

    def conclude(self) -> None:
        """Note that the work takes effect now and can no longer be cancelled.

        Raises:
            Cancelled: the job was cancelled, and the work must be undone.
        """
        with self._lock:
            if self._cancelled:
                raise self._cancellation()
            self._concluded = True

    def cancel(self) -> bool:
        """Cancel the job; return False if it is too late."""
        with self._lock:
            self._cancelled = not self._concluded
            return self._cancelled

    def _cancellation(self) -> Cancelled:
        what = f"{self.operation or 'call'} {quote(self.key)}" if self.key else self.operation
        return Cancelled(f"{what} was cancelled, and nothing is changed: call it again if need be")
