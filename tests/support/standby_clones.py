"""Helpers for standby clones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snapd_native.model import STANDBY_LABEL
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import directories, write_files
from tests.support.holding import stop_processes
from tests.support.waiting import wait_until


def commit_base(engine: Snapshotter, number: int | None) -> None:
    """Commit `base` with a file, and wait for its clones."""
    write_files(engine.prepare("preparing"), file="base")
    engine.commit("base", "preparing", {} if number is None else {STANDBY_LABEL: str(number)})
    wait_for_clones(engine, number or 0)


def request_clones(engine: Snapshotter, number: int, name: str = "base") -> None:
    engine.update(name, {STANDBY_LABEL: str(number)})


def wait_for_clones(engine: Snapshotter, number: int, name: str = "base") -> None:
    """Wait until a snapshot has ``number`` complete clones, and no incomplete clone exists."""
    id_ = str(engine._store.get(name).id)

    def are_complete() -> bool:
        own = [clone for clone in complete_clones(engine) if clone.split("-")[1] == id_]
        return (
            engine.standby(name) == (number, number)
            and len(own) == number
            and not incomplete_clones(engine)
        )

    wait_until(are_complete)


def complete_clones(engine: Snapshotter) -> set[str]:
    """Return the directories of complete clones."""
    return {name for name in directories(engine) if name.startswith("ready-")}


def incomplete_clones(engine: Snapshotter) -> set[str]:
    """Return the directories of incomplete clones."""
    return {name for name in directories(engine) if name.startswith("making-")}


def standby_worker_pid(engine: Snapshotter) -> int:
    """Return the pid of the worker that makes clones.

    A clone must have been made before, and no clone may be incomplete.
    """
    (worker,) = engine._standby._crew._idle
    return worker.process.pid


@contextmanager
def hold_standby_worker(engine: Snapshotter) -> Iterator[None]:
    """Stop the worker that makes clones, so that no clone is completed in the block."""
    # The service kills the worker if the clone is not wanted any more.
    with stop_processes(standby_worker_pid(engine)):
        yield
