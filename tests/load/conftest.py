"""The seed of the long runs."""

from __future__ import annotations

import pytest


@pytest.fixture
def run_seed(pytestconfig: pytest.Config) -> int:
    """Return the seed of the whole run, as in ``--randomly-seed``; 0 if the order is fixed."""
    return int(pytestconfig.getoption("randomly_seed", 0))
