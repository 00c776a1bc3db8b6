"""Decide which tests run in parallel, which run alone, and which only `make test-all` runs.

Tests run in several processes at a time. Each process has its own bus, file systems and run
directory. A test needs a marker where that is not enough:

- ``alone``: no other test may run on the machine at the same time. The test uses something that
  exists only once, such as the directory ``/mnt``, or other tests would disturb its measurements.
- ``long``: the test takes many seconds by its nature. ``make test`` leaves it out, as ``pytest``
  by itself does; ``make test-all`` runs it, and so does ``pytest -m long``.
- ``long_on_xfs``: the test depends little on the file system. On xfs it is ``long``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import PROJECT

_QUEUE_LOCK = PROJECT / "tests"
_RUN_LOCK = PROJECT / "tests" / "support"
"""Directories whose locks (flock(2)) the processes of a run share; nothing is written to them."""


def needs_program(program: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test in ``tests/unit`` where a program is not installed.

    `make test` installs all programs, so it skips nothing.
    """
    reason = f"needs {program}: make test installs it"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with `long_on_xfs` as long where they run on xfs, before pytest selects tests."""
    for item in items:
        on = getattr(item, "callspec", None)
        if item.get_closest_marker("long_on_xfs") and on and on.params.get("filesystem") == "xfs":
            item.add_marker(pytest.mark.long)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait for the locks, then run a test. The wait does not count against its time limit."""
    with _hold_locks(alone=item.get_closest_marker("alone") is not None):
        yield


@contextmanager
def _hold_locks(*, alone: bool) -> Iterator[None]:
    queue, run = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (_QUEUE_LOCK, _RUN_LOCK))
    try:
        # A test that waits to be alone holds this lock, so that no other test begins.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(run, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
    finally:
        os.close(queue)
        os.close(run)
