"""Worker processes that share the walk through one tree.

Threads would compete for the GIL and delay all other calls. Processes do not, and they spend most
of their time in system calls.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from snapd_native.model import Usage
from snapd_native.trees.clone import cloning
from snapd_native.trees.measure import Tally
from snapd_native.trees.opened import unopened
from snapd_native.trees.relay import (
    ANNOUNCED,
    DONE,
    IDLE,
    MAX_WORKERS,
    NORMAL,
    ORDER,
    REPORT,
    Channels,
    Operation,
    Page,
    receive,
    receive_finding,
)
from snapd_native.trees.walk import Report, allocated

POLL_SECONDS = 0.05
"""Seconds after which a job checks again whether it must stop."""


@dataclass(frozen=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket

    def close(self) -> None:
        self.channel.close()
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Crew:
    """Worker processes that are kept for the next job. Any number of jobs can run at once."""

    def __init__(self, hands: int | None = None, *, idle: bool = False) -> None:
        """Use ``hands`` workers for a job; the default is the number of processors.

        An ``idle`` crew works at idle priority of processor and disk.
        """
        self._priority = IDLE if idle else NORMAL
        self._hands = min(hands or len(os.sched_getaffinity(0)), MAX_WORKERS)
        self._idle: list[_Worker] = []
        self._jobs = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End all workers; no job may be running."""
        while self._idle:
            self._idle.pop().close()

    def clone(self, source: int, target: int, report: Report, *, reflink: bool) -> None:
        """Copy the tree ``source`` to the empty directory ``target``.

        See `Cloner` for what is copied. With ``reflink``, which the file system must support, the
        data is shared. The sum of all reports is what `measure` returns. After a failure ``target``
        contains a part of the tree.

        Raises:
            OSError: an error of the kernel; ECHILD if a worker was killed.
        """
        with cloning(source, target) as table:
            self._run(Operation.CLONE, [source, target], report, [table], reflink=reflink)
        report(1, allocated(os.fstat(source)))

    def measure(self, root: int, report: Report) -> Usage:
        """Add up the allocated bytes and the inodes of the tree ``root``, with the root itself.

        A file with several names counts once, as in containerd's ``fs.DiskUsage``. Shared data
        counts fully.

        Raises:
            OSError: as `clone`; ESTALE if directories are moved meanwhile.
        """
        return self._count(Operation.MEASURE, root, report)

    def seal(self, root: int, report: Report) -> Usage:
        """Seal everything below ``root``, and return the usage of the tree, as `measure` does.

        ``root`` belongs to a writable mount. After a failure a part is sealed.

        Raises:
            OSError: as `measure`; ETXTBSY if somebody can still write to a file.
        """
        return self._count(Operation.SEAL, root, report)

    def unseal(self, root: int, report: Report) -> None:
        """Undo `seal`, except for files on which a process has a lease.

        Raises:
            OSError: as `measure`; EAGAIN if there are such files.
        """
        if any(Tally.unpack(left).inodes for left in self._run(Operation.UNSEAL, [root], report)):
            raise unopened()

    def _count(self, operation: Operation, root: int, report: Report) -> Usage:
        total = Tally()
        total.add(os.fstat(root))
        for tally in self._run(operation, [root], report):
            total.merge(Tally.unpack(tally))
        return total.usage

    def digest(self, root: int, report: Report, *, from_disk: bool = False) -> str:
        """Return the SHA-256, in hexadecimal, of a canonical listing of the tree ``root``.

        `Digester` defines the listing. One worker walks the tree, and as many threads as there are
        processors hash files. With ``from_disk`` they are read past the page cache. The sum of all
        reports is what `measure` returns.

        Raises:
            OSError: as `clone`; ESTALE if directories are moved meanwhile.
        """
        operation = Operation.VERIFY if from_disk else Operation.DIGEST
        (found,) = self._run(operation, [root], report, most=1)
        return found.decode()

    def _run(
        self,
        operation: Operation,
        task: Sequence[int],
        report: Report,
        also: Sequence[int] = (),
        *,
        reflink: bool = False,
        most: int = MAX_WORKERS,
    ) -> list[bytes]:
        """Run a job that begins with ``task``; return the finding of each worker."""
        with ExitStack() as stack:
            workers = stack.enter_context(self._workers(most))
            page_fd = Page.create()
            stack.callback(os.close, page_fd)
            page = Page(page_fd)
            stack.callback(page.close)
            give_directories, directories = stack.enter_context(_pair())
            give_names, names = stack.enter_context(_pair())
            to_crew, reports = stack.enter_context(_pair())
            channels = Channels(give_directories, directories, give_names, names, to_crew)
            socket.send_fds(give_directories, [b"d"], task)
            fds = [page_fd, *(end.fileno() for end in channels), *also]
            try:
                for number, worker in enumerate(workers):
                    order = ORDER.pack(operation, number, reflink)
                    socket.send_fds(worker.channel, [order], fds)
                _watch(page, reports, workers, report)
                # Waiting workers wake up and learn that no more tasks come.
                for channel in (directories, names):
                    channel.shutdown(socket.SHUT_RDWR)
                return [receive_finding(worker.channel) for worker in workers]
            except BaseException:
                # No worker may continue a job that the caller is about to undo.
                for worker in workers:
                    worker.kill()
                raise

    @contextmanager
    def _workers(self, most: int) -> Iterator[list[_Worker]]:
        """Lend up to ``most`` workers to a job; a worker that has ended is not lent again."""
        with self._lock:
            self._jobs += 1
            # When many jobs run, one worker each keeps the processors busy.
            wanted = min(most, max(1, self._hands // self._jobs))
            workers: list[_Worker] = []
            while self._idle and len(workers) < wanted:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    workers.append(worker)
                else:
                    worker.close()
        try:
            while len(workers) < wanted:
                workers.append(_hire(self._priority))
            yield workers
        finally:
            with self._lock:
                self._jobs -= 1
                alive = [worker for worker in workers if worker.process.poll() is None]
                keep = max(0, self._hands - len(self._idle))
                self._idle += alive[:keep]
            for worker in workers:
                if worker not in alive[:keep]:
                    worker.close()


def _hire(priority: str) -> _Worker:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # -P: no code is loaded from the working directory.
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "snapd_native.trees.worker"),
                *(str(theirs.fileno()), str(os.getpid()), priority),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return _Worker(process, ours)


@contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, other


def _watch(
    page: Page,
    reports: socket.socket,
    workers: Sequence[_Worker],
    report: Report,
) -> None:
    """Return when all tasks are done.

    Raises:
        OSError: a task failed, or a worker ended.
    """
    outstanding, inodes, size = 1, 0, 0
    with selectors.DefaultSelector() as selector:
        selector.register(reports, selectors.EVENT_READ)
        for worker in workers:
            selector.register(worker.channel, selectors.EVENT_READ)
        while outstanding:
            if selector.select(POLL_SECONDS):
                # A worker reports a failure before it ends its part, so reports are read first.
                try:
                    what, code = REPORT.unpack(receive(reports, socket.MSG_DONTWAIT)[0])
                except BlockingIOError:
                    raise ChildProcessError(errno.ECHILD, os.strerror(errno.ECHILD)) from None
                if what == ANNOUNCED:
                    outstanding += 1
                elif what == DONE:
                    outstanding -= 1
                else:
                    raise OSError(code, os.strerror(code))
            inodes_now, size_now = page.progress()
            report(inodes_now - inodes, size_now - size)
            inodes, size = inodes_now, size_now
