"""Jobs: the progress of long work, and its cancellation."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Places:
    """The places in which jobs work. The users take turns."""

    def __init__(self, number: int, limit: int) -> None:
        """Make ``number`` places; the jobs of one user get at most ``limit`` of them."""
        self._number = number
        self._limit = limit
        self._held: Counter[int] = Counter()
        """The places that jobs hold, by uid."""
        self._waiting: dict[object, int] = {}
        """The uids of the jobs that wait, in the order of their arrival."""
        self._last_turns: Counter[int] = Counter()
        """The number of the last turn of each user, while there are any jobs."""
        self._turn = 0
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, uid: int, check: Callable[[], object]) -> Iterator[None]:
        """Wait for a place, and hold it during the block; ``check`` can raise to end the wait."""
        job = object()
        with self._changed:
            self._waiting[job] = uid
            try:
                while not self._is_next(job):
                    self._changed.wait(_POLL_SECONDS)
                    check()
                self._held[uid] += 1
                self._turn += 1
                self._last_turns[uid] = self._turn
            finally:
                del self._waiting[job]
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._held[uid] -= 1
                if not self._held[uid]:
                    del self._held[uid]
                if not self._held and not self._waiting:
                    self._last_turns.clear()
                self._changed.notify_all()

    def _is_next(self, job: object) -> bool:
        if self._held.total() >= self._number:
            return False
        last_turn = {
            each: self._last_turns[uid]
            for each, uid in self._waiting.items()
            if self._held[uid] < self._limit
        }
        return job is min(last_turn, key=last_turn.__getitem__, default=None)


class Job:
    """A piece of work, run by one thread. Any thread can watch and cancel it."""

    def __init__(
        self,
        begun: Callable[[], object] = lambda: None,
        places: Places | None = None,
        uid: int = 0,
    ) -> None:
        """``begun`` is called when the work begins, but not for a call that is refused at once.

        Jobs with the same ``places`` share them; ``uid`` is the user who has called.
        """
        self.operation: Operation | None = None
        """The operation; None before the work has begun."""
        self.key = ""
        """The key or name that the work is on."""
        self.total = Usage(0, 0)
        """The work in all; zeros while it is unknown."""
        self._begun = begun
        self._places = places
        self._uid = uid
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
        """Wait for a place, and keep it during the block; raises as `report`."""
        if self._places is None:
            yield
            return
        with self._places.turn(self._uid, lambda: self.report(0, 0)):
            yield

    def report(self, inodes: int, size: int) -> None:
        """Count inodes and bytes that were done since the last report.

        Raises:
            Cancelled: the job was cancelled, and the work must be undone.
            Unavailable: the service is stopping, and the work must be undone.
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
