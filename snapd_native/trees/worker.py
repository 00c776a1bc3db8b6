"""A worker process: does its share of one job after the other.

Run as ``python -m snapd_native.trees.worker FD PID``: its socket to the crew, and the process that
the crew is in. It ends when that has ended, also in the middle of a job.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress

from snapd_native.trees.clone import fill
from snapd_native.trees.copy import Copier
from snapd_native.trees.links import Links
from snapd_native.trees.measure import Tally, count
from snapd_native.trees.relay import ORDER, Operation, Page, Share, receive, send_finding


def main() -> None:
    """Serve the crew until it closes the socket."""
    # Ctrl-C in a terminal is for the daemon, which stops its workers in order. And files are made
    # with their final modes, which is one call less for each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0)
    # A crew that was killed breaks the pipe.
    with suppress(ConnectionError), socket.socket(fileno=int(sys.argv[1])) as crew:
        while True:
            order, fds = receive(crew)
            if not order:
                return
            send_finding(crew, _serve(crew, int(sys.argv[2]), order, fds))


def _serve(crew: socket.socket, parent: int, order: bytes, fds: list[int]) -> bytes:
    """Do a job, and return what was found out."""
    number, worker, reflink = ORDER.unpack(order)
    page_fd, offers_fd, tasks_fd, reports_fd, *table = fds
    page = Page(page_fd)
    os.close(page_fd)
    with (
        socket.socket(fileno=offers_fd) as offers,
        socket.socket(fileno=tasks_fd) as tasks,
        socket.socket(fileno=reports_fd) as reports,
    ):
        share = Share(worker, page, parent, crew, offers, tasks, reports)
        try:
            match Operation(number):
                case Operation.CLONE:
                    _clone(share, table[0], reflink=bool(reflink))
                case Operation.MEASURE:
                    return _measure(share).pack()
            return b""
        finally:
            page.close()
            for fd in table:
                os.close(fd)


def _clone(share: Share, table: int, *, reflink: bool) -> None:
    copier = Copier(share.step, reflink=reflink)
    links = Links(table)

    def perform(task: list[int]) -> None:
        source, target = task
        fill(source, target, copier, links, share.offer)
        copier.finish_directory(source, target, os.fstat(source))

    share.work(perform)


def _measure(share: Share) -> Tally:
    tally = Tally()
    share.work(lambda task: count(task[0], tally, share.step, share.offer))
    return tally


if __name__ == "__main__":
    main()
