"""Clone, measure and seal in this process, with the code of a worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pytest

from snapd_native import trees
from snapd_native.model import Usage
from snapd_native.trees.clone import Cloner, cloning
from snapd_native.trees.links import Links
from snapd_native.trees.measure import Counter
from snapd_native.trees.opened import unopened
from snapd_native.trees.seal import Sealer, Unsealer
from snapd_native.trees.walk import Report

_T = TypeVar("_T")


class NoPeers:
    """Peers that accept no work."""

    def are_idle(self) -> bool:
        return False

    def take_directory(self, *_: int) -> bool:
        return False

    def take_names(self, _: Sequence[str], *__: int) -> bool:
        return False

    def finish(self) -> None:
        pass


def clone(source: int, target: int, report: Report, *, reflink: bool) -> None:
    """Clone a tree as `Crew.clone` does; ``report`` is called for every entry."""
    with cloning(source, target) as table:
        cloner = Cloner(report, Links(table), NoPeers(), reflink=reflink)
        cloner.directory(source, target)
    report(1, os.fstat(source).st_blocks * 512)


def measure(root: int, report: Report) -> Usage:
    """Measure a tree as `Crew.measure` does; ``report`` is called for every entry."""
    return _count(Counter, root, report)


def seal(root: int, report: Report) -> Usage:
    """Seal a tree as `Crew.seal` does."""
    return _count(Sealer, root, report)


def unseal(root: int, report: Report) -> None:
    """Undo `seal`, as `Crew.unseal` does."""
    unsealer = Unsealer(report, NoPeers())
    unsealer.directory(root)
    if unsealer.tally.inodes:
        raise unopened()


def _count(kind: type[Counter], root: int, report: Report) -> Usage:
    counter = kind(report, NoPeers())
    counter.tally.add(os.fstat(root))
    counter.directory(root)
    return counter.tally.usage


def _method(function: Callable[..., _T]) -> Callable[..., _T]:
    return lambda _, *given: function(*given)


@contextmanager
def without_workers() -> Iterator[None]:
    """Let every crew clone, measure and seal in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees.Crew, "clone", lambda _, *given, **also: clone(*given, **also))
        for function in (measure, seal, unseal):
            patch.setattr(trees.Crew, function.__name__, _method(function))
        yield


@pytest.fixture
def no_workers() -> Iterator[None]:
    """Start no workers in a test whose many engines copy only a few files each."""
    with without_workers():
        yield
