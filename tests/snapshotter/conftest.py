"""Fixtures of all tests in this directory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _workers(kept_workers: None) -> None:
    """Start few worker processes: see `tests.support.kept_workers`."""
