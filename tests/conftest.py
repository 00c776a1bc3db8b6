"""Fixtures for all tests, a module for each kind of thing."""

from __future__ import annotations

import signal

pytest_plugins = [
    "tests.engines",
    "tests.filesystems",
    "tests.mounting",
    "tests.plots",
    "tests.service",
    "tests.watching",
    "tests.bus_mounting",
    "tests.daemons",
]

# A job in the background of a script ignores it, and so would everything that is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Whatever ends a run early, what it has mounted and started is cleaned up.
signal.signal(signal.SIGTERM, signal.default_int_handler)
