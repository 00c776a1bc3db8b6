"""The measurements on one file system."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from bench.disks import Disk
from bench.peers import Copier, Keeper, Native, copy
from bench.results import Case, Results, Subject
from bench.trees import ROOTFS, Tree, scaled, shape

ENOUGH = 20.0
"""Seconds after which no further round begins."""

COMMITS = 3
VIEWS = 100
STATS = 500
LISTS = 20
"""The number of measurements of a call."""

HEADSTART = 0.05
"""Seconds until the Prepares of the other clients have begun."""

LISTED = 1000
"""Snapshots that List returns."""

_KEY = "copy"

_Peer = TypeVar("_Peer", bound=Copier)


@dataclass(frozen=True)
class Site:
    """A file system with all peers on it."""

    disk: Disk
    originals: Path
    ours: Native
    keepers: Sequence[Keeper]
    copiers: Sequence[Copier]
    results: Results
    rounds: int | None

    def measure(self, case: Case, tree: Tree, peer: Copier, call: Callable[[], object]) -> None:
        """Measure the time of one call."""
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        self.results.add(Subject(self.disk.name, case, tree.name), peer.name, taken)

    def sample_memory(self) -> None:
        """Read how much memory the services have used so far."""
        for keeper in self.keepers:
            keeper.memory.sample()


def everything(site: Site, tree: Tree) -> None:
    """Make a tree, give it to all peers, and run all measurements on it.

    The tree is not deleted afterwards, which would take long: the file system is deleted at the
    end.
    """
    original = site.originals / tree.name
    original.mkdir()
    tree.make(original, site.results.scale)
    site.results.trees[tree.name] = shape(original)
    # A reflink of data that is not written yet would write it file by file.
    site.disk.sync()
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_load, original, tree.name), site.keepers))
    _prepare(site, tree)
    if tree is ROOTFS:
        _commit(site, tree)
        _small_calls(site, tree)
        _busy(site, tree)
        _list(site, tree)
    if tree.standby:
        _standby(site, tree)
    site.disk.trim()


def _load(original: Path, name: str, keeper: Keeper) -> None:
    """Commit a copy of a tree."""
    key = f"{name} in the making"
    with keeper.another() as mine:
        copy(f"{original}/.", mine.prepare(key, ""))
        mine.commit(name, key)


def _rounds(site: Site, most: int) -> Iterator[int]:
    """Count the rounds, up to the requested number or the limit of time."""
    begin = time.monotonic()
    for number in range(site.rounds or most):
        if number and not site.rounds and time.monotonic() - begin > ENOUGH:
            return
        yield number


def _in_turn(peers: Sequence[_Peer], rounds: Iterable[int]) -> Iterator[_Peer]:
    """Iterate over the peers, and begin with another one each time."""
    for number in rounds:
        first = number % len(peers)
        yield from (*peers[first:], *peers[:first])


def _prepare(site: Site, tree: Tree) -> None:
    for peer in _in_turn(site.copiers, _rounds(site, tree.rounds)):
        site.disk.sync()
        site.measure(Case.PREPARE, tree, peer, partial(peer.prepare, _KEY, tree.name))
        if tree is ROOTFS and peer in site.keepers:
            site.disk.sync()
            site.measure(Case.REMOVE, tree, peer, partial(peer.remove, _KEY))
        else:
            peer.remove(_KEY)
        peer.settle()
        site.sample_memory()


def _standby(site: Site, tree: Tree) -> None:
    """Measure Prepare while all standby clones are ready."""
    ours = site.ours
    ours.keep_ready(tree.name, 2)
    for _ in _rounds(site, tree.standby):
        ours.await_ready(tree.name)
        site.disk.sync()
        site.measure(Case.STANDBY, tree, ours, partial(ours.prepare, _KEY, tree.name))
        ours.remove(_KEY)
        site.sample_memory()
    ours.keep_ready(tree.name, 0)
    ours.await_ready(tree.name)
    ours.settle()


def _commit(site: Site, tree: Tree) -> None:
    """Measure Commit of a copy with one new file; the rest is on the disk already."""
    for keeper in _in_turn(site.keepers, _rounds(site, COMMITS)):
        (keeper.prepare(_KEY, tree.name) / "one more file").touch()
        site.disk.sync()
        site.measure(Case.COMMIT, tree, keeper, partial(keeper.commit, "committed", _KEY))
        keeper.remove("committed")
        keeper.settle()


def _small_calls(site: Site, tree: Tree) -> None:
    site.disk.sync()
    for keeper in _in_turn(site.keepers, range(STATS)):
        site.measure(Case.STAT, tree, keeper, partial(keeper.stat, tree.name))
    for keeper in _in_turn(site.keepers, range(VIEWS)):
        site.measure(Case.VIEW_REMOVE, tree, keeper, partial(_view_and_remove, keeper))


def _view_and_remove(keeper: Keeper) -> None:
    keeper.view("view", "")
    keeper.remove("view")


def _busy(site: Site, tree: Tree) -> None:
    """Measure calls while two other clients wait for their Prepares."""
    keys = (f"busy {number}" for number in count())
    for keeper in site.keepers:
        for case, call in (
            (Case.BUSY_STAT, partial(keeper.stat, tree.name)),
            (Case.BUSY_VIEW_REMOVE, partial(_view_and_remove, keeper)),
        ):
            site.disk.sync()
            busy = [next(keys), next(keys)]
            with ThreadPoolExecutor(len(busy)) as pool:
                others = [pool.submit(_prepare_alone, keeper, key, tree.name) for key in busy]
                time.sleep(HEADSTART)
                site.measure(case, tree, keeper, call)
                while not all(other.done() for other in others):
                    site.measure(case, tree, keeper, call)
            for other, key in zip(others, busy, strict=True):
                other.result()
                keeper.remove(key)
            keeper.settle()
            site.sample_memory()


def _prepare_alone(keeper: Keeper, key: str, parent: str) -> None:
    with keeper.another() as other:
        other.prepare(key, parent)


def _list(site: Site, tree: Tree) -> None:
    """Measure List with the same number of snapshots, most of them views of an empty one."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_fill, scaled(LISTED, site.results.scale)), site.keepers))
    for keeper in _in_turn(site.keepers, range(LISTS)):
        site.measure(Case.LIST, tree, keeper, keeper.list)


def _fill(snapshots: int, keeper: Keeper) -> None:
    with keeper.another() as mine:
        mine.prepare(_KEY, "")
        mine.commit("empty", _KEY)
        for number in range(snapshots - mine.list()):
            mine.view(f"view {number}", "empty")
