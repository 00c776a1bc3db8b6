"""Make the mounts of a tree read-only for Commit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from snapd_native import mounts
from snapd_native.model import quote_path
from snapd_native.mounts import Entry, Table
from snapd_native.snapshotter.mounter.reconciler import Reconciler
from snapd_native.snapshotter.mounter.refusals import not_frozen

log = logging.getLogger(__name__)


class Freezer:
    """Makes the mounts of trees read-only, and writable again when Commit fails."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self.trees: set[int] = set()
        """The trees that are being committed."""

    @contextmanager
    def frozen(self, key: str, tree: int) -> Iterator[None]:
        """Make the host's mounts of an active tree read-only; undo that if the block raises.

        Raises:
            FailedPrecondition: a file is open for writing on one of them.
        """
        with self._reconciler.lock:
            self.trees.add(tree)
        done: list[Entry] = []
        try:
            self._freeze(key, tree, done)
            yield
        except BaseException:
            for entry in done:
                with self._reconciler.turn(entry):
                    thaw(entry)
            raise
        finally:
            with self._reconciler.lock:
                self.trees.discard(tree)

    def _freeze(self, key: str, tree: int, done: list[Entry]) -> None:
        """Make the mounts read-only, and append them to ``done``."""
        tried: dict[Entry, OSError] = {}
        while writable := [
            entry for entry in self._reconciler.showing(Table.read(), tree) if not entry.read_only
        ]:
            for entry in writable:
                if entry in tried:
                    raise not_frozen(key, entry, tried[entry]) from None
                try:
                    with self._reconciler.turn(entry):
                        mounts.make_read_only(entry)
                except OSError as error:
                    # It was perhaps unmounted or moved.
                    tried[entry] = error
                else:
                    done.append(entry)


def thaw(entry: Entry) -> None:
    """Make a mount writable again, even if it was moved."""
    now = Table.read().get(entry.id)
    if now is None or now.root != entry.root or not now.read_only:
        return
    try:
        mounts.make_read_only(now, read_only=False)
    except OSError as error:
        log.warning("%s stays read-only: %s", quote_path(now.target), error.strerror)
