"""What is on disk, and what a write that failed may have cost."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from snapd_native.metastore import Metastore
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class WriteBack:
    """Puts the state's file system on disk.

    The kernel tells of a write that failed once, not of which file, and takes what it could not
    write for written. So whatever was there by then is in doubt: what is read of it may be in
    memory only, and syncing it again succeeds. It stays so while the file system is mounted, and is
    noted in a file for the next start of the service: not in the database, which is on that disk.
    """

    def __init__(self, state: StateDirectory, store: Metastore, note: Path) -> None:
        """See in the file ``note`` what is in doubt since an earlier start."""
        self._state = state
        self._store = store
        self._note = note
        self._lock = threading.Lock()
        self._last = self._noted()
        self.failures = 0
        """How often a write has failed since the start."""

    def sync(self) -> None:
        """Put everything on the state's file system on disk.

        Raises:
            OSError: it could not be, or something could not since this was last called.
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
        """Put the trees of new snapshots on disk, and record that they are there.

        Raises:
            OSError: as `sync`.
        """
        new = self._store.unsettled()
        if new:
            self.sync()
            # What is in doubt ends with this boot of the machine, whatever is synced later.
            self._store.settle(id_ for id_ in new if not self.doubts(id_))

    def doubts(self, id_: int) -> bool:
        """Tell whether something of a snapshot's tree may not be on disk though it was synced."""
        return id_ <= self._last

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
