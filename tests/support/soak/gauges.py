"""Measure the resources of a daemon and its workers, and check that they do not grow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapd_native.bus.lanes import Lane
from tests.support.descriptors import descriptors, links, workers
from tests.support.service import Service

KIB = 1 << 10
MIB = 1 << 20

SLACK = 2 * MIB
"""By how much the daemon's memory may differ between two rests without any leak.

SQLite keeps pages of the database for each connection, and what is freed in the middle of a heap is
given back by the page. That holds with one heap and no caches of threads, as in the unit: otherwise
glibc keeps 231 KiB for each thread (``tcache`` in malloc/malloc.c), which it takes hours to reach.
"""

THREAD = 192 * KIB
"""What each thread that was not there before may take, with its connection to the database."""

WORKER_SLACK = 4 * MIB
"""By how much the largest worker, which may be another one by then, may differ.

A worker that is alone has all of what workers share.
"""

WAL = 8 * MIB
"""What the write-ahead log may take at any time, though readers are always there.

SQLite checkpoints it at 4 MiB and begins it anew when no reader needs its end. One that is never
begun anew grows by some 10 KiB a change, and is over this after a thousand of them.
"""

DATABASE = 8 * MIB
"""Size that the database may have; hundreds of snapshots need less than one mebibyte."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """The resources at one moment; sizes in bytes."""

    memory: int
    """The daemon's, with its part of what it shares (Pss)."""
    resident: int
    descriptors: int
    """The daemon's, without those of the database and the sockets of the workers."""
    readers: int
    """The daemon's descriptors of the database."""
    threads: int
    workers: int
    worker_memory: int
    """That of the largest worker (Pss); at a rest each of them has done work."""
    database: int
    wal: int
    disk: int
    """The used space of the file system."""

    @classmethod
    def read(cls, service: Service) -> Gauge:
        process = Path("/proc") / str(service.pid)
        memories = [_memory(Path(f"/proc/{pid}")) for pid in workers(service)]
        return cls(
            memory=_memory(process),
            resident=_field(process / "status", "VmRSS"),
            descriptors=descriptors(service).total(),
            readers=sum("metadata.db" in link for link in links(service.pid)),
            threads=len(list((process / "task").iterdir())),
            workers=len(memories),
            worker_memory=max(memories, default=0),
            database=_size(service.state / "metadata.db"),
            wal=_size(service.state / "metadata.db-wal"),
            disk=shutil.disk_usage(service.state).used,
        )


def growth(rests: Sequence[Gauge], rounds: int) -> list[str]:
    """Tell what has grown from the first of several rests to the last.

    Memory is judged over the last ``rounds``: it also grows in a warm-up, which is the longer the
    fewer calls a slow machine makes in a round, but a leak grows in any rounds.

    There is a worker at each rest: had the first rest none, the last would have no bound. At rest
    nothing is taken for calls that are under way. So what is more at the last rest than at the
    first, before which there was enough work for every thread, worker and connection to be
    made, was left behind by one of the calls between. Of descriptors that is exact: where one call
    in ten thousand leaves one, a soak of minutes shows it. What is forgotten takes about 1 KiB with
    what it refers to: one call in thirty that leaves it is over the bound in half an hour. Threads
    and workers have bounds of their own, which one for a hundred calls is far over by then.
    """
    first, before, last = rests[0], rests[-1 - rounds], rests[-1]
    assert before.worker_memory
    threads = max(last.threads - before.threads, 0)
    bounds = {
        "the daemon's memory": (last.memory, before.memory + SLACK + THREAD * threads),
        "the largest worker's memory": (last.worker_memory, before.worker_memory + WORKER_SLACK),
        "descriptors": (last.descriptors, first.descriptors),
        "descriptors of the database": (last.readers, 3 * last.threads),
        "threads": (last.threads, most_threads()),
        "workers": (last.workers, most_workers()),
    }
    return [
        f"{what}: {found} at the last rest, at most {bound} by what there was before ({before})"
        for what, (found, bound) in bounds.items()
        if found > bound
    ]


def too_large(gauges: Sequence[Gauge]) -> list[str]:
    """Tell what of the database was too large at some time, be it under load."""
    most = {
        "metadata.db": (max(gauge.database for gauge in gauges), DATABASE),
        "metadata.db-wal": (max(gauge.wal for gauge in gauges), WAL),
    }
    return [f"{file} had {size} bytes" for file, (size, bound) in most.items() if size > bound]


def table(rests: Sequence[Gauge], rounds: Sequence[Sequence[Gauge]]) -> str:
    """Return a table of what was taken at each rest, and the most under load before it."""
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
    """Return how many threads the daemon has when all lanes were full once.

    Beside them: the event loop, the default executor's one, the reaper, the syncer, the releaser,
    and the one that makes standby clones.
    """
    return sum(lane.threads for lane in Lane) + 6


def most_workers() -> int:
    """Return how many workers wait for work: two crews of a processor each, and the standbys'."""
    return 2 * len(os.sched_getaffinity(0)) + 1


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}"


def _memory(process: Path) -> int:
    return _field(process / "smaps_rollup", "Pss")


def _field(path: Path, name: str) -> int:
    # A worker may have ended meanwhile.
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
