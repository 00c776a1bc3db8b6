"""Open the metastore when the service starts."""

from __future__ import annotations

import logging
from collections.abc import Callable

from snapd_native.errors import DataLoss
from snapd_native.metastore import Metastore
from snapd_native.model import Change, quote
from snapd_native.snapshotter.state.directory import StateDirectory

log = logging.getLogger(__name__)


def open_store(state: StateDirectory, announce: Callable[[Change], None]) -> Metastore:
    """Open the metastore, and remove snapshots that a power cut may have left incomplete.

    Raises:
        Unavailable: another process has the database open.
        FailedPrecondition: the database is not a file.
        DataLoss: it is damaged, gone, or was made by a newer version.
        ResourceExhausted: the disk is full.
    """
    there = {id_ for _, prefix, id_ in state.listing() if not prefix}
    if there and not state.has_database():
        raise DataLoss(
            f"{state.database} is gone, but its snapshots are there:"
            " restore it from a backup, or move the snapshots away"
        )
    store = Metastore(
        state.database,
        announce,
        # The id of a directory that could not be deleted is not used again.
        first_id=state.highest_id() + 1,
        make_room=state.ballast.drop,
        may_be_new=not there,
    )
    try:
        for name in store.forget_unsettled(state.mounting):
            log.warning(
                "%s is gone: it was prepared just before a power cut or a disk's failure",
                quote(name),
            )
        if missing := len(store.directories().keys() - there):
            log.error("%d snapshots have lost their directories", missing)
    except BaseException:
        store.close()
        raise
    return store
