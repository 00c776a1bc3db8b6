"""Tests of the worker threads of the bus."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.errors import ResourceExhausted

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


def test_one_user_may_use_at_most_half_of_the_calls_of_a_lane() -> None:
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
