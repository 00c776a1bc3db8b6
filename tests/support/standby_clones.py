"""Helpers for standby clones."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snapd_native.model import STANDBY_LABEL
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import directories, write
from tests.support.waiting import eventually


def based(engine: Snapshotter, number: int | None) -> None:
    """Commit `base` with a file, and wait for its clones."""
    write(engine.prepare("preparing"), file="base")
    engine.commit("base", "preparing", {} if number is None else {STANDBY_LABEL: str(number)})
    await_standby(engine, number or 0)


def label(engine: Snapshotter, number: int, name: str = "base") -> None:
    engine.update(name, {STANDBY_LABEL: str(number)})


def await_standby(engine: Snapshotter, number: int, name: str = "base") -> None:
    """Wait until a snapshot has ``number`` complete clones, and no incomplete clone exists."""
    id_ = str(engine._store.get(name).id)

    def there() -> bool:
        own = [clone for clone in clones(engine) if clone.split("-")[1] == id_]
        return (
            engine.standby(name) == (number, number) and len(own) == number and not making(engine)
        )

    eventually(there)


def clones(engine: Snapshotter) -> set[str]:
    """Return the directories of complete clones."""
    return {name for name in directories(engine) if name.startswith("ready-")}


def making(engine: Snapshotter) -> set[str]:
    """Return the directories of incomplete clones."""
    return {name for name in directories(engine) if name.startswith("making-")}


def idle_worker(engine: Snapshotter) -> int:
    """Return the pid of the worker that makes clones.

    A clone must have been made before, and none may be in the making.
    """
    (worker,) = engine._standby._crew._idle
    return worker.process.pid


@contextmanager
def frozen(engine: Snapshotter) -> Iterator[None]:
    """Stop the worker that makes clones, so that no clone is completed in the block."""
    pid = idle_worker(engine)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        # The service kills the worker if the clone is not wanted any more.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
