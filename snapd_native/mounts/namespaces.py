"""Mounts of a tree in the mount namespaces of other processes; see mount_namespaces(7).

A service with PrivateTmp= or a similar setting has a mount namespace of its own. It contains a copy
of each mount that existed when the service started, and of many later ones. A change of a mount
does not change its copies.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from snapd_native import linux
from snapd_native.mounts.attach import make_read_only
from snapd_native.mounts.bounded import bounded
from snapd_native.mounts.table import Entry, Place, Table

_ROUNDS = 10
"""How often to look again for new namespaces."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A mount namespace."""

    fd: int
    pid: int
    """A process in it; 0 if none is known."""


class NotFrozen(Exception):
    """A mount in another namespace cannot be made read-only."""

    def __init__(self, pid: int, entry: Entry, error: OSError) -> None:
        super().__init__(pid, entry, error)
        self.pid = pid
        """As that of `Namespace`."""
        self.entry = entry
        self.error = error


class OtherNamespaces:
    """Makes the mounts of a tree in other namespaces read-only."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        """The ids of all mounts in all namespaces."""
        self._over = False
        """Whether a thread that still runs must stop."""
        self._stack = ExitStack()
        self._done: list[tuple[Namespace, Entry]] = []

    def close(self) -> None:
        """Leave all mounts as they are."""
        self._over = True
        self._stack.close()

    def freeze(self, place: Place) -> None:
        """Make all writable mounts of the tree read-only; `thaw` undoes that.

        Raises:
            NotFrozen: a mount cannot be made read-only.
            OSError: new namespaces are created faster than they can be examined, or a file system
                in one does not answer.
        """
        for _ in range(_ROUNDS):
            with _namespaces() as (found, closed):
                if not _entering(partial(self._freeze, found, place), place):
                    self._check_closed(closed, place)
                    self.known.update(entry.id for entry in Table.read())
                    return
        raise OSError(errno.EAGAIN, "mount namespaces are made all the time")

    def thaw(self) -> None:
        """Undo `freeze`."""
        if self._done:
            with suppress(TimeoutError):
                _entering(self._thaw, self)

    def _freeze(self, found: list[Namespace], place: Place, proc: int) -> bool:
        """Make mounts read-only; return whether there were any."""
        before = len(self._done)
        for namespace in found:
            if self._over:
                # The descriptor is closed, and its number can be that of another file.
                return False
            try:
                linux.enter_mount_namespace(namespace.fd)
            except OSError:
                # A container can forbid that.
                self._check_closed([namespace.pid], place)
                continue
            table = _table(proc)
            self.known.update(entry.id for entry in table)
            _check_overlays(namespace.pid, table, place)
            foreign = _is_foreign(namespace.fd, proc)
            for entry in table.showing(place):
                if foreign:
                    _check_locked(namespace.pid, entry, proc)
                if entry.read_only:
                    continue
                try:
                    make_read_only(entry, proc=proc)
                except OSError as error:
                    raise NotFrozen(namespace.pid, entry, error) from None
                if self._over:
                    with suppress(OSError):
                        make_read_only(entry, read_only=False, proc=proc)
                    return False
                kept = os.dup(namespace.fd)
                self._stack.callback(os.close, kept)
                self._done.append((Namespace(kept, namespace.pid), entry))
        return len(self._done) > before

    def _check_closed(self, closed: list[int], place: Place) -> None:
        """Check the tables of namespaces that cannot be entered."""
        for pid in closed:
            with suppress(FileNotFoundError, ProcessLookupError):
                table = Table.read(Path(f"/proc/{pid}/mountinfo"))
                self.known.update(entry.id for entry in table)
                _check_overlays(pid, table, place)
                for entry in table.showing(place):
                    if not entry.read_only:
                        code = errno.EACCES
                        raise NotFrozen(pid, entry, OSError(code, os.strerror(code)))

    def _thaw(self, proc: int) -> bool:
        for namespace, entry in self._done:
            linux.enter_mount_namespace(namespace.fd)
            now = _table(proc).get(entry.id)
            if now and now.root == entry.root and now.read_only:
                with suppress(OSError):
                    make_read_only(now, read_only=False, proc=proc)
        return True


def _is_foreign(namespace: int, proc: int) -> bool:
    """Tell whether another user namespace than this process's owns a mount namespace.

    Its users can then change the flags of mounts that were not locked when they were copied.
    """
    try:
        own = os.stat("self/ns/user", dir_fd=proc).st_ino
        return linux.owner_namespace(namespace) != own
    except PermissionError:
        return False


def _check_locked(pid: int, entry: Entry, proc: int) -> None:
    """Check that the users of a foreign namespace cannot make a mount writable.

    Raises:
        NotFrozen: they can.
    """
    if entry.read_only:
        try:
            make_read_only(entry, read_only=False, proc=proc)
        except PermissionError:
            # It was read-only when it was copied; see mount_namespaces(7).
            return
        make_read_only(entry, proc=proc)
    raise NotFrozen(pid, entry, OSError(errno.EPERM, "its user can make it writable again"))


def _check_overlays(pid: int, table: Table, place: Place) -> None:
    for overlay in table.overlays(place, writing=True):
        raise NotFrozen(pid, overlay, OSError(errno.ETXTBSY, "an overlay writes to it"))


@contextmanager
def _namespaces() -> Iterator[tuple[list[Namespace], list[int]]]:
    """Open all mount namespaces, except for this process's.

    Before Linux 6.12, and in a PID namespace, those are not found that have no process. Yield also
    the threads whose namespaces root is not permitted to open.
    """
    with ExitStack() as stack:
        own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, own)
        seen = {os.fstat(own).st_ino}
        found: list[Namespace] = []
        closed: list[int] = []
        # A thread can have a namespace of its own, and live longer than the first thread.
        for thread in _threads():
            # A thread can end meanwhile.
            with suppress(FileNotFoundError, ProcessLookupError):
                try:
                    if os.stat(thread / "ns" / "mnt").st_ino in seen:
                        continue
                    fd = os.open(thread / "ns" / "mnt", os.O_RDONLY | os.O_CLOEXEC)
                except PermissionError:
                    closed.append(int(thread.name))
                    continue
                stack.callback(os.close, fd)
                seen.add(os.fstat(fd).st_ino)
                found.append(Namespace(fd, int(thread.parent.parent.name)))
        for request in (linux.NS_MNT_GET_NEXT, linux.NS_MNT_GET_PREV):
            at = own
            while (other := linux.neighbour_namespace(at, request)) is not None:
                stack.callback(os.close, other)
                at = other
                if os.fstat(other).st_ino not in seen:
                    seen.add(os.fstat(other).st_ino)
                    found.append(Namespace(other, 0))
        yield found, closed


def _threads() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        # A process can end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            yield from (process / "task").iterdir()


def _entering(work: Callable[[int], bool], of: Hashable) -> bool:
    """Run ``work`` in a thread that can enter namespaces; pass an fd of this namespace's /proc.

    For ``of`` see `bounded`.

    Raises:
        TimeoutError: a file system in another namespace does not answer.
    """

    def run() -> bool:
        with _directory("/proc") as proc:
            return work(proc)

    # The thread ends afterwards, so that nothing else runs in another namespace.
    return bounded(run, of=of)


@contextmanager
def _directory(path: str) -> Iterator[int]:
    """Open a directory for the block."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _table(proc: int) -> Table:
    fd = os.open("thread-self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    with open(fd, "rb") as file:
        return Table.parse(file.read())
