"""Measure calls on the metastore with few and with many snapshots.

Each call is measured by turns on a small and on a large metastore, so that other load of the
machine disturbs both equally. The results are the medians and their ratio.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from snapd_native.snapshotter import Snapshotter

SIZES = (100, 100_000)
"""Snapshots in the two metastores."""

CHAIN = 10
"""The approximate number of children of a committed snapshot."""

PAGE = 100
"""Snapshots in a page of List."""

HALF_PAGE = 40
"""Snapshots in a page that begins in the middle; the small metastore has as many there."""


@dataclass
class Subject:
    """An engine with ``size`` snapshots, and calls on it."""

    engine: Snapshotter
    size: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    numbers: Iterator[int] = field(default_factory=count)
    spare: list[str] = field(default_factory=list)

    def stat(self) -> None:
        """Stat any snapshot."""
        self.engine.stat(self._any())

    def first_page(self) -> None:
        """List the first page."""
        assert len(self.engine.list(limit=PAGE)) == min(PAGE, self.size)

    def middle_page(self) -> None:
        """List a page from the middle on."""
        found = self.engine.list(after=_name(self.size // 2), limit=HALF_PAGE)
        assert len(found) == HALF_PAGE

    def children(self) -> None:
        """List the children of any parent."""
        parent = _name(self.chance.randrange(self.size // CHAIN) * CHAIN)
        assert self.engine.list([f'parent=="{parent}"'], limit=PAGE)

    def prepare(self) -> None:
        """Prepare an empty active snapshot."""
        key = f"prepared {next(self.numbers)}"
        self.engine.prepare(key)
        self.spare.append(key)

    def view(self) -> None:
        """View a committed snapshot."""
        key = f"viewed {next(self.numbers)}"
        self.engine.view(key, _name(0))
        self.spare.append(key)

    def remove(self) -> None:
        """Remove the oldest snapshot of Prepare or View."""
        self.engine.remove(self.spare.pop(0))

    def _any(self) -> str:
        return _name(self.chance.randrange(self.size))


CALLS: Mapping[str, tuple[Callable[[Subject], None], int]] = {
    "Stat": (Subject.stat, 2000),
    f"List, first {PAGE}": (Subject.first_page, 300),
    f"List, {HALF_PAGE} in the middle": (Subject.middle_page, 300),
    "List, parent==x": (Subject.children, 1000),
    "Prepare, empty": (Subject.prepare, 300),
    "View": (Subject.view, 300),
    "Remove": (Subject.remove, 600),
}
"""The calls that are measured, and how often; Remove takes the snapshots of Prepare and View."""


def _name(number: int) -> str:
    return f"sha256:{number:08d}/layer"


@contextmanager
def subject(directory: Path, size: int) -> Iterator[Subject]:
    """Open an engine on a new state directory with ``size`` snapshots in its metastore.

    One of `CHAIN` is committed; the others are views of it, which own no directory.
    """
    state = directory / str(size)
    with closing(Snapshotter(state, lambda _: None)):
        pass
    labels = json.dumps({"containerd.io/snapshot.ref": "x" * 64, "purpose": "measured"})
    with closing(sqlite3.connect(state / "metadata.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        for number in range(size):
            top = number % CHAIN == 0
            row = (number + 1, _name(number), "committed" if top else "view")
            parent = None if top else number // CHAIN * CHAIN + 1
            usage = (4096, 1) if top else (None, None)
            db.execute(
                "INSERT INTO snapshots"
                " (id, name, kind, parent, created, updated, labels, size, inodes)"
                " VALUES (?, ?, ?, ?, 1, 1, ?, ?, ?)",
                (*row, parent, labels, *usage),
            )
        db.execute("COMMIT")
    for number in range(0, size, CHAIN):
        (state / "snapshots" / str(number + 1)).mkdir()
    with closing(Snapshotter(state, lambda _: None)) as engine:
        yield Subject(engine, size)


def measured(subjects: list[Subject]) -> dict[str, list[float]]:
    """Return the median seconds of each call on each subject."""
    medians = {}
    for name, (call, times) in CALLS.items():
        taken: list[list[float]] = [[] for _ in subjects]
        for _ in range(times):
            for turn, each in enumerate(subjects):
                start = time.perf_counter()
                call(each)
                taken[turn].append(time.perf_counter() - start)
        for each in subjects:
            each.engine.upkeep.cleanup()
        medians[name] = [median(some) for some in taken]
    return medians


def machine(engine: Snapshotter) -> str:
    """Describe the machine of the measurements."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.machine())
    return (
        f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, {engine.filesystem_type},"
        f" Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


@click.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/var/tmp"),  # noqa: S108 - on disk, unlike /tmp
    show_default=True,
    help="Where the state directories are made.",
)
@click.option(
    "--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write a file, too."
)
def main(directory: Path, output: Path | None) -> None:
    """Measure the metastore with few and with many snapshots."""
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench", dir=directory))
        subjects = [stack.enter_context(subject(Path(place), size)) for size in SIZES]
        where = machine(subjects[0].engine)
        medians = measured(subjects)
    table = Table(title="Medians of the metastore's calls", caption=where)
    table.add_column("call")
    for size in SIZES:
        table.add_column(f"{size:,} snapshots", justify="right")
    table.add_column("ratio", justify="right")
    for name, (few, many) in medians.items():
        table.add_row(name, f"{few * 1e6:.0f} µs", f"{many * 1e6:.0f} µs", f"{many / few:.2f}")
    Console().print(table)
    if output is not None:
        found = {"machine": where, "sizes": SIZES, "median_seconds": medians}
        output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
