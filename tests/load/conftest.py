"""The seed of the long runs."""

from __future__ import annotations

import pytest


@pytest.fixture
def run_seed(pytestconfig: pytest.Config) -> int:
    """Return the seed of the whole run, which ``--randomly-seed`` repeats; 0 in a fixed order."""
    return int(pytestconfig.getoption("randomly_seed", 0))
