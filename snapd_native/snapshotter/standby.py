"""Clones that are ready before anybody asks, so that Prepare takes no time."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping

from snapd_native import trees
from snapd_native.errors import Cancelled, SnapdError
from snapd_native.metastore import Metastore
from snapd_native.model import Usage
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)

NOTHING = Usage(0, 0)
"""What no further clone takes."""

LOOK_SECONDS = 10.0
"""How often the free space is looked at while there are clones that take it."""


class Standby:
    """Keeps as many clones of each committed snapshot as its label says.

    One thread makes and drops them, one after the other, by a worker process of idle priority.
    Clones are dropped when nobody wants them, and all of them where less than ``least_free`` of the
    file system's space or inodes is free; none is made that would lead there.
    """

    def __init__(self, state: StateDirectory, store: Metastore, least_free: float) -> None:
        """Keep what is left of complete clones, and begin to make the others."""
        self._state = state
        self._store = store
        self._least_free = least_free
        self._ready: defaultdict[int, deque[str]] = defaultdict(deque)
        self._last = 0
        for name, parent, number, complete in state.standbys():
            self._last = max(self._last, number)
            if complete:
                self._ready[parent].append(name)
        self._lock = threading.Lock()
        self._crew = trees.Crew(1, idle=True)
        self._look = threading.Event()
        self._look.set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """See soon what is wanted; something may have changed."""
        self._look.set()

    def take(self, parent: int) -> str | None:
        """Return the directory of a complete clone, which is the caller's now; None without one."""
        with self._lock:
            ready = self._ready.get(parent)
            name = ready.popleft() if ready else None
        if name is not None:
            self._look.set()
        return name

    def count(self, parent: int) -> int:
        """Return how many clones of a snapshot are complete."""
        with self._lock:
            return len(self._ready.get(parent, ()))

    def close(self) -> None:
        """Stop, leaving complete clones for the next time."""
        self._closing = True
        self._look.set()
        self._thread.join()
        self._crew.close()

    def _run(self) -> None:
        self._attempt(self._drop_incomplete)
        while not self._closing:
            self._look.wait(LOOK_SECONDS if any(self._ready.values()) else None)
            self._look.clear()
            self._attempt(self._improve)

    def _attempt(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Cancelled:
            log.debug("standby clones wait: the service is stopping, or space is short")
        except (SnapdError, OSError) as error:
            log.warning("a standby clone cannot be made or dropped: %s", error)

    def _improve(self) -> None:
        """Drop and make clones until all are as they should be."""
        while not self._closing and self._take_a_step():
            pass

    def _take_a_step(self) -> bool:
        """Drop or make one clone; False if all are as they should be."""
        wanted = self._wanted()
        with self._lock:
            for parent, ready in self._ready.items():
                if len(ready) > self._number(wanted, parent):
                    surplus = ready.pop()
                    break
            else:
                surplus = None
        if surplus is not None:
            self._state.drop_standby(surplus, self._check_closing)
            return True
        for parent, (number, usage) in wanted.items():
            if self.count(parent) < number and self._fits(usage):
                self._make(parent)
                return True
        return False

    def _make(self, parent: int) -> None:
        """Make one clone, unless it is not wanted any more before it is complete."""

        def report(*_: int) -> None:
            self._check_closing()
            if not self._fits(NOTHING) or (self._look.is_set() and parent not in self._wanted()):
                raise Cancelled("the clone is not wanted any more")

        self._last += 1
        name = self._state.create_standby(parent, self._last)
        try:
            with (
                self._state.open(str(parent)) as source,
                self._state.open(name, writable=True) as target,
            ):
                self._crew.clone(source, target, report, reflink=self._state.reflink)
            self._state.write_back()
            complete = self._state.complete_standby(name)
        except BaseException as error:
            self._drop_incomplete()
            if isinstance(error, Exception) and parent not in self._wanted():
                return
            raise
        with self._lock:
            self._ready[parent].append(complete)

    def _wanted(self) -> Mapping[int, tuple[int, Usage]]:
        """Return how many clones there should be of which snapshots, and what one takes."""
        return self._store.standbys() if self._fits(NOTHING) else {}

    @staticmethod
    def _number(wanted: Mapping[int, tuple[int, Usage]], parent: int) -> int:
        number, _ = wanted.get(parent, (0, None))
        return number

    def _fits(self, usage: Usage) -> bool:
        """Tell whether enough would be free beside one more clone."""
        size = 0 if self._state.reflink else usage.size
        return self._state.has_room(self._least_free, Usage(size, usage.inodes))

    def _check_closing(self, *_: int) -> None:
        if self._closing:
            raise Cancelled("the service is stopping")

    def _drop_incomplete(self) -> None:
        for name, _, _, complete in self._state.standbys():
            if not complete and not self._closing:
                self._state.drop_standby(name, self._check_closing)
