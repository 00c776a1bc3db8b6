"""Standby clones: copies that are made in advance, so that Prepare takes milliseconds."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import TypeAlias

from snapd_native import trees
from snapd_native.errors import Cancelled, DataLoss, SnapdError
from snapd_native.metastore import Metastore
from snapd_native.model import Usage
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.snapshotter.write_back import WriteBack

log = logging.getLogger(__name__)

NOTHING = Usage(0, 0)
"""The usage of no clone."""

SHARED_INODE = 1024
"""Bytes of a clone for each inode with shared data: the inode, its names and its extents."""

LOOK_SECONDS = 10.0
"""Seconds between two looks at the free space while clones are wanted."""

SPARE = 0.01
"""The share of the space that must be free beyond the least before clones are made again."""

Wanted: TypeAlias = Mapping[int, tuple[int, Usage]]
"""How many clones each snapshot wants, and the usage of one."""

_NONE = (0, NOTHING)


class Standby:
    """Keeps as many clones of each committed snapshot as its label says.

    One thread makes and deletes them, one after the other, by a worker process of idle priority.
    Clones that no label wants are deleted. If less than the share ``least_free`` of the space or
    the inodes is free, all are deleted; a clone that would lead to that is not made.
    """

    def __init__(
        self, state: StateDirectory, store: Metastore, write_back: WriteBack, least_free: float
    ) -> None:
        """Keep the complete clones of the last run, and begin to make the others."""
        self._state = state
        self._store = store
        self._write_back = write_back
        self._least_free = least_free
        self._ready: defaultdict[int, deque[str]] = defaultdict(deque)
        self._refused: deque[str] = deque()
        self._last = 0
        for name, parent, number, complete in state.standbys():
            self._last = max(self._last, number)
            if complete:
                self._ready[parent].append(name)
        self._lock = threading.Lock()
        self._crew = trees.Crew(1, idle=True)
        self._woken = threading.Event()
        self._woken.set()
        self._closing = False
        self._watches_room = False
        self._short = False
        self._failed: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the thread check soon whether other clones are wanted."""
        self._woken.set()

    def take(self, parent: int) -> str | None:
        """Give a complete clone to the caller: return its directory, or None if there is none."""
        with self._lock:
            ready = self._ready.get(parent)
            name = ready.popleft() if ready else None
        if name is not None:
            self._woken.set()
        return name

    def refuse(self, name: str) -> None:
        """Delete a clone that `take` has returned and that cannot be used."""
        self._refused.append(name)
        self._woken.set()

    def count(self, parent: int) -> int:
        """Return how many clones of a snapshot are complete."""
        with self._lock:
            return len(self._ready.get(parent, ()))

    def close(self) -> None:
        """Stop, and keep complete clones for the next start."""
        self._closing = True
        self._woken.set()
        self._thread.join()
        self._crew.close()

    def _run(self) -> None:
        for name, _, _, complete in self._state.standbys():
            if not complete:
                self._drop(name)
        while not self._closing:
            if self._woken.wait(LOOK_SECONDS if self._watches_room else None):
                self._failed.clear()
            self._woken.clear()
            try:
                while not self._closing and self._take_a_step():
                    pass
            except (SnapdError, OSError) as error:
                log.warning("standby clones are not looked after until the next change: %s", error)

    def _take_a_step(self) -> bool:
        """Delete or make one clone; return False if there is nothing to do."""
        if self._refused:
            self._drop(self._refused.popleft())
            return True
        wanted = self._store.standbys()
        self._watches_room = bool(wanted)
        has_room = self._has_room()
        surplus = self._take_surplus(wanted if has_room else {})
        if surplus is not None:
            self._drop(surplus)
            return True
        for parent, (_, usage) in wanted.items():
            if (
                parent not in self._failed
                and self._wants_more(wanted, parent)
                and not self._short
                and self._state.has_room(self._least_free, self._taken(usage))
            ):
                self._make(parent)
                return True
        return False

    def _take_surplus(self, wanted: Wanted) -> str | None:
        """Return the directory of a clone that is not wanted; None if there is none."""
        with self._lock:
            for parent, ready in [*self._ready.items()]:
                if len(ready) > wanted.get(parent, _NONE)[0]:
                    return ready.pop()
                if not ready:
                    del self._ready[parent]
        return None

    def _make(self, parent: int) -> None:
        """Make one clone, unless it is no longer wanted before it is complete."""

        def report(*_: int) -> None:
            self._check_closing()
            if not self._has_room():
                raise Cancelled("there is no room for it")
            if self._woken.is_set() and not self._wants_more(self._store.standbys(), parent):
                raise Cancelled("it is not wanted any more")

        self._last += 1
        failures = self._write_back.failures
        name = self._state.create_standby(parent, self._last)
        try:
            with (
                self._state.open(str(parent)) as source,
                self._state.open(name, writable=True) as target,
            ):
                self._crew.clone(source, target, report, reflink=self._state.reflink)
            self._write_back.sync()
            if self._write_back.failures > failures:
                raise DataLoss("a write to the disk has failed meanwhile")
            complete = self._state.complete_standby(name)
        except (SnapdError, OSError) as error:
            self._drop(name)
            if not isinstance(error, Cancelled):
                self._failed.add(parent)
                if self._wants_more(self._store.standbys(), parent):
                    log.warning("a standby clone cannot be made: %s", error)
            return
        with self._lock:
            self._ready[parent].append(complete)

    def _wants_more(self, wanted: Wanted, parent: int) -> bool:
        return self.count(parent) < wanted.get(parent, _NONE)[0]

    def _taken(self, usage: Usage) -> Usage:
        """Return the usage of a clone of a tree."""
        if not self._state.reflink:
            return usage
        return Usage(inodes=usage.inodes, size=usage.inodes * SHARED_INODE)

    def _has_room(self) -> bool:
        """Tell whether clones can stay, and note whether more can be made."""
        has_room = self._state.has_room(self._least_free, NOTHING)
        if not has_room:
            self._short = True
        elif self._short:
            self._short = not self._state.has_room(self._least_free + SPARE, NOTHING)
        return has_room

    def _check_closing(self, *_: int) -> None:
        if self._closing:
            raise Cancelled("the service is stopping")

    def _drop(self, name: str) -> None:
        """Delete a clone; the next start deletes what remains of it."""
        try:
            self._state.drop_standby(name, self._check_closing)
        except Cancelled:
            log.debug("%s is not deleted yet: the service is stopping", name)
        except (SnapdError, OSError) as error:
            log.warning("a standby clone cannot be deleted until the next start: %s", error)
