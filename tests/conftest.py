"""Fixtures for all tests, a module for each kind of thing."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from snapd_native.mounts import processes

pytest_plugins = [
    "tests.support.in_process",
    "tests.support.engine",
    "tests.support.kept_workers",
    "tests.support.file_systems",
    "tests.support.kernel_mounts",
    "tests.support.sample_trees",
    "tests.support.service",
    "tests.support.markers",
    "tests.support.job_watch",
    "tests.support.bus_mounts",
    "tests.support.daemon_process",
]

# A job in the background of a script ignores it, and so would everything that is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Mounts and processes are cleaned up even if a signal ends the run early.
signal.signal(signal.SIGTERM, signal.default_int_handler)
# A run that is interrupted lets its processes finish their tests, which then unmount everything;
# after 10 seconds, the default, pytest-xdist would kill them.
with suppress(ImportError):
    from xdist.workermanage import NodeManager

    NodeManager.EXIT_TIMEOUT = 300
# On a busy machine, an engine in a test's process would find no process in five seconds.
processes.SEARCH_SECONDS = 120.0
# Every program that a test starts would compile all its modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture
def run_seed(pytestconfig: pytest.Config) -> int:
    """Return the seed of the whole run, as in ``--randomly-seed``; 0 if the order is fixed."""
    return int(pytestconfig.getoption("randomly_seed", 0))
