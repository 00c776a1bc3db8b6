"""The protocol between a crew and its workers.

A job has a page of shared memory and three sockets. The page contains for each worker whether it is
idle, and its progress; every byte has one writer. Tasks are open directories. One socket passes
whole directories to an idle worker, another passes some names of a directory. The third passes
reports of all workers to the crew in one order. A task is announced before it is offered, so that
the crew does not believe too early that all tasks are done.
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
"""Workers in a job at most; more would only wait for each other in the file system."""

NORMAL, IDLE = "normal", "idle"
"""The priority of a worker."""

_PROGRESS = slice(64, 64 + MAX_WORKERS * 16)
_MOST_FDS = 8
_LONGEST = 1 << 17

ORDER = struct.Struct("=BBB")
"""The first message of a job: operation, number of the worker, whether to share data."""

REPORT = struct.Struct("=cI")
"""A report on a task: one of the following, and the errno of a failure."""
ANNOUNCED = b"+"
"""A task is about to be offered."""
DONE = b"-"
"""A task is done."""
FAILED = b"!"
"""A task has failed, and the job with it."""


class Operation(IntEnum):
    """The work that a job does with its tasks."""

    CLONE = 1
    """Copy the first directory to the second."""
    MEASURE = 2
    """Measure the directory."""
    DIGEST = 3
    """Hash the directory."""
    VERIFY = 4
    """Hash the directory, and read files from the disk."""
    SEAL = 5
    """Seal the directory, and measure it."""
    UNSEAL = 6
    """Undo that."""


class Channels(NamedTuple):
    """The workers' ends of the sockets of a job."""

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
        # Two numbers for each worker. Each is read and written atomically.
        self._progress = memoryview(self._memory)[_PROGRESS].cast("Q")

    @staticmethod
    def create() -> int:
        """Return the fd of a new page of zeros."""
        fd = os.memfd_create("snapd-native-job", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    def close(self) -> None:
        """Unmap the page."""
        self._progress.release()
        self._memory.close()

    def set_idle(self, worker: int, idle: bool) -> None:
        """Set whether a worker waits for a task."""
        self._memory[worker] = idle

    def somebody_idle(self) -> bool:
        """Tell whether a worker waits for a task."""
        return self._memory.find(b"\1", 0, MAX_WORKERS) >= 0

    def report(self, worker: int, inodes: int, size: int) -> None:
        """Set how many inodes and bytes a worker has done."""
        self._progress[2 * worker] = inodes
        self._progress[2 * worker + 1] = size

    def progress(self) -> tuple[int, int]:
        """Return how many inodes and bytes all workers have done."""
        return sum(self._progress[::2]), sum(self._progress[1::2])


def receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return the next message with its fds; empty if the other side has closed the socket."""
    # socket.recv_fds of Python 3.11 ignores its flags.
    fds = array.array("i")
    room = socket.CMSG_SPACE(_MOST_FDS * fds.itemsize)
    payload, ancillary, _, _ = channel.recvmsg(_LONGEST, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return payload, list(fds)


def send_finding(channel: socket.socket, finding: bytes) -> None:
    """Send the finding of a worker, of any length."""
    memory = os.memfd_create("snapd-native-finding", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(finding)
        socket.send_fds(channel, [b"f"], [memory])
    finally:
        os.close(memory)


def receive_finding(channel: socket.socket) -> bytes:
    """Return the finding of a worker.

    Raises:
        ChildProcessError: the worker has ended.
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
