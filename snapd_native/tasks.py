"""Await work that others have begun."""

from __future__ import annotations

import asyncio
from typing import TypeVar

_T = TypeVar("_T")


async def undisturbed(work: asyncio.Future[_T]) -> _T:
    """Return the result of ``work``, which goes on if the caller is cancelled.

    asyncio.shield() does that too, but Python 3.14 logs the error of work whose caller has left.
    """
    # asyncio also logs an error that is never retrieved.
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait({work})
    return work.result()
