"""Jobs on the bus: objects that show progress and can be cancelled, while the work runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

from dbus_next.signature import Variant

from snapd_native.bus.replies import described
from snapd_native.errors import Cancelled, FailedPrecondition, NotFound
from snapd_native.jobs import Job
from snapd_native.wire.names import JOB, JOB_PATH, MANAGER, OBJECT_PATH, PROPERTIES
from snapd_native.wire.values import Body

PERIOD = 0.2
"""Seconds between two signals about the progress of a job."""

Emit = Callable[[str, str, str, Body], None]
"""Sends a signal: object, interface, member, arguments."""


@dataclass(frozen=True, slots=True)
class JobObject:
    """A job with an object on the bus."""

    id: int
    job: Job
    uid: int
    """The user that started the job."""
    ended: asyncio.Future[None]

    @property
    def path(self) -> str:
        """The path of its object."""
        return f"{JOB_PATH}/{self.id}"

    def progress(self) -> dict[str, Variant]:
        """Return the properties that change."""
        done, total = self.job.done, self.job.total
        return {
            "EntriesDone": Variant("t", done.inodes),
            "EntriesTotal": Variant("t", total.inodes),
            "BytesDone": Variant("t", done.size),
            "BytesTotal": Variant("t", total.size),
        }

    def properties(self) -> dict[str, Variant]:
        """Return all properties."""
        return {
            "Id": Variant("u", self.id),
            "Operation": Variant("s", str(self.job.operation)),
            "Key": Variant("s", self.job.key),
            **self.progress(),
        }

    async def cancel(self) -> None:
        """Cancel the job, and wait until its work is undone.

        Raises:
            FailedPrecondition: it is too late.
        """
        if not self.job.cancel():
            raise FailedPrecondition(f"job {self.id} cannot be cancelled: it is done already")
        await asyncio.shield(self.ended)


class Jobs:
    """All jobs that have objects. Only `listing` may be called outside of the event loop."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._ids = cycle(range(1, 1 << 32))
        self._objects: dict[str, JobObject] = {}

    def get(self, path: str) -> JobObject:
        """Return the job at ``path``, for which `may_be_at` is true.

        Raises:
            NotFound: the job has ended or never existed.
        """
        if path not in self._objects:
            number = path.rpartition("/")[2][:20]
            raise NotFound(f"there is no job {number}: it has ended, or never was")
        return self._objects[path]

    def is_of(self, path: str, uid: int) -> bool:
        """Tell whether there is a job of ``uid`` at ``path``."""
        return path in self._objects and self._objects[path].uid == uid

    @staticmethod
    def may_be_at(path: str) -> bool:
        """Tell whether ``path`` has the form of a job's path."""
        return path.rpartition("/")[0] == JOB_PATH

    def listing(self) -> Body:
        """Return all jobs as the rows of ListJobs; any thread may call this."""
        return [
            [one.id, str(one.job.operation), one.job.key, one.uid, one.path]
            for one in list(self._objects.values())
        ]

    def ids(self) -> list[str]:
        """Return the last parts of the paths of all objects."""
        return [str(one.id) for one in self._objects.values()]

    def show(self, job: Job, uid: int, work: asyncio.Task[Body]) -> JobObject:
        """Show a job as an object until ``work`` is done."""
        new = JobObject(next(self._ids), job, uid, asyncio.get_running_loop().create_future())
        self._objects[new.path] = new
        self._emit(OBJECT_PATH, MANAGER, "JobNew", [new.id, new.path])
        reporting = asyncio.get_running_loop().create_task(self._report(new))

        def end(work: asyncio.Task[Body]) -> None:
            reporting.cancel()
            del self._objects[new.path]
            outcome = _outcome(work.exception())
            self._emit(OBJECT_PATH, MANAGER, "JobRemoved", [new.id, new.path, job.key, *outcome])
            new.ended.set_result(None)

        work.add_done_callback(end)
        return new

    async def _report(self, job: JobObject) -> None:
        told = job.progress()
        while True:
            await asyncio.sleep(PERIOD)
            now = job.progress()
            changed = {name: value for name, value in now.items() if value != told[name]}
            if changed:
                self._emit(job.path, PROPERTIES, "PropertiesChanged", [JOB, changed, []])
            told = now


def _outcome(error: BaseException | None) -> tuple[str, str, str]:
    """Return the result of a job, and the name and message of its error."""
    if error is None:
        return "done", "", ""
    name, text = described(error)
    return ("cancelled" if isinstance(error, Cancelled) else "failed"), name, text
