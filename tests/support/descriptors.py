"""Count the open descriptors of a process by what they refer to."""

from __future__ import annotations

import gc
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from snapd_native.trees.relay import MAX_WORKERS
from tests.support.waiting import wait_until

_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_PEER, _UNIX_DIAG_PEER = 0x4, 2
_HEADER = struct.Struct("=IHHII")
"""``struct nlmsghdr``."""
_REQUEST = struct.Struct("=BBHIIIII")
"""``struct unix_diag_req``."""
_FOUND = struct.Struct("=BBBBIII")
"""``struct unix_diag_msg``."""
_ATTRIBUTE = struct.Struct("=HH")
"""``struct nlattr``."""


class Process(Protocol):
    """A running process."""

    @property
    def pid(self) -> int:
        """Its pid."""


class _ThisProcess:
    @property
    def pid(self) -> int:
        return os.getpid()


THIS_PROCESS: Process = _ThisProcess()
"""The process of the test."""


def worker_pids(daemon: Process, *priorities: str) -> list[int]:
    """Return the pids of a daemon's workers: all, or those with one of ``priorities``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            _, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            command = (process / "cmdline").read_bytes().split(b"\0")
            if int(parent) == daemon.pid and b"snapd_native.trees.worker" in command:
                # The last argument ends with a zero, too.
                *_, priority, _ = command
                if not priorities or priority.decode() in priorities:
                    found.append(int(process.name))
    return sorted(found)


def max_workers(daemon: Process) -> int:
    """Return the number of workers that a daemon keeps for copies and measurements."""
    return min(len(os.sched_getaffinity(daemon.pid)), MAX_WORKERS)


def descriptors(process: Process) -> Counter[str]:
    """Count the descriptors of a process by what they are: a path, a socket, an epoll instance.

    Numbers in names are ignored. Two kinds are left out, because their number changes often: those
    of the database, which each thread has, and sockets to workers of the process.
    """
    opened = descriptor_targets(process.pid)
    peers = _peers()
    held = {link for pid in worker_pids(process) for link in descriptor_targets(pid)}
    return Counter(
        re.sub("[0-9]+", "", link)
        for link in opened
        if "metadata.db" not in link and f"socket:[{peers.get(_inode(link))}]" not in held
    )


def descriptor_targets(pid: int) -> list[str]:
    """Return the target of each descriptor of a process, as in proc(5); empty if it has ended."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(os.readlink(entry))
    return found


def _inode(link: str) -> int:
    """Return the inode of a socket; 0 if it is not a socket."""
    return int(link[8:-1]) if link.startswith("socket:[") else 0


def _peers() -> dict[int, int]:
    """Return the inodes of all Unix sockets and of their peers; see sock_diag(7)."""
    found: dict[int, int] = {}
    every = 0xFFFFFFFF
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, every, 0, _UDIAG_SHOW_PEER, every, every)
    length = _HEADER.size + len(request)
    header = _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        kernel.send(header + request)
        while True:
            data = kernel.recv(1 << 16)
            while data:
                length, what, *_ = _HEADER.unpack_from(data)
                if what == _NLMSG_DONE:
                    return found
                assert what != _NLMSG_ERROR
                inode, peer = _parsed(data[_HEADER.size : length])
                found[inode] = peer
                data = data[_aligned(length) :]


def _parsed(message: bytes) -> tuple[int, int]:
    """Return the inode of a socket and of its peer; 0 if it has none."""
    *_, inode, _, _ = _FOUND.unpack_from(message)
    peer, offset = 0, _FOUND.size
    while offset < len(message):
        length, what = _ATTRIBUTE.unpack_from(message, offset)
        if what == _UNIX_DIAG_PEER:
            (peer,) = struct.unpack_from("=I", message, offset + _ATTRIBUTE.size)
        offset += _aligned(length)
    return inode, peer


def _aligned(length: int) -> int:
    return length + -length % 4


def wait_until_idle(process: Process) -> None:
    """Wait until the workers of a process have no job."""
    wait_until(
        lambda: (
            not any("memfd:snapd-native-job" in link for link in descriptor_targets(process.pid))
        )
    )


def wait_until_closed(process: Process, before: Counter[str]) -> None:
    """Wait until a process has no other descriptors than ``before``."""
    wait_until(lambda: descriptors(process) <= before, lambda: descriptors(process) - before)


@contextmanager
def nothing_left_open(process: Process) -> Iterator[None]:
    """Check that a process soon has no other descriptors than before the block.

    The process can close descriptors a moment after its last reply.
    """
    wait_until_idle(process)
    # Unreachable files of this process are closed first.
    gc.collect()
    before = descriptors(process)
    yield
    wait_until_closed(process, before)
