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
class Shown:
    """A job that has an object."""

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
        self._shown: dict[str, Shown] = {}

    def get(self, path: str) -> Shown:
        """Return the job at ``path``, for which `may_be_at` is true.

        Raises:
            NotFound: the job has ended or never existed.
        """
        if path not in self._shown:
            number = path.rpartition("/")[2][:20]
            raise NotFound(f"there is no job {number}: it has ended, or never was")
        return self._shown[path]

    def is_of(self, path: str, uid: int) -> bool:
        """Tell whether there is a job of ``uid`` at ``path``."""
        return path in self._shown and self._shown[path].uid == uid

    @staticmethod
    def may_be_at(path: str) -> bool:
        """Tell whether ``path`` has the form of a job's path."""
        return path.rpartition("/")[0] == JOB_PATH

    def listing(self) -> Body:
        """Return all jobs as the rows of ListJobs; any thread may call this."""
        return [
            [shown.id, str(shown.job.operation), shown.job.key, shown.uid, shown.path]
            for shown in list(self._shown.values())
        ]

    def ids(self) -> list[str]:
        """Return the last parts of the paths of all objects."""
        return [str(shown.id) for shown in self._shown.values()]

    def show(self, job: Job, uid: int, work: asyncio.Task[Body]) -> Shown:
        """Show a job as an object until ``work`` is done."""
        shown = Shown(next(self._ids), job, uid, asyncio.get_running_loop().create_future())
        self._shown[shown.path] = shown
        self._emit(OBJECT_PATH, MANAGER, "JobNew", [shown.id, shown.path])
        telling = asyncio.get_running_loop().create_task(self._tell(shown))

        def end(work: asyncio.Task[Body]) -> None:
            telling.cancel()
            del self._shown[shown.path]
            outcome = _outcome(work.exception())
            self._emit(
                OBJECT_PATH, MANAGER, "JobRemoved", [shown.id, shown.path, job.key, *outcome]
            )
            shown.ended.set_result(None)

        work.add_done_callback(end)
        return shown

    async def _tell(self, shown: Shown) -> None:
        told = shown.progress()
        while True:
            await asyncio.sleep(PERIOD)
            now = shown.progress()
            changed = {name: value for name, value in now.items() if value != told[name]}
            if changed:
                self._emit(shown.path, PROPERTIES, "PropertiesChanged", [JOB, changed, []])
            told = now


def _outcome(error: BaseException | None) -> tuple[str, str, str]:
    """Return the result of a job, and the name and message of its error."""
    if error is None:
        return "done", "", ""
    name, text = described(error)
    return ("cancelled" if isinstance(error, Cancelled) else "failed"), name, text
