"""Tests of the worker threads of the bus."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.errors import Cancelled, ResourceExhausted
from snapd_native.jobs import Job

BUSY, OTHER, THIRD = 1000, 1001, 1002
"""The uids of three users."""


async def run_beside_many_calls(lanes: Lanes, cancelled: int) -> list[int]:
    """Let one user make 50 calls, and two others one each; return the uids in order of turns.

    The first ``cancelled`` calls that wait are cancelled before their turns.
    """
    order: list[int] = []
    begun, released = threading.Semaphore(0), threading.Event()

    def work(uid: int) -> Callable[[], None]:
        def run() -> None:
            begun.release()
            released.wait()
            order.append(uid)

        return run

    busy = [
        asyncio.ensure_future(lanes.run(Lane.LIST, BUSY, work(BUSY)))
        for _ in range(Lane.LIST.threads)
    ]
    for _ in busy:
        await asyncio.to_thread(begun.acquire)
    users = [*[BUSY] * 50, OTHER, THIRD]
    waiting = [asyncio.ensure_future(lanes.run(Lane.LIST, uid, work(uid))) for uid in users]
    await asyncio.sleep(0)
    for call in waiting[:cancelled]:
        call.cancel()
    released.set()
    await asyncio.gather(*busy, *waiting, return_exceptions=True)
    return order


@pytest.mark.parametrize("cancelled", [0, 10, 50])
def test_a_user_with_many_calls_delays_another_user_by_one_turn(cancelled: int) -> None:
    lanes = Lanes()
    try:
        order = asyncio.run(run_beside_many_calls(lanes, cancelled))
    finally:
        lanes.close()
    assert order.count(BUSY) == Lane.LIST.threads + 50 - cancelled
    # Both threads work at once, so that two turns can end in any order.
    first = order[: 2 * Lane.LIST.threads + 2]
    assert {OTHER, THIRD} <= set(first)


def test_a_user_with_many_calls_leaves_room_for_another_user() -> None:
    async def run() -> None:
        released = threading.Event()
        calls = [
            asyncio.ensure_future(lanes.run(Lane.LIST, BUSY, released.wait))
            for _ in range(Lane.LIST.bound)
        ]
        others = [
            asyncio.ensure_future(lanes.run(Lane.LIST, uid, released.wait))
            for uid in (OTHER, THIRD)
        ]
        await asyncio.sleep(0)
        released.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, ResourceExhausted)]
        assert len(refused) == Lane.LIST.bound // 2
        assert await asyncio.gather(*others) == [True, True]

    lanes = Lanes()
    try:
        asyncio.run(run())
    finally:
        lanes.close()


@pytest.mark.parametrize("lane", [Lane.SURVEY, Lane.VERIFY])
def test_a_user_with_many_jobs_leaves_places_for_another_user(lane: Lane) -> None:
    lanes = Lanes()
    try:
        with ExitStack() as held:
            for _ in range(lane.places // 2):
                held.enter_context(Job(places=lanes.places(lane, BUSY)).turn())
            one_more = Job(places=lanes.places(lane, BUSY))
            one_more.cancel()
            # The job ends in its wait for a place.
            with pytest.raises(Cancelled), one_more.turn():
                pass
            with Job(places=lanes.places(lane, OTHER)).turn():
                pass
        with Job(places=lanes.places(lane, BUSY)).turn():
            pass
    finally:
        lanes.close()
