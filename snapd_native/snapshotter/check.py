"""Whether records, directories and mounts agree, and how they are brought to agree again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from snapd_native import trees
from snapd_native.errors import DataLoss
from snapd_native.metastore import Metastore
from snapd_native.model import Finding, Trouble, is_name
from snapd_native.snapshotter.mounting import Mounter
from snapd_native.snapshotter.reaping import Reaper
from snapd_native.snapshotter.state import StateDirectory


def check(
    state: StateDirectory, store: Metastore, mounter: Mounter, reaper: Reaper, report: trees.Report
) -> list[Finding]:
    """Return all that is wrong, after the deletions that are under way are done.

    Nothing is changed. What other calls do meanwhile is not taken for an error. ``report`` may end
    it.
    """
    found: list[Finding] = []
    for part in (
        state.findings,
        store.findings,
        partial(_lost, state, store),
        partial(_left, mounter, reaper, report),
        partial(_found, state),
        mounter.findings,
    ):
        try:
            found.extend(part())
        except DataLoss as error:
            found.append(Finding(Trouble.DATABASE, "", error.message))
    return [*dict.fromkeys(found)]


def repair(
    found: Sequence[Finding],
    state: StateDirectory,
    store: Metastore,
    mounter: Mounter,
    reaper: Reaper,
    report: trees.Report,
) -> list[Finding]:
    """Mend of what `check` has ``found`` what can be without a loss and without a guess.

    Return what was wrong of that. Files of the service are closed to others. Indexes of the
    database are made anew from its tables. What no snapshot owns is deleted, as by Cleanup. Mounts
    are made what the ledger says.
    """
    if not found:
        return []
    for mend in (
        state.close_to_others,
        store.mend,
        partial(reaper.finish, report),
        mounter.mend,
    ):
        with suppress(DataLoss, OSError):
            mend()
    left = check(state, store, mounter, reaper, report)
    return [finding for finding in found if finding not in left]


def _lost(state: StateDirectory, store: Metastore) -> Iterator[Finding]:
    """Yield the snapshots without a directory."""
    before = store.directories()
    there = {id_ for _, prefix, id_ in state.listing() if not prefix}
    # An id is never given again: a snapshot that was there before, and is after, was meanwhile.
    for id_, name in store.directories().items():
        if id_ in before and id_ not in there:
            what = "its directory is gone: restore it from a backup, or remove the snapshot"
            yield Finding(Trouble.TREE, name if is_name(name) else "", what)


def _left(mounter: Mounter, reaper: Reaper, report: trees.Report) -> Iterator[Finding]:
    """Yield the directories without a snapshot."""
    # No Remove is half-way between the record, its directory and the reaper.
    with mounter.unmounted():
        before = set(reaper.orphans())
    reaper.catch_up(report)
    for name in sorted(before.intersection(reaper.orphans())):
        if name.startswith("rm-"):
            what = f"{name} was removed and is not deleted: call Cleanup, which says why"
            yield Finding(Trouble.LEFTOVER, "", what)
        else:
            yield Finding(Trouble.ORPHAN, "", f"{name} is no snapshot's: call Cleanup")


def _found(state: StateDirectory) -> Iterator[Finding]:
    """Yield the trees that were set aside."""
    for name, prefix, _ in state.listing():
        if prefix == "found-":
            what = (
                f"{name} is a tree whose record was lost: restore a metadata.db that has it and"
                " restart the service, or move the tree away"
            )
            yield Finding(Trouble.ORPHAN, "", what)
