"""Clones and measures in this process alone, by what every worker of a crew does."""

from __future__ import annotations

import os
from collections.abc import Callable

from snapd_native.model import Usage
from snapd_native.trees.clone import cloning, fill
from snapd_native.trees.copy import Copier
from snapd_native.trees.links import Links
from snapd_native.trees.measure import Tally, count


def clone(source: int, target: int, step: Callable[[int], None], *, reflink: bool) -> None:
    """Do what `Crew.clone` does; ``step`` is called for every entry."""
    with cloning(source, target) as table:
        fill(source, target, Copier(step, reflink=reflink), Links(table), lambda *_: False)


def measure(root: int, step: Callable[[int], None]) -> Usage:
    """Do what `Crew.measure` does; ``step`` is called for every entry."""
    tally = Tally()
    tally.add(os.fstat(root))
    count(root, tally, step, lambda _: False)
    return tally.usage
