"""Wait for a state that is not announced by any event."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT = 120
"""Seconds after which a state is taken to never come."""


def eventually(condition: Callable[[], bool], found: Callable[[], object] = lambda: "") -> None:
    """Return when ``condition`` holds; if that takes too long, fail with what is ``found`` then."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"the state that was waited for did not come: {found()}"
        time.sleep(0.01)


def becomes(read: Callable[[], object], expected: object) -> None:
    """Return when ``read`` returns ``expected``; if that takes too long, say what it returned."""
    deadline = time.monotonic() + WAIT
    while (last := read()) != expected:
        assert time.monotonic() < deadline, f"{last!r} has not become {expected!r}"
        time.sleep(0.01)
