"""Measure the resources of a daemon and its workers, and check that they do not grow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapd_native.bus.lanes import Lane
from tests.support.descriptors import descriptor_targets, descriptors, worker_pids
from tests.support.service import Service

KIB = 1 << 10
MIB = 1 << 20

MEMORY_SLACK = 2 * MIB
"""Bytes by which the daemon's memory may grow between two rests without a leak.

SQLite keeps pages of the database for each connection. glibc returns memory that is freed in the
middle of a heap only in whole pages. The bound holds with one heap and without thread caches, as in
the unit. Otherwise glibc keeps 231 KiB for each thread (``tcache`` in malloc/malloc.c), and a cache
takes hours to reach that size.
"""

THREAD_MEMORY = 192 * KIB
"""Bytes that each new thread may take, with its connection to the database."""

WORKER_SLACK = 4 * MIB
"""Bytes by which the memory of the largest worker may grow between two rests.

The largest worker may be a different process at the second rest. If only one worker is left, its
Pss includes all memory that workers share.
"""

MAX_WAL = 8 * MIB
"""Bytes that the write-ahead log may have at any time, although there are always readers.

SQLite checkpoints the log at 4 MiB, and restarts it when no reader needs its end. A log that is
never restarted grows by about 10 KiB a change. It exceeds this bound after a thousand changes.
"""

MAX_DATABASE = 8 * MIB
"""Bytes that the database may have; hundreds of snapshots need less than one mebibyte."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """The resources of a daemon and its workers at one moment; sizes in bytes."""

    memory: int
    """The daemon's memory, with its part of shared memory (Pss)."""
    resident: int
    descriptors: int
    """The daemon's descriptors, without those of the database and the sockets of the workers."""
    readers: int
    """The daemon's descriptors of the database."""
    threads: int
    workers: int
    worker_memory: int
    """The memory of the largest worker (Pss); at a rest, each worker has done work."""
    database: int
    wal: int
    disk: int
    """The used space of the file system."""

    @classmethod
    def read(cls, service: Service) -> Gauge:
        process = Path("/proc") / str(service.pid)
        memories = [_memory(Path(f"/proc/{pid}")) for pid in worker_pids(service)]
        return cls(
            memory=_memory(process),
            resident=_field(process / "status", "VmRSS"),
            descriptors=descriptors(service).total(),
            readers=sum("metadata.db" in link for link in descriptor_targets(service.pid)),
            threads=len(list((process / "task").iterdir())),
            workers=len(memories),
            worker_memory=max(memories, default=0),
            database=_size(service.state / "metadata.db"),
            wal=_size(service.state / "metadata.db-wal"),
            disk=shutil.disk_usage(service.state).used,
        )


def growth(rests: Sequence[Gauge], rounds: int) -> list[str]:
    """Return a message for each resource that has grown from the first rest to the last.

    Memory is compared with the rest ``rounds`` rounds before the last. Memory also grows in a
    warm-up. A slow machine makes fewer calls in a round, so its warm-up takes more rounds. A leak
    grows in all rounds.

    There must be a worker at that earlier rest: otherwise the bound for workers would be too low.

    At a rest, no calls run. Before the first rest, there was enough work to start every thread and
    worker, and to open every connection. So a resource that has grown since then was leaked by a
    call. Descriptors are compared exactly: a soak of minutes detects a leak of one descriptor in
    ten thousand calls. A leaked object takes about 1 KiB with the objects that it refers to: if one
    call in thirty leaks one, the bound is exceeded in half an hour. Threads and workers have bounds
    of their own: a leak of one in a hundred calls exceeds them by far in that time.
    """
    first, before, last = rests[0], rests[-1 - rounds], rests[-1]
    assert before.worker_memory
    threads = max(last.threads - before.threads, 0)
    bounds = {
        "the daemon's memory": (
            last.memory,
            before.memory + MEMORY_SLACK + THREAD_MEMORY * threads,
        ),
        "the largest worker's memory": (last.worker_memory, before.worker_memory + WORKER_SLACK),
        "descriptors": (last.descriptors, first.descriptors),
        "descriptors of the database": (last.readers, 3 * last.threads),
        "threads": (last.threads, most_threads()),
        "workers": (last.workers, most_workers()),
    }
    return [
        f"{what}: {found} at the last rest, and at most {bound} is allowed after {before}"
        for what, (found, bound) in bounds.items()
        if found > bound
    ]


def too_large(gauges: Sequence[Gauge]) -> list[str]:
    """Return a message for each file of the database that was too large at any time."""
    most = {
        "metadata.db": (max(gauge.database for gauge in gauges), MAX_DATABASE),
        "metadata.db-wal": (max(gauge.wal for gauge in gauges), MAX_WAL),
    }
    return [f"{file} had {size} bytes" for file, (size, bound) in most.items() if size > bound]


def table(rests: Sequence[Gauge], rounds: Sequence[Sequence[Gauge]]) -> str:
    """Return a table of the resources at each rest, and of their peaks under load before it."""
    lines = [
        "| at rest after round | memory (Pss), MiB | VmRSS, MiB | descriptors | of the database |"
        " threads | workers | largest worker, MiB | metadata.db, KiB | WAL, KiB |"
        " most under load: memory, MiB | descriptors | threads | workers | WAL, KiB | disk, MiB |",
        "|" + " --- |" * 16,
    ]
    for number, (rest, load) in enumerate(zip(rests, rounds, strict=True), 1):
        cells = [
            *(number, _mib(rest.memory), _mib(rest.resident), rest.descriptors, rest.readers),
            *(rest.threads, rest.workers, _mib(rest.worker_memory), rest.database // KIB),
            *(rest.wal // KIB, _mib(max(gauge.memory for gauge in load))),
            max(gauge.descriptors for gauge in load),
            max(gauge.threads for gauge in load),
            max(gauge.workers for gauge in load),
            max(gauge.wal for gauge in load) // KIB,
            max(gauge.disk for gauge in load) // MIB,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def most_threads() -> int:
    """Return the number of the daemon's threads after all lanes were full once.

    The daemon also has 6 other threads: the event loop, one of the default executor, the reaper,
    the syncer, the releaser, and the thread that makes standby clones.
    """
    return sum(lane.threads for lane in Lane) + 6


def most_workers() -> int:
    """Return the maximum number of idle workers.

    There are two crews with one worker for each processor, and one worker for standby clones.
    """
    return 2 * len(os.sched_getaffinity(0)) + 1


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}"


def _memory(process: Path) -> int:
    return _field(process / "smaps_rollup", "Pss")


def _field(path: Path, name: str) -> int:
    # A worker may have ended since it was listed.
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * KIB
    return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
