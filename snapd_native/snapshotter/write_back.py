"""Write-back of the state to disk, and the trees that a failed write may have damaged."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from snapd_native.errors import DataLoss
from snapd_native.metastore import Metastore
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class WriteBack:
    """Puts the state's file system on disk.

    The kernel reports a failed write once and does not name the file. Afterwards it treats the data
    as written: another sync succeeds, although the data may be in memory only. So all trees of that
    moment are in doubt until the file system is mounted anew. A file outside of the state notes
    this for the next start of the service, because the database is on the same disk.
    """

    def __init__(self, state: StateDirectory, store: Metastore, note: Path) -> None:
        """Read from the file ``note`` which trees are in doubt since an earlier start."""
        self._state = state
        self._store = store
        self._note = note
        self._lock = threading.Lock()
        self._last = self._noted()
        self.failures = 0
        """The number of failed writes since the start."""

    def sync(self) -> None:
        """Write everything on the file system of the state to the disk.

        Raises:
            OSError: a write has failed now or since the last call.
        """
        # Nobody may sync without an error before what another one has met is known.
        with self._lock:
            try:
                self._state.sync()
            except OSError:
                self.failures += 1
                self._last = self._store.last_id()
                self._write()
                raise

    def settle(self) -> None:
        """Write the trees of new snapshots to the disk, and record that.

        Raises:
            OSError: as `sync`.
        """
        new = self._store.unsettled()
        if new:
            self.sync()
            # A doubt lasts until the machine boots again, whatever is synced later.
            self._store.settle(id_ for id_ in new if id_ > self._last)

    def sync_tree(self, id_: int) -> None:
        """Write the tree of an active snapshot to the disk.

        Raises:
            OSError: as `sync`.
            DataLoss: the tree is in doubt.
        """
        self.sync()
        if id_ <= self._last:
            raise DataLoss("a write to the disk has failed since it was prepared, prepare it anew")

    def _noted(self) -> int:
        try:
            mounting, last = self._note.read_text().splitlines()
            return int(last) if mounting == self._state.mounting else 0
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            log.warning("it is unknown what is on disk (%s): all snapshots are in doubt", error)
            return self._store.last_id()

    def _write(self) -> None:
        new = self._note.with_suffix(".new")
        try:
            self._note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.write_text(f"{self._state.mounting}\n{self._last}\n")
            os.replace(new, self._note)
        except OSError as error:
            log.error(
                "a restart would forget that a write to the disk has failed (%s): remove the"
                " active snapshots before",
                error,
            )
