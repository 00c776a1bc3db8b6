"""Deleting in the background what is removed."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from snapd_native.errors import Unavailable

log = logging.getLogger(__name__)


class Reaper:
    """One thread that does all deleting, so that no two deletions meet in one tree."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None]
        self._tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Run ``task`` after all that were submitted before it."""
        outcome: Future[None] = Future()
        self._tasks.put((task, outcome))
        return outcome

    def close(self) -> None:
        """End the thread after all that was submitted."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            task, outcome = entry
            try:
                task()
            except Exception as error:
                if not isinstance(error, Unavailable):
                    log.warning("deleting what was removed failed, Cleanup tries again: %s", error)
                outcome.set_exception(error)
            else:
                outcome.set_result(None)
