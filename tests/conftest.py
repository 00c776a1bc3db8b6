"""Fixtures for all tests, a module for each kind of thing."""

from __future__ import annotations

pytest_plugins = [
    "tests.engines",
    "tests.filesystems",
    "tests.plots",
    "tests.service",
    "tests.watching",
]
