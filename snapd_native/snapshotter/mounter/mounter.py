"""Mount, unmount and list snapshots in the host's directory tree."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event

from snapd_native import linux, mounts
from snapd_native.errors import (
    AccessDenied,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    SnapdError,
)
from snapd_native.metastore import Line, Metastore, Record
from snapd_native.model import (
    Finding,
    Kind,
    Mounted,
    check_name,
    quote,
    quote_path,
)
from snapd_native.mounts import Entry, Table, Target
from snapd_native.snapshotter.background import Background
from snapd_native.snapshotter.failures import explained
from snapd_native.snapshotter.mounter.freezer import Freezer, thaw
from snapd_native.snapshotter.mounter.reconciler import Reconciler
from snapd_native.snapshotter.mounter.refusals import in_the_way, in_use, not_unmounted
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class Mounter:
    """Mounts and unmounts snapshots on the host.

    The ledger has a record of a mount before the mount is attached, and until it is gone. The
    kernel's table tells which of these mounts exist. One call at a time compares the two, and does
    not access file systems of others meanwhile.
    """

    def __init__(
        self, state: StateDirectory, store: Metastore, runtime: Path, stopping: Event, boot: str
    ) -> None:
        """Make the ledger and the kernel's table agree; see `Reconciler`."""
        self._state = state
        self._store = store
        self._ledger = store.ledger
        self._reconciler = Reconciler(state, store.ledger, runtime / "mounts", boot)
        self._stopping = stopping
        self._lock = self._reconciler.lock
        self._freezer = Freezer(self._reconciler)
        self._owners = {line.owner for line in self._ledger.lines() if line.owner}
        self._releaser = Background("releaser", "what a client has left stays mounted")

    def close(self) -> None:
        """Finish the releases that have begun. All mounts stay."""
        self._releaser.close()

    def mount(
        self,
        key: str,
        target: str = "",
        read_only: bool | None = None,
        uid: int = 0,
        owner: str = "",
    ) -> str:
        """Mount an active snapshot or a view on the directory ``target``, and return the target.

        If the target is empty, a directory is created for the mount. A view is mounted read-only,
        with the mounts inside it. With an ``owner``, the mount has the lifetime ``client`` and
        lasts until `release` is called for them. Without one it lasts until `unmount`: it is made
        again after a restart of the machine.

        Raises:
            InvalidArgument: the key is invalid; the target is relative, has a symbolic link in its
                path, is not a directory, or is in or above the state directory; or a view is
                wanted writable.
            NotFound: the key does not exist.
            FailedPrecondition: it is committed or being committed, the host would not see the
                mount, or the target's file system does not answer.
            AlreadyExists: a snapshot is mounted there.
            ResourceExhausted: there are too many mounts.
            DataLoss: its directory is gone.
        """
        check_name(key)
        if self._reconciler.blind:
            raise FailedPrecondition(self._reconciler.blind)
        if not target:
            return self._mount_on_own(key, read_only, uid, owner)
        with mounts.open_target(target, uid) as opened, self._lock:
            self._check_target(opened)
            self._mount(*self._mountable(key, read_only), opened, uid, owner)
            return opened.path

    def unmount(self, target: str, lazy: bool = False, uid: int | None = None) -> None:
        """Unmount what `mount` has mounted on ``target``; with ``lazy`` also if it is in use.

        With ``uid``, the mount must be that user's. A persistent mount that is gone already is not
        made again.

        Raises:
            AccessDenied: the mount is another user's.
            InvalidArgument: the target is relative.
            NotFound: no snapshot is mounted there.
            FailedPrecondition: it is in use, something else is mounted over it, or the target's
                file system does not answer.
        """
        try:
            busy = self._take_away(partial(self._find_owned, target, uid), lazy)
        except OSError as error:
            with explained(f"unmount {quote_path(target)}"):
                raise not_unmounted(target, error) from None
        if busy:
            raise FailedPrecondition(
                f"cannot unmount {quote_path(busy.target)}: {in_use(busy)}, or unmount it lazily"
            )

    def list_mounts(self, key: str = "") -> list[Mounted]:
        """Return the mounts of one snapshot or of all, in the order of their making.

        Raises:
            InvalidArgument: the key is invalid.
            NotFound: it does not exist.
        """
        snapshot = self._store.get(check_name(key)).id if key else None
        with self._lock:
            return [
                Mounted(entry.target, line.key, line.read_only, line.lifetime, line.uid)
                for line, entry in self._reconciler.existing(self._ledger.lines(snapshot))
            ]

    def user(self, target: str) -> int | None:
        """Return the uid of the caller that has mounted ``target``; None if nothing is mounted."""
        with self._lock, suppress(SnapdError):
            line, _ = self._reconciler.find(target)
            return line.uid
        return None

    def open_tree(self, key: str, read_only: bool | None = None) -> int:
        """Return a detached mount of an active snapshot or a view; raises as `mount`.

        The caller closes the fd, and can attach it in any mount namespace with move_mount(2).
        """
        check_name(key)
        with self._lock:
            return self._detached_tree(*self._mountable(key, read_only))

    def owners(self) -> Collection[str]:
        """Return the owners of all mounts with the lifetime ``client``."""
        return frozenset(self._owners)

    def release(self, owner: str) -> None:
        """Unmount soon what was mounted for ``owner``, a client that has left.

        A mount that another process uses is unmounted lazily.
        """
        self._releaser.submit(partial(self._release_all, owner))

    def findings(self) -> Sequence[Finding]:
        """Return the differences between the ledger and the kernel's table."""
        if not self._reconciler.findings():
            return []
        # A running call can have changed one of the two only.
        with self._lock:
            return self._reconciler.findings()

    def repair(self) -> None:
        """Make the mounts as the ledger records them."""
        self._reconciler.repair(self._freezer.trees)

    @contextmanager
    def unmounted(self) -> Iterator[Callable[[Record], None]]:
        """Prevent mounts in the block; yield a function that raises if a snapshot is mounted."""
        with self._lock:
            yield self._check_unmounted

    def frozen(self, key: str, tree: int) -> AbstractContextManager[None]:
        """Make the mounts of an active snapshot's tree read-only; see `Freezer.frozen`."""
        return self._freezer.frozen(key, tree)

    def _find_owned(self, target: str, uid: int | None) -> tuple[Line, Entry | None]:
        """Return the mount on ``target``, which must be that of ``uid`` if that is not None."""
        line, entry = self._reconciler.find(target)
        if uid not in (None, line.uid):
            raise AccessDenied(
                f"{quote_path(target)} was mounted by another user: unmount it as that user"
            )
        return line, entry

    def _take_away(self, find: Callable[[], tuple[Line, Entry | None]], lazy: bool) -> Entry | None:
        """Unmount what ``find`` returns and delete its record; if it is in use, return it.

        Raises:
            OSError: as `mounts.detach`.
        """
        while True:
            with self._lock:
                line, entry = find()
                if entry is None:
                    self._reconciler.forget(line)
                    return None
            with self._reconciler.turn(entry, leaving=line):
                with self._lock:
                    if find() != (line, entry):
                        # Another call was first.
                        continue
                if not _detached(entry, lazy):
                    return entry
                with self._lock:
                    self._reconciler.forget(line)
                    return None

    def _mount_on_own(self, key: str, read_only: bool | None, uid: int, owner: str) -> str:
        with self._lock:
            record, is_read_only = self._mountable(key, read_only)
            path = self._reconciler.own / str(record.id)
            with explained(f"mount {quote(key)}"):
                self._reconciler.make_own(path)
            try:
                with mounts.open_target(str(path)) as opened:
                    self._mount(record, is_read_only, opened, uid, owner)
                    return opened.path
            except BaseException:
                with suppress(OSError):
                    path.rmdir()
                raise

    def _mountable(self, key: str, read_only: bool | None) -> tuple[Record, bool]:
        """Return the record of what can be mounted, and whether it is mounted read-only."""
        record = self._store.get_mountable(key)
        is_view = record.info.kind is Kind.VIEW
        if is_view and read_only is False:
            raise InvalidArgument(
                f"{quote(key)} is a view, which nobody may write: mount it read-only"
            )
        return record, is_view or bool(read_only)

    def _check_target(self, target: Target) -> None:
        state = self._state.real_path
        if target.path == state or target.path.startswith(f"{state}/"):
            raise InvalidArgument(
                f"the target {quote_path(target.path)} is inside the state directory:"
                " choose another"
            )
        if state.startswith(target.path.rstrip("/") + "/"):
            raise InvalidArgument(
                f"the target {quote_path(target.path)} would hide the state directory:"
                " choose another"
            )

    def _mount(self, record: Record, read_only: bool, target: Target, uid: int, owner: str) -> None:
        lines = self._ledger.lines()
        if any(entry.target == target.path for _, entry in self._reconciler.existing(lines)):
            raise AlreadyExists(
                f"a snapshot is mounted on {quote_path(target.path)} already: unmount it first"
            )
        absent = self._reconciler.absent(lines)
        mount = self._detached_tree(record, read_only)
        try:
            if owner:
                self._owners.add(owner)
            with explained(f"mount {quote(record.info.name)}"):
                id_ = self._ledger.add(
                    record.id,
                    target.path,
                    read_only,
                    uid,
                    owner,
                    self._reconciler.boot,
                    linux.mount_id(mount),
                    [line.id for line in absent if line.boot == self._reconciler.boot],
                )
                try:
                    mounts.attach(mount, target.fd)
                except BaseException as error:
                    self._ledger.forget([id_])
                    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                        raise ResourceExhausted(
                            f"cannot mount {quote(record.info.name)}: there are too many mounts,"
                            " raise the sysctl fs.mount-max"
                        ) from None
                    if isinstance(error, OSError) and error.errno == errno.ENOENT:
                        raise InvalidArgument(
                            f"the target {quote_path(target.path)} was deleted: make it again"
                        ) from None
                    raise
        finally:
            os.close(mount)
        for line in absent:
            if line.target == target.path:
                self._reconciler.forget(line)
        log.debug("%s is mounted on %s", quote(record.info.name), quote_path(target.path))

    def _detached_tree(self, record: Record, read_only: bool) -> int:
        with (
            explained(f"mount {quote(record.info.name)}"),
            self._state.open_with_mounts(record.tree_id) as directory,
        ):
            return mounts.detached(directory, read_only=read_only)

    def _release_all(self, owner: str) -> None:
        for line in self._ledger.lines():
            if line.owner == owner:
                self._release(line)
        self._owners.discard(owner)

    def _release(self, line: Line) -> None:
        failure: Exception | None = None
        # The kernel closes the files of an ended process a moment later.
        for lazy in (False,) * _TRIES + (True,):
            try:
                busy = self._take_away(
                    lambda: (line, self._reconciler.entry(line, Table.read())), lazy
                )
            except (SnapdError, OSError) as error:
                failure = error
                if isinstance(error, TimeoutError):
                    break
            else:
                if not busy:
                    _tell_released(line, lazy)
                    return
            self._stopping.wait(_PAUSE)
        log.warning("a mount of a client that is gone stays: %s", failure)

    def _check_unmounted(self, record: Record) -> None:
        table = Table.read()
        targets = [
            entry.target if entry else line.target
            for line in self._ledger.lines(record.id)
            if (entry := self._reconciler.entry(line, table))
            or (self._reconciler.blind and line.boot == self._reconciler.boot)
        ]
        inside: list[str] = []
        overlays: list[str] = []
        if record.tree_id == record.id:
            targets += [entry.target for entry in self._reconciler.showing(table, record.id)]
            directory = f"{self._state.real_path}/snapshots/{record.id}"
            inside = [os.path.relpath(entry.target, directory) for entry in table.within(directory)]
            if place := self._state.place(record.id):
                overlays = [entry.target for entry in table.overlays(place)]
        if obstacle := in_the_way(targets, overlays, inside):
            raise FailedPrecondition(f"cannot remove {quote(record.info.name)}: {obstacle}")


def _detached(entry: Entry, lazy: bool) -> bool:
    """Unmount; return False if the mount is in use."""
    try:
        if lazy and not entry.read_only:
            # With a file open for writing the mount stays writable.
            with suppress(OSError):
                mounts.make_read_only(entry)
        mounts.detach(entry, lazy=lazy)
    except OSError as error:
        if lazy and not entry.read_only:
            thaw(entry)
        if error.errno == errno.EBUSY:
            return False
        raise
    log.debug("%s is unmounted", quote_path(entry.target))
    return True


def _tell_released(line: Line, lazy: bool) -> None:
    target = quote_path(line.target)
    if lazy:
        log.warning("%s was in use when its client left: it is detached and out of sight", target)
    else:
        log.info("%s is unmounted: its client left", target)


_TRIES = 10
_PAUSE = 0.1
"""Seconds after each attempt to unmount what a client has left."""
