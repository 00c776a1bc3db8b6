"""Bounded worker threads, separate for each kind of call, so that no kind delays another.

The users of a lane take turns, so that a user with many calls does not delay another user.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from enum import Enum
from typing import TypeVar

from snapd_native import linux
from snapd_native.errors import ResourceExhausted
from snapd_native.jobs import Places

_T = TypeVar("_T")


class Lane(Enum):
    """A kind of call: its threads, the calls that may wait or run, and how many work at a time."""

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
    """Measures or compares. Callers who may only read could otherwise fill the lane `TREE`."""
    VERIFY = (64, 64, 2)
    """Reads whole trees at idle priority; a call can take hours."""

    def __init__(self, threads: int, bound: int, places: int = 0) -> None:
        self.threads = threads
        self.bound = bound
        self.places = places
        """How many calls work at a time, while the others wait as visible jobs; 0 if all work."""

    @property
    def may_take_long(self) -> bool:
        """Whether its calls can be jobs."""
        return self in (Lane.TREE, Lane.SURVEY, Lane.VERIFY)


class _Turns:
    """Lends threads. The users take turns, however many of their calls wait."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}
        """The calls that wait, by uid; the first user has the next turn."""

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait for a place, and hold it for the block."""
        if self._free:
            self._free -= 1
        else:
            place = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(uid, deque()).append(place)
            try:
                await place
            except asyncio.CancelledError:
                if not place.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            uid, calls = next(iter(self._waiting.items()))
            del self._waiting[uid]
            place = calls.popleft()
            if calls:
                self._waiting[uid] = calls
            if not place.cancelled():
                place.set_result(None)
                return
        self._free += 1


class _Workers:
    """The worker threads of one lane."""

    def __init__(self, lane: Lane, shares: int, start: Callable[[], None]) -> None:
        """Give a user one of ``shares`` equal shares at most; call ``start`` in each new thread."""
        self.lane = lane
        self.places = Places(lane.places, lane.places // shares) if lane.places else None
        self.admitted: Counter[int] = Counter()
        """The calls that wait or work, by uid."""
        self.pool = ThreadPoolExecutor(
            lane.threads, thread_name_prefix=lane.name.lower(), initializer=start
        )
        self._turns = _Turns(lane.threads)
        self._own_bound = lane.bound // shares

    async def run(self, uid: int, work: Callable[[], _T]) -> _T:
        for admitted, bound in (
            (self.admitted.total(), self.lane.bound),
            (self.admitted[uid], self._own_bound),
        ):
            if admitted >= bound:
                raise ResourceExhausted(
                    f"{admitted} calls of this kind wait or run: try again when some have ended"
                )
        self.admitted[uid] += 1
        try:
            # The turn ends when the event loop has the result, so no call waits inside the pool.
            async with self._turns.turn(uid):
                return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self.admitted[uid] -= 1
            if not self.admitted[uid]:
                del self.admitted[uid]


class Lanes:
    """The worker threads of all lanes. Each lane exists twice: for root, and for all others."""

    def __init__(self) -> None:
        self._threads: list[int] = []
        self._workers = {
            (lane, root): _Workers(
                lane,
                # Of the users other than root, one gets at most half.
                1 if root else 2,
                lambda: self._threads.append(threading.get_native_id()),
            )
            for lane in Lane
            for root in (True, False)
        }

    def places(self, lane: Lane, uid: int) -> Places | None:
        """Return the places in which the jobs of ``uid`` in ``lane`` work; None if all work."""
        return self._workers[lane, uid == 0].places

    async def run(self, lane: Lane, uid: int, work: Callable[[], _T]) -> _T:
        """Run ``work`` for ``uid`` in a thread of ``lane`` and return its result.

        Raises:
            ResourceExhausted: the lane is full.
        """
        return await self._workers[lane, uid == 0].run(uid, work)

    def waits_for_disk(self) -> bool:
        """Tell whether a thread waits uninterruptibly, as for a slow or frozen disk."""
        return any(linux.is_uninterruptible(thread) for thread in list(self._threads))

    def close(self) -> None:
        """Wait for all threads to end."""
        for workers in self._workers.values():
            workers.pool.shutdown(wait=True)
