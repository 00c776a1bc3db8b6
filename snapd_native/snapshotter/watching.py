"""End long work when the service stops or its job is cancelled."""

from __future__ import annotations

import threading

from snapd_native import trees
from snapd_native.errors import Unavailable
from snapd_native.jobs import Job


class Watch:
    """Ends work when the service is stopping, or when its job is cancelled."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def check(self, *_: int) -> None:
        """Raise Unavailable if the service is stopping; for work that is no job's."""
        if self._stopping.is_set():
            raise Unavailable("the service is stopping: try again when it runs")

    def over(self, job: Job, *, count: bool = True) -> trees.Report:
        """Return a function that takes progress, and raises when the work is to end.

        Without ``count`` it does not add to the job's progress, as in a second pass over a tree.
        """

        def report(inodes: int, size: int) -> None:
            self.check()
            job.report(inodes * count, size * count)

        return report
