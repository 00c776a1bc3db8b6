"""Bounded worker threads, separate for each kind of call, so that no kind delays another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import TypeVar

from snapd_native import linux
from snapd_native.errors import ResourceExhausted

_T = TypeVar("_T")


class Lane(Enum):
    """A kind of work: the number of its worker threads, and of its calls at once."""

    READ = (4, 1024)
    """Reads one record."""
    LIST = (2, 256)
    """Reads many records."""
    CHANGE = (4, 512)
    """One short transaction."""
    USER = (1, 64)
    """Looks up the owner of a mount for the authorisation."""
    MOUNT = (8, 256)
    """Changes or reads the mounts of the host."""
    TREE = (64, 64)
    """Copies, commits or deletes. Each call can take minutes, so each has a thread."""
    SURVEY = (64, 64, 8)
    """Measures or compares, for callers who may only read, apart from changes."""
    VERIFY = (64, 64, 2)
    """Reads whole trees at idle priority; a call can take hours."""

    def __init__(self, threads: int, bound: int, places: int = 0) -> None:
        self.threads = threads
        self.bound = bound
        self.places = places
        """How many of the calls work at a time; 0 if all do."""

    @property
    def may_take_long(self) -> bool:
        """Whether its calls can be jobs."""
        return self in (Lane.TREE, Lane.SURVEY, Lane.VERIFY)


class Lanes:
    """The worker threads of all lanes. Each lane exists twice: for root, and for all others."""

    def __init__(self) -> None:
        self._threads: list[int] = []
        self._pools = {
            (lane, root): ThreadPoolExecutor(
                lane.threads,
                thread_name_prefix=lane.name.lower(),
                initializer=lambda: self._threads.append(threading.get_native_id()),
            )
            for lane in Lane
            for root in (True, False)
        }
        self._turns = {way: asyncio.Semaphore(way[0].threads) for way in self._pools}
        self._admitted = dict.fromkeys(self._pools, 0)
        self._places = {
            way: threading.Semaphore(way[0].places) for way in self._pools if way[0].places
        }

    def places(self, lane: Lane, uid: int) -> threading.Semaphore | None:
        """Return the semaphore for jobs of ``lane`` and ``uid``; None if they need none."""
        return self._places.get((lane, uid == 0))

    async def run(self, lane: Lane, uid: int, work: Callable[[], _T]) -> _T:
        """Run ``work`` for ``uid`` in a thread of ``lane`` and return its result.

        Raises:
            ResourceExhausted: the lane is full.
        """
        way = lane, uid == 0
        if self._admitted[way] >= lane.bound:
            raise ResourceExhausted(
                f"{lane.bound} operations of this kind are running: try again when some are done"
            )
        self._admitted[way] += 1
        try:
            # A thread gets no work before the event loop has taken its last result.
            async with self._turns[way]:
                return await asyncio.get_running_loop().run_in_executor(self._pools[way], work)
        finally:
            self._admitted[way] -= 1

    def waits_for_disk(self) -> bool:
        """Tell whether a thread waits uninterruptibly, as for a slow or frozen disk."""
        return any(linux.is_uninterruptible(thread) for thread in list(self._threads))

    def close(self) -> None:
        """Wait for all threads to end."""
        for pool in self._pools.values():
            pool.shutdown(wait=True)
