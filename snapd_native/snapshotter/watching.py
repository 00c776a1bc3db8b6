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
        """Raise Unavailable if the service is stopping; for work without a job."""
        if self._stopping.is_set():
            raise Unavailable("the service is stopping: try again when it runs")

    def over(self, job: Job, *, count: bool = True) -> trees.Report:
        """Return a function that adds progress to the job, and raises if the work must end.

        Without ``count`` it only raises, for a second pass over a tree.
        """

        def report(inodes: int, size: int) -> None:
            self.check()
            job.report(inodes * count, size * count)

        return report
