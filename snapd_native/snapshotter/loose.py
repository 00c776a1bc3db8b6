"""Mounts that were taken out of sight while they could be written to."""

from __future__ import annotations

import errno
import os

from snapd_native import mounts
from snapd_native.errors import FailedPrecondition
from snapd_native.model import quote, quote_path
from snapd_native.mounts import Entry
from snapd_native.snapshotter.obstacles import named


class Loose:
    """Remembers them until nobody uses them; not thread-safe."""

    def __init__(self) -> None:
        self._pinned: list[tuple[int, Entry, int]] = []

    def close(self) -> None:
        """Forget all."""
        for _, _, pin in self._pinned:
            os.close(pin)

    def add(self, tree: int, entry: Entry) -> None:
        """Make a mount that goes out of sight read-only, or remember that it may be written to."""
        try:
            mounts.make_read_only(entry)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            self._pinned.append((tree, entry, mounts.pinned(entry)))

    def take_back(self, entry: Entry) -> None:
        """Forget a mount that has not gone out of sight after all."""
        for remembered in [each for each in self._pinned if each[1].id == entry.id]:
            self._pinned.remove(remembered)
            os.close(remembered[2])

    def check(self, key: str, tree: int) -> None:
        """Refuse a Commit of what can still be written to.

        Raises:
            FailedPrecondition: it can.
        """
        for number, entry, pin in list(self._pinned):
            processes = mounts.users(entry, but=pin)
            if not processes:
                self._pinned.remove((number, entry, pin))
                os.close(pin)
            elif number == tree:
                raise FailedPrecondition(
                    f"cannot commit {quote(key)}: {named(processes)} can still write to it on"
                    f" {quote_path(entry.target)}, which was unmounted lazily: end that first"
                )
