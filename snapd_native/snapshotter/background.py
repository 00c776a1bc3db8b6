"""A thread for tasks that no call waits for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from snapd_native.errors import Cancelled, Unavailable

log = logging.getLogger(__name__)


class Background:
    """One thread that runs tasks one after the other."""

    def __init__(self, name: str, complaint: str) -> None:
        """When a task fails, ``complaint`` is logged with the error."""
        self._complaint = complaint
        self._thread = ThreadPoolExecutor(1, name)

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Run ``task`` after the tasks that were submitted before it."""
        return self._thread.submit(self._run, task)

    def close(self) -> None:
        """End the thread after the last task that was submitted."""
        self._thread.shutdown()

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except (Unavailable, Cancelled):
            raise
        except Exception as error:
            log.warning("%s: %s", self._complaint, error)
            raise
