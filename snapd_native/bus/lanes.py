"""Bounded worker threads, so that no kind of call stands in the way of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from enum import Enum
from typing import TypeVar

from snapd_native.errors import ResourceExhausted

_T = TypeVar("_T")


class Lane(Enum):
    """What kind of work a call is: its worker threads, and the calls that may be under way."""

    READ = (4, 1024)
    """Answered from the metastore."""
    LIST = (2, 256)
    """Answered from the metastore too, but perhaps from all of it."""
    CHANGE = (4, 512)
    """One short transaction."""
    USER = (1, 64)
    """Whose something is, before anybody knows whether the caller may ask."""
    MOUNT = (8, 256)
    """One change of the host's mounts, or an answer from them."""
    TREE = (64, 64)
    """Copies, measures or waits: minutes perhaps, so nobody queues behind another."""
    VERIFY = (2, 64)
    """Reads whole trees in the time that nobody else wants: that takes as long as it takes."""

    def __init__(self, threads: int, bound: int) -> None:
        self.threads = threads
        self.bound = bound

    @property
    def may_take_long(self) -> bool:
        """Whether what is in it can be a job."""
        return self in (Lane.TREE, Lane.VERIFY)


class Lanes:
    """The worker threads of all lanes: each is there for root, and once more for all others."""

    def __init__(self) -> None:
        self._pools = {
            (lane, root): ThreadPoolExecutor(lane.threads, thread_name_prefix=lane.name.lower())
            for lane in Lane
            for root in (True, False)
        }
        self._turns = {way: asyncio.Semaphore(way[0].threads) for way in self._pools}
        self._admitted = dict.fromkeys(self._pools, 0)

    @asynccontextmanager
    async def turn(self, lane: Lane, uid: int) -> AsyncIterator[ThreadPoolExecutor]:
        """Wait for a thread of ``lane`` to be free for ``uid``, and keep it free for the caller.

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
            async with self._turns[way]:
                yield self._pools[way]
        finally:
            self._admitted[way] -= 1

    async def run(self, lane: Lane, uid: int, work: Callable[[], _T]) -> _T:
        """Run ``work`` for ``uid`` in a thread of ``lane`` and return its result.

        Raises as `turn`.
        """
        async with self.turn(lane, uid) as pool:
            return await asyncio.get_running_loop().run_in_executor(pool, work)

    def close(self) -> None:
        """Wait for all threads to end."""
        for pool in self._pools.values():
            pool.shutdown(wait=True)
