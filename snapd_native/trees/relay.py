"""The protocol between a crew and its workers.

A job has a page of shared memory and three sockets. The page holds a flag of each worker that is
idle, and each worker's progress; every byte has one writer. Tasks are open directories. Whole
directories travel over one socket to a worker that is idle, some names of a directory over
another. Reports go to the crew over the third, in one order for all workers: a task is announced
before it is offered, so the crew never believes too early that all is done.
"""

from __future__ import annotations

import array
import errno
import mmap
import os
import socket
import struct
from enum import IntEnum
from typing import NamedTuple

MAX_WORKERS = 8
"""Workers in one job: more would only wait for each other in the file system."""

NORMAL, IDLE = "normal", "idle"
"""The priorities that a worker may be started with."""

_PROGRESS = slice(64, 64 + MAX_WORKERS * 16)
_MOST_FDS = 8
_LONGEST = 1 << 17

ORDER = struct.Struct("=BBB")
"""The first message of a job: operation, the worker's number in the job, whether to share data."""

REPORT = struct.Struct("=cI")
"""A worker's message about a task: one of the following, and the errno of a failure."""
ANNOUNCED = b"+"
"""A task is about to be offered."""
DONE = b"-"
"""A task is done."""
FAILED = b"!"
"""A task has failed, and the job with it."""


class Operation(IntEnum):
    """The work that a job does with its tasks."""

    CLONE = 1
    """Fill the second directory with a copy of the first."""
    MEASURE = 2
    """Count what is in the directory."""
    DIGEST = 3
    """Hash the directory and what is in it."""
    VERIFY = 4
    """The same, with the contents of files read from the disk itself."""


class Channels(NamedTuple):
    """A worker's ends of a job's sockets; every worker has the same."""

    give_directories: socket.socket
    directories: socket.socket
    give_names: socket.socket
    names: socket.socket
    reports: socket.socket


class Page:
    """The shared memory of a job."""

    def __init__(self, fd: int) -> None:
        """Map the page behind ``fd``."""
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        # Two numbers a worker. Each is read and written in one go, never by halves.
        self._progress = memoryview(self._memory)[_PROGRESS].cast("Q")

    @staticmethod
    def create() -> int:
        """Return the fd of a new page, all zero."""
        fd = os.memfd_create("snapd-native-job", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    def close(self) -> None:
        """Unmap the page."""
        self._progress.release()
        self._memory.close()

    def set_idle(self, worker: int, idle: bool) -> None:
        """Say whether a worker waits for a task."""
        self._memory[worker] = idle

    def somebody_idle(self) -> bool:
        """Tell whether any worker waits for a task."""
        return self._memory.find(b"\1", 0, MAX_WORKERS) >= 0

    def report(self, worker: int, inodes: int, size: int) -> None:
        """Say how many inodes and bytes a worker has done."""
        self._progress[2 * worker] = inodes
        self._progress[2 * worker + 1] = size

    def progress(self) -> tuple[int, int]:
        """Return how many inodes and bytes all workers have done."""
        return sum(self._progress[::2]), sum(self._progress[1::2])


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
