"""A thread for tasks that no call waits for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from snapd_native.errors import Cancelled, Unavailable

log = logging.getLogger(__name__)


class Background:
    """One thread that runs tasks one after the other."""

    def __init__(self, name: str, complaint: str) -> None:
        """When a task fails, ``complaint`` is logged with the error."""
        self._complaint = complaint
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None]
        self._tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Run ``task`` after the tasks that were submitted before it."""
        outcome: Future[None] = Future()
        self._tasks.put((task, outcome))
        return outcome

    def close(self) -> None:
        """End the thread after the last task that was submitted."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            task, outcome = entry
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                task()
            except Exception as error:
                if not isinstance(error, (Unavailable, Cancelled)):
                    log.warning("%s: %s", self._complaint, error)
                outcome.set_exception(error)
            else:
                outcome.set_result(None)
