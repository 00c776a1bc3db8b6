"""Wait for a state that no event announces."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_TIMEOUT = 120
"""Seconds after which a wait fails."""


def wait_until(condition: Callable[[], bool], found: Callable[[], object] = lambda: "") -> None:
    """Wait until ``condition`` holds; after a timeout, fail with the result of ``found``."""
    deadline = time.monotonic() + WAIT_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"the state that was waited for did not come: {found()}"
        time.sleep(0.01)


def wait_until_equal(read: Callable[[], object], expected: object) -> None:
    """Wait until ``read`` returns ``expected``; after a timeout, fail with its last result."""
    deadline = time.monotonic() + WAIT_TIMEOUT
    while (last := read()) != expected:
        assert time.monotonic() < deadline, f"{last!r} has not become {expected!r}"
        time.sleep(0.01)
