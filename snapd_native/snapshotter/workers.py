"""The worker processes that copy, measure and hash the trees of snapshots."""

from __future__ import annotations

from snapd_native import trees
from snapd_native.model import Usage
from snapd_native.snapshotter.state import StateDirectory


class Workers:
    """Two crews for the trees of one state directory. A report may raise to end the work."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._crew = trees.Crew()
        self._idle_crew = trees.Crew(idle=True)

    def close(self) -> None:
        """End all workers; no work may be running."""
        self._crew.close()
        self._idle_crew.close()

    def copy(self, id_: int, parent: int, report: trees.Report) -> None:
        """Copy the tree of the parent to a new snapshot."""
        name = self._state.create(id_)
        with (
            self._state.open(str(parent)) as source,
            self._state.open(name, writable=True) as target,
        ):
            self._crew.clone(source, target, report, reflink=self._state.reflink)
        self._state.complete(id_)

    def measure(self, id_: int, report: trees.Report, *, idle: bool = False) -> Usage:
        """Measure the usage of a tree; with ``idle`` at idle priority."""
        crew = self._idle_crew if idle else self._crew
        with self._state.open(str(id_)) as tree:
            return crew.measure(tree, report)

    def seal(self, id_: int, report: trees.Report) -> Usage:
        """Seal a tree, the root first, and return its usage; see `trees.Crew.seal`."""
        with self._state.open(str(id_), writable=True) as tree:
            trees.seal(tree)
            return self._crew.seal(tree, report)

    def seal_again(self, id_: int, report: trees.Report) -> None:
        """Seal a tree that nobody changes, the root last: a root with the flag means all of it."""
        with self._state.open(str(id_), writable=True) as tree:
            self._crew.seal(tree, report)
            trees.seal(tree)

    def unseal(self, id_: int, report: trees.Report) -> None:
        """Undo `seal`, the root last."""
        with self._state.open(str(id_), writable=True) as tree:
            self._crew.unseal(tree, report)
            trees.unseal(tree)

    def digest(self, id_: int, report: trees.Report, *, from_disk: bool = False) -> str:
        """Hash a tree; with ``from_disk`` as it is on the disk, at idle priority."""
        crew = self._idle_crew if from_disk else self._crew
        with self._state.open(str(id_)) as tree:
            return crew.digest(tree, report, from_disk=from_disk)
