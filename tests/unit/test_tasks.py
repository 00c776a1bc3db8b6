"""Tests of work that goes on without its caller."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from snapd_native.tasks import undisturbed


def test_work_goes_on_and_logs_nothing_when_its_caller_is_cancelled() -> None:
    reported: list[dict[str, Any]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        work = loop.create_future()
        caller = loop.create_task(undisturbed(work))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not work.cancelled()
        work.set_exception(ValueError("failed"))
        del work
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert reported == []


def test_the_caller_gets_the_result_or_the_error_of_the_work() -> None:
    async def run(work: asyncio.Future[int]) -> int:
        return await undisturbed(work)

    async def both() -> None:
        loop = asyncio.get_running_loop()
        work = loop.create_future()
        loop.call_soon(work.set_result, 3)
        assert await run(work) == 3
        failing: asyncio.Future[int] = loop.create_future()
        loop.call_soon(failing.set_exception, ValueError("failed"))
        with pytest.raises(ValueError, match="failed"):
            await run(failing)

    asyncio.run(both())
