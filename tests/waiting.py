"""Waiting for what tells nobody that it has happened."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT = 60
"""Seconds after which what was waited for is taken to never happen."""


def eventually(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; fail if that takes too long."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.01)


def stays(condition: Callable[[], bool], seconds: float) -> None:
    """Fail if ``condition`` does not hold all the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), "what was to stay did not"
        time.sleep(0.01)
