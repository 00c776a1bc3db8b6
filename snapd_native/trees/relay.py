"""What a crew and its workers say to each other.

A job has a page of shared memory and two sockets. The page holds a flag of each worker that is
idle, and each worker's progress; every byte has one writer. Tasks, which are open directories,
travel over one socket to whoever is idle. Reports go to the crew over the other, in one order for
all workers: a task is announced before it is offered, so the crew never believes too early that all
is done.
"""

from __future__ import annotations

import array
import errno
import mmap
import os
import select
import socket
import struct
from collections.abc import Callable
from enum import IntEnum

MAX_WORKERS = 8
"""Workers in one job: more would only wait for each other in the file system."""

_WATCH = 256
"""Steps after which a worker looks whether its crew is still there."""

_PROGRESS = struct.Struct("=QQ")
_FIRST_PROGRESS = 64
_MOST_FDS = 8
_LONGEST = 64

ORDER = struct.Struct("=BBB")
"""What begins a job: operation, the worker's number in the job, whether to share data."""

REPORT = struct.Struct("=cI")
"""What a worker says of a task: one of the following, and the errno of a failure."""
ANNOUNCED = b"+"
"""A task is about to be offered."""
DONE = b"-"
"""A task is done."""
FAILED = b"!"
"""A task has failed, and the job with it."""


class Operation(IntEnum):
    """What a job does with its tasks."""

    CLONE = 1
    """Fill the second directory with a copy of the first."""
    MEASURE = 2
    """Count what is in the directory."""


class Page:
    """The shared memory of a job."""

    def __init__(self, fd: int) -> None:
        """Map the page behind ``fd``."""
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)

    @staticmethod
    def create() -> int:
        """Return the fd of a new page, all zero."""
        fd = os.memfd_create("snapd-native-job", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    def close(self) -> None:
        """Unmap the page."""
        self._memory.close()

    def set_idle(self, worker: int, idle: bool) -> None:
        """Say whether a worker waits for a task."""
        self._memory[worker] = idle

    def somebody_idle(self) -> bool:
        """Tell whether any worker waits for a task."""
        return self._memory.find(b"\1", 0, MAX_WORKERS) >= 0

    def report_progress(self, worker: int, entries: int, copied: int) -> None:
        """Say how many entries and bytes a worker has done."""
        _PROGRESS.pack_into(
            self._memory, _FIRST_PROGRESS + worker * _PROGRESS.size, entries, copied
        )

    def progress(self) -> tuple[int, int]:
        """Return how many entries and bytes all workers have done."""
        end = _FIRST_PROGRESS + MAX_WORKERS * _PROGRESS.size
        done = list(_PROGRESS.iter_unpack(self._memory[_FIRST_PROGRESS:end]))
        return sum(entries for entries, _ in done), sum(copied for _, copied in done)


class Share:
    """One worker's end of a job."""

    def __init__(
        self,
        worker: int,
        page: Page,
        parent: int,
        crew: socket.socket,
        offers: socket.socket,
        tasks: socket.socket,
        reports: socket.socket,
    ) -> None:
        self._worker = worker
        self._parent = parent
        self._crew = crew
        self._page = page
        self._offers = offers
        self._tasks = tasks
        self._reports = reports
        self._entries = 0
        self._copied = 0

    def step(self, copied: int) -> None:
        """Count one step of work; end the process if its crew was killed."""
        self._entries += 1
        self._copied += copied
        self._page.report_progress(self._worker, self._entries, self._copied)
        if self._entries % _WATCH == 0 and os.getppid() != self._parent:
            raise SystemExit

    def offer(self, *directories: int) -> bool:
        """Give a task to a worker that is idle; False if there is none."""
        if not self._page.somebody_idle():
            return False
        self._report(ANNOUNCED)
        try:
            socket.send_fds(self._offers, [b"t"], directories, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._report(DONE)
            return False
        return True

    def work(self, perform: Callable[[list[int]], None]) -> None:
        """Take tasks and perform them until there are no more, reporting each.

        The first task that fails is reported by its errno and ends the job.
        """
        while (task := self._take()) is not None:
            try:
                perform(task)
                self._report(DONE)
            except OSError as error:
                self._report(FAILED, error.errno or errno.EIO)
                return
            finally:
                for fd in task:
                    os.close(fd)

    def _report(self, what: bytes, code: int = 0) -> None:
        self._reports.send(REPORT.pack(what, code))

    def _take(self) -> list[int] | None:
        while True:
            try:
                offer, fds = receive(self._tasks, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._page.set_idle(self._worker, True)
                self._await_offer()
                self._page.set_idle(self._worker, False)
            else:
                return fds if offer else None

    def _await_offer(self) -> None:
        # The other workers hold the job's sockets too: only the crew's own tells when it has ended
        # without a word. That may have a number that select(2) does not take.
        waiting = select.poll()
        for channel in (self._tasks, self._crew):
            waiting.register(channel, select.POLLIN)
        if any(fd == self._crew.fileno() for fd, _ in waiting.poll()):
            raise SystemExit


def receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return the next message with its fds; an empty one when the other side has closed."""
    # socket.recv_fds of Python 3.11 forgets its flags.
    fds = array.array("i")
    room = socket.CMSG_SPACE(_MOST_FDS * fds.itemsize)
    payload, ancillary, _, _ = channel.recvmsg(_LONGEST, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return payload, list(fds)


def send_finding(channel: socket.socket, finding: bytes) -> None:
    """Send what a worker has found out, of any length."""
    memory = os.memfd_create("snapd-native-finding", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(finding)
        socket.send_fds(channel, [b"f"], [memory])
    finally:
        os.close(memory)


def receive_finding(channel: socket.socket) -> bytes:
    """Return what a worker has found out.

    Raises:
        ChildProcessError: it has ended instead.
    """
    try:
        payload, fds = receive(channel)
    except ConnectionError:
        payload, fds = b"", []
    if not payload:
        raise ChildProcessError(errno.ECHILD, "a worker ended in the middle of a job")
    with open(fds[0], "rb") as file:
        file.seek(0)
        return file.read()
