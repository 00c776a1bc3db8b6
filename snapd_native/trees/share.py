"""The part of one worker in a job, and how its work is shared with the other workers."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from snapd_native.trees.relay import ANNOUNCED, DONE, FAILED, REPORT, Channels, Page, receive

_CHANGED = {
    errno.EACCES,  # a device, which cannot be opened here
    errno.EEXIST,  # a name that was listed twice
    errno.EISDIR,
    errno.ELOOP,
    errno.ENODATA,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.ESPIPE,
}
"""Errors which mean that another process has changed the tree."""


class Peers(Protocol):
    """The other workers of the same tree.

    A directory is a tuple of the fds that the work needs. A worker does itself what no peer takes.
    """

    def are_idle(self) -> bool:
        """Tell whether a peer has nothing to do."""

    def take_directory(self, *directory: int) -> bool:
        """Offer everything below a directory; return whether a peer takes it."""

    def take_names(self, names: Sequence[str], *directory: int) -> bool:
        """Offer non-directories of a directory; return whether a peer takes them."""

    def finish(self) -> None:
        """Wait until peers have done all names that they have taken."""


class Work(Protocol):
    """The work on a tree. Its methods take the arguments of the methods of `Peers`."""

    @property
    def directory(self) -> Callable[..., None]:
        """Do everything below a directory that no peer takes."""

    @property
    def names(self) -> Callable[..., None]:
        """Do entries of a directory."""


class Share:
    """The part of one worker in a job. For the worker it is also its `Peers`."""

    def __init__(
        self, worker: int, parent: int, crew: socket.socket, page: Page, channels: Channels
    ) -> None:
        """Take part as ``worker``; the crew is the process ``parent``, at the end of a socket."""
        self._worker = worker
        self._parent = parent
        self._crew = crew
        self._page = page
        self._channels = channels
        self._inodes = 0
        self._size = 0
        self._given = 0
        self._returned = os.eventfd(0, os.EFD_CLOEXEC)
        self._over = False

    def close(self) -> None:
        """Close the sockets of the job."""
        os.close(self._returned)

    def progress(self, inodes: int, size: int) -> None:
        """Report progress; end the process if the crew was killed."""
        self._inodes += inodes
        self._size += size
        self._page.report(self._worker, self._inodes, self._size)
        if os.getppid() != self._parent:
            raise SystemExit

    def are_idle(self) -> bool:
        """Tell whether a worker waits for a task."""
        return self._page.somebody_idle()

    def take_directory(self, *directory: int) -> bool:
        """Offer a directory to an idle worker; return False if there is none."""
        return self.are_idle() and self._give(self._channels.give_directories, b"d", directory)

    def take_names(self, names: Sequence[str], *directory: int) -> bool:
        """Offer entries of a directory to an idle worker; return False if that is impossible."""
        message = b"\0".join(os.fsencode(name) for name in names)
        given = self._give(self._channels.give_names, message, (*directory, self._returned))
        self._given += given
        return given

    def finish(self) -> None:
        """Wait until all offered names are done, and do names of other workers meanwhile."""
        while self._given:
            if self._returned in self._await(self._returned, self._channels.names.fileno()):
                self._given -= os.eventfd_read(self._returned)
            else:
                self._take_names()

    def perform(self, work: Work) -> None:
        """Do tasks, and report each, until the crew ends the job.

        The first failure ends the job. It is reported by its errno, or by ESTALE if the cause is a
        change of the tree.
        """
        self._work = work
        try:
            while not self._over:
                if not self._take_directory() and not self._take_names():
                    self._idle()
        except OSError as error:
            code = error.errno or errno.EIO
            self._report(FAILED, errno.ESTALE if code in _CHANGED else code)

    def _give(self, channel: socket.socket, message: bytes, fds: Sequence[int]) -> bool:
        self._report(ANNOUNCED)
        try:
            socket.send_fds(channel, [message], fds, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._report(DONE)
            return False
        return True

    def _take_directory(self) -> bool:
        with self._taken(self._channels.directories) as (message, directory):
            if message:
                self._work.directory(*directory)
        return bool(message)

    def _take_names(self) -> bool:
        with self._taken(self._channels.names) as (message, fds):
            if message:
                *directory, returned = fds
                self._work.names([os.fsdecode(name) for name in message.split(b"\0")], *directory)
                os.eventfd_write(returned, 1)
        return bool(message)

    @contextmanager
    def _taken(self, channel: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
        """Take a task, if there is one, and report it after the block."""
        try:
            message, fds = receive(channel, socket.MSG_DONTWAIT)
        except BlockingIOError:
            message, fds = b"", []
        else:
            self._over = not message
        try:
            yield message, fds
        finally:
            for fd in fds:
                os.close(fd)
        if message:
            self._report(DONE)

    def _idle(self) -> None:
        """Wait for a task, or for the end of the job."""
        self._page.set_idle(self._worker, True)
        self._await(self._channels.directories.fileno(), self._channels.names.fileno())
        self._page.set_idle(self._worker, False)

    def _await(self, *fds: int) -> list[int]:
        # The other workers hold the sockets of the job too; only the socket to the crew shows its
        # end without a word. That may have a number that select(2) does not take.
        waiting = select.poll()
        for fd in (*fds, self._crew.fileno()):
            waiting.register(fd, select.POLLIN)
        ready = [fd for fd, _ in waiting.poll()]
        if self._crew.fileno() in ready:
            raise SystemExit
        return ready

    def _report(self, what: bytes, code: int = 0) -> None:
        self._channels.reports.send(REPORT.pack(what, code))
