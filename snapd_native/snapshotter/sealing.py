"""Seal the trees of committed snapshots, so that nobody can change them any more.

Commit seals the root of a tree first, and unseals it last if it fails. So an active snapshot whose
tree is sealed in part has a sealed root. Repair seals the root last: a committed snapshot whose
tree is sealed in part has an unsealed root.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event

from snapd_native import trees
from snapd_native.errors import DataLoss
from snapd_native.jobs import Job, Operation
from snapd_native.metastore import Metastore
from snapd_native.model import Finding, Kind, Trouble, Usage, is_name
from snapd_native.mounts import writers
from snapd_native.snapshotter.mounter.refusals import is_written
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.snapshotter.workers import Workers

log = logging.getLogger(__name__)


class Seals:
    """Keeps the trees of committed snapshots sealed, and those of active ones unsealed."""

    def __init__(
        self, state: StateDirectory, store: Metastore, workers: Workers, stopping: Event
    ) -> None:
        """Unseal the trees whose Commit was interrupted by a crash.

        Raises:
            Unavailable: ``stopping`` is set.
        """
        self._state = state
        self._store = store
        self._workers = workers
        job = Job()
        job.begin(Operation.COMMIT, "", stopping=stopping)
        for id_ in filter(state.is_sealed, store.of_kind(Kind.ACTIVE)):
            self._undo(id_, job.report)

    @contextmanager
    def sealed(self, key: str, id_: int, report: trees.Report) -> Iterator[Usage]:
        """Seal a tree, and yield its usage. If the block raises, unseal the tree.

        Raises:
            FailedPrecondition: somebody can still write to a file of the tree.
            OSError: as `trees.Crew.seal`.
        """
        try:
            yield self._seal(key, id_, report)
        except BaseException:
            self._undo(id_)
            raise

    def findings(self) -> Sequence[Finding]:
        """Return a finding for each tree that must be sealed and is not, as after a restore."""
        what = "its tree is not immutable: call Repair"
        names = self._unsealed().values()
        return [Finding(Trouble.MODE, name if is_name(name) else "", what) for name in names]

    def repair(self, report: trees.Report) -> None:
        """Seal the trees of `findings` in which nobody has a file open for writing."""
        for id_ in self._unsealed():
            try:
                self._workers.seal_again(id_, report)
            except (OSError, DataLoss) as error:
                log.warning("the tree of snapshot %d cannot be made immutable: %s", id_, error)

    def _unsealed(self) -> Mapping[int, str]:
        """Return the ids and names of the snapshots whose trees must be sealed and are not."""
        if not self._state.seals:
            return {}
        # All snapshots are read before the active ones. One that is only in the first list is
        # committed or a view, so its tree must be sealed, unless it was removed since.
        owned = self._store.directories().keys() - self._store.of_kind(Kind.ACTIVE)
        found = [id_ for id_ in owned if self._state.is_sealed(id_) is False]
        names = self._store.directories()
        return {id_: names[id_] for id_ in found if id_ in names}

    def _seal(self, key: str, id_: int, report: trees.Report) -> Usage:
        try:
            return self._workers.seal(id_, report)
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            raise is_written(key, writers(self._state.device)) from None

    def _undo(self, id_: int, report: trees.Report = lambda *_: None) -> None:
        try:
            self._workers.unseal(id_, report)
        except (OSError, DataLoss) as error:
            # The root stays sealed, so the next start tries again.
            log.error(
                "the tree of snapshot %d is immutable in part (%s):"
                " restart the service to try again",
                id_,
                error,
            )
