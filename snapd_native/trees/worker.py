"""A worker process: it takes part in one job after the other.

Run as ``python -m snapd_native.trees.worker FD PID PRIORITY``: the socket to the crew, the process
of the crew, and the priority. It ends when the crew has ended, also during a job.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import ExitStack, suppress

from snapd_native.trees.clone import Cloner
from snapd_native.trees.links import Links
from snapd_native.trees.measure import Counter
from snapd_native.trees.relay import IDLE, ORDER, Channels, Operation, Page, receive, send_finding
from snapd_native.trees.seal import Sealer, Unsealer
from snapd_native.trees.share import Share

_COUNTERS = {
    Operation.MEASURE: Counter,
    Operation.SEAL: Sealer,
    Operation.UNSEAL: Unsealer,
}


def main() -> None:
    """Serve the crew until it closes the socket."""
    # Ctrl-C in a terminal is for the daemon, which stops its workers in order. With this umask,
    # files are created with their final modes, which saves a call for each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A process that opens a file while its lease is tried sends this; see F_SETLEASE in fcntl(2).
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    os.umask(0)
    if sys.argv[3] == IDLE:
        # The kernel derives the I/O class from it, here idle; see ioprio_set(2).
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # The socket is broken if the crew was killed.
    with suppress(ConnectionError), socket.socket(fileno=int(sys.argv[1])) as crew:
        while True:
            order, fds = receive(crew)
            if not order:
                return
            send_finding(crew, _serve(crew, int(sys.argv[2]), order, fds))


def _serve(crew: socket.socket, parent: int, order: bytes, fds: list[int]) -> bytes:
    """Take part in a job, and return the finding."""
    number, worker, reflink = ORDER.unpack(order)
    with ExitStack() as stack:
        for fd in fds:
            stack.callback(os.close, fd)
        page = Page(fds[0])
        stack.callback(page.close)
        sockets = [stack.enter_context(socket.socket(fileno=os.dup(fd))) for fd in fds[1:6]]
        share = Share(worker, parent, crew, page, Channels(*sockets))
        stack.callback(share.close)
        match Operation(number):
            case Operation.CLONE:
                links = Links(fds[6])
                share.perform(Cloner(share.progress, links, share, reflink=bool(reflink)))
                return b""
            case Operation.MEASURE | Operation.SEAL | Operation.UNSEAL as operation:
                counter = _COUNTERS[operation](share.progress, share)
                share.perform(counter)
                return counter.tally.pack()
            case Operation.DIGEST | Operation.VERIFY as operation:
                # It loads OpenSSL, which would take a sixth of the start of a worker that copies.
                from snapd_native.trees.digest import Digester

                from_disk = operation is Operation.VERIFY
                digester = Digester(share.progress, from_disk=from_disk)
                share.perform(digester)
                return digester.digest


if __name__ == "__main__":
    main()
