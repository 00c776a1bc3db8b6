"""Make all mounts of a tree read-only for Commit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager

from snapd_native import mounts
from snapd_native.errors import FailedPrecondition
from snapd_native.model import quote, quote_path
from snapd_native.mounts import Entry, OtherNamespaces, Table, Unattached
from snapd_native.snapshotter.failures import explained
from snapd_native.snapshotter.mounter.reconciler import Reconciler
from snapd_native.snapshotter.mounter.refusals import (
    can_write,
    enumerated,
    frozen_in_namespaces,
    not_frozen,
)
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class Freezer:
    """Makes the mounts of trees read-only, and writable again when Commit fails."""

    def __init__(self, state: StateDirectory, reconciler: Reconciler) -> None:
        self._state = state
        self._reconciler = reconciler
        self.trees: set[int] = set()
        """The trees that are being committed."""

    @contextmanager
    def frozen(self, key: str, tree: int) -> Iterator[None]:
        """Make all mounts of an active snapshot's tree read-only; undo that if the block raises.

        All mounts are those of the host, of other mount namespaces, and detached ones.

        Raises:
            FailedPrecondition: a file is open for writing on one of them, a mount that was
                unmounted lazily can still be written to, or an overlay writes to the tree.
        """
        with self._reconciler.lock:
            self.trees.add(tree)
        done: list[Entry] = []
        with closing(OtherNamespaces()) as namespaces, closing(Unattached()) as unattached:
            try:
                self._freeze_on_host(key, tree, done)
                self._freeze_others(key, tree, namespaces, unattached)
                yield
            except BaseException:
                unattached.thaw()
                namespaces.thaw()
                for entry in done:
                    with self._reconciler.turn(entry):
                        thaw(entry)
                raise
            finally:
                with self._reconciler.lock:
                    self.trees.discard(tree)

    def _freeze_on_host(self, key: str, tree: int, done: list[Entry]) -> None:
        """Make the host's mounts of a tree read-only, and append them to ``done``."""
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

    def _freeze_others(
        self, key: str, tree: int, namespaces: OtherNamespaces, unattached: Unattached
    ) -> None:
        """Make all other mounts of a tree read-only, or raise."""
        place = self._state.place(tree)
        if not place:
            return
        if overlays := Table.read().overlays(place, writing=True):
            raise FailedPrecondition(
                f"cannot commit {quote(key)}: the overlay on"
                f" {enumerated([entry.target for entry in overlays])} writes to it,"
                " unmount that first"
            )
        with frozen_in_namespaces(key):
            namespaces.freeze(place)
        with explained(f"commit {quote(key)}"), self._state.open(str(tree)) as root:
            if writers := unattached.freeze(root, namespaces.known):
                raise can_write(key, writers)


def thaw(entry: Entry) -> None:
    """Make a mount writable again, even if it was moved."""
    now = Table.read().get(entry.id)
    if now is None or now.root != entry.root or not now.read_only:
        return
    try:
        mounts.make_read_only(now, read_only=False)
    except OSError as error:
        log.warning("%s stays read-only: %s", quote_path(now.target), error.strerror)
