"""Delete directories that no snapshot owns any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial

from snapd_native import trees
from snapd_native.jobs import Job, Operation
from snapd_native.metastore import Metastore, Record
from snapd_native.model import quote
from snapd_native.snapshotter.background import Background
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
"""Seconds after which a waiting call checks again whether it is cancelled."""


class Reaper:
    """Deletes directories one after the other, in a thread of its own."""

    def __init__(self, state: StateDirectory, store: Metastore, stopping: threading.Event) -> None:
        """Delete leftovers of crashes and removals. Deletions end when ``stopping`` is set."""
        self._state = state
        self._store = store
        self._job = Job()
        self._job.begin(Operation.CLEANUP, "", stopping=stopping)
        self._background = Background(
            "reaper", "what was removed is not all deleted, Cleanup tries again"
        )
        try:
            self._restore_set_aside()
            self._sweep(self._job.report)
        except OSError as error:
            log.warning("something orphaned could not be deleted yet: %s", error)
            self._background.submit(partial(self._sweep, self._job.report))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Finish the deletions that have begun."""
        self._background.close()

    def retire(self, record: Record) -> None:
        """Delete the directory of a removed snapshot later."""
        if record.tree_id != record.id:
            return
        try:
            garbage = self._state.retire(record.id)
        except OSError as error:
            # A full directory may have to grow for a name, and the disk be full. As no record
            # owns the directory, it can be deleted under the name that it has.
            log.debug("%s is deleted under its own name: %s", quote(record.info.name), error)
            garbage = str(record.id)
        if garbage is not None:
            self._background.submit(partial(self._delete, garbage))

    def discard(self, id_: int) -> None:
        """Delete the directory of a snapshot whose call has failed."""
        try:
            self._state.discard(id_)
        except OSError as error:
            log.warning("a snapshot that failed is left for Cleanup: %s", error)

    def finish(self, report: trees.Report) -> None:
        """Wait until nothing is left to delete.

        Raises:
            OSError: the last failure, after everything else was deleted.
        """
        self._await(self._background.submit(partial(self._sweep, report)), report)

    def catch_up(self, report: trees.Report) -> None:
        """Wait until every pending deletion was attempted."""
        self._await(self._background.submit(lambda: None), report)

    def orphans(self) -> Sequence[str]:
        """Return the directories that no snapshot and no running call owns."""
        # The order matters: a directory that is listed first, and neither reserved nor recorded
        # after that, is an orphan.
        found = self._state.listing()
        reserved = self._store.reserved()
        owned = self._store.directories()
        return [
            name
            for name, prefix, id_ in found
            if prefix == "rm-"
            or (prefix != "found-" and id_ not in reserved and (prefix or id_ not in owned))
        ]

    def _await(self, task: Future[None], report: trees.Report) -> None:
        # It may be the turn of something else first.
        while not task.done():
            wait([task], POLL_SECONDS)
            report(0, 0)
        task.result()

    def _delete(self, name: str) -> None:
        self._state.delete(name, self._job.report)
        # The removal may have used it up, and has freed space.
        self._state.ballast.take()

    def _restore_set_aside(self) -> None:
        """Give trees that were set aside back to their records, if those exist again."""
        found = self._state.listing()
        for id_ in self._store.directories().keys() - self._state.ids():
            if any(name == f"found-{id_}" for name, _, _ in found):
                self._state.undo_set_aside(id_)

    def _sweep(self, report: trees.Report) -> None:
        failure: OSError | None = None
        orphans = self.orphans()
        # A tree that is whole, but for a record, may be all that is left of a snapshot.
        kept = [name for name in orphans if name.isdigit()]
        if kept and self._store.is_whole():
            kept = []
        for name in orphans:
            try:
                if name in kept:
                    found = self._state.set_aside(int(name))
                    log.error("%s is a tree whose record the database has lost: see Check", found)
                else:
                    self._state.delete(name, report)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure
