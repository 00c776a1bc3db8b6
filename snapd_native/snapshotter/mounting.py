"""Snapshots in the host's directory tree: mounted, listed, unmounted, and recovered."""

from __future__ import annotations

import errno
import logging
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock

from snapd_native import linux, mounts
from snapd_native.errors import (
    AccessDenied,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapdError,
)
from snapd_native.metastore import Line, Metastore, Record
from snapd_native.model import Finding, Kind, Lifetime, Mounted, Trouble, quote, quote_path
from snapd_native.mounts import Entry, Table, Target
from snapd_native.snapshotter.background import Background
from snapd_native.snapshotter.failures import explained
from snapd_native.snapshotter.obstacles import enumerated, in_use, named, not_frozen
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class Mounter:
    """Mounts snapshots, and knows which of them the host has mounted.

    What it has mounted is in the ledger before it can be seen, and until it is gone; the kernel's
    table says what of that still stands. One call at a time looks at both.
    """

    def __init__(
        self, state: StateDirectory, store: Metastore, runtime: Path, stopping: Event
    ) -> None:
        """Bring the ledger and the kernel's table together.

        What stands is kept, what is gone is forgotten. After a restart of the machine, persistent
        mounts are made again; one that cannot be stays in the ledger for the next time.
        """
        self._state = state
        self._store = store
        self._ledger = store.ledger
        self._own = runtime / "mounts"
        self._boot = linux.boot_id()
        self._stopping = stopping
        self._lock = Lock()
        self._loose: list[tuple[int, Entry]] = []
        self._blind = ""
        if mounts.hidden_from_host():
            self._blind = _HIDDEN
        elif state.place(0) is None:
            self._blind = _CHROOT
        if self._blind:
            log.warning("%s", self._blind)
        else:
            self._recover()
        self._owners = {line.owner for line in self._ledger.lines() if line.owner}
        self._releaser = Background("releaser", "what a client has left stays mounted")

    def close(self) -> None:
        """End after all that was begun; what is mounted stays."""
        self._releaser.close()

    def mount(
        self,
        key: str,
        target: str,
        read_only: bool | None,
        lifetime: Lifetime,
        uid: int,
        owner: str,
    ) -> str:
        """Mount a snapshot on ``target``, or on a directory that is made for it; return that."""
        if self._blind:
            raise FailedPrecondition(self._blind)
        if not target:
            return self._mount_on_own(key, read_only, lifetime, uid, owner)
        with mounts.open_target(target) as opened, self._lock:
            self._check_target(opened)
            record = self._mountable(key, read_only)
            self._mount(record, opened, read_only, lifetime, uid, owner)
            return opened.path

    def unmount(self, target: str, lazy: bool, uid: int | None) -> None:
        """Take away what was mounted on ``target``; if ``lazy``, also while it is in use."""
        with self._lock:
            line, entry = self._find(target)
            if uid not in (None, line.uid):
                raise AccessDenied(f"{quote_path(target)} is mounted for another: leave it alone")
            busy = entry is not None and not self._detached(line, entry, lazy)
            if not busy:
                self._forget(line)
        if entry is not None and busy:
            raise FailedPrecondition(
                f"cannot unmount {quote_path(entry.target)}: {in_use(entry)}, or unmount it lazily"
            )

    def listing(self, snapshot: int | None) -> list[Mounted]:
        """Return what is mounted, in the order in which it was, of one snapshot or all."""
        with self._lock:
            return [
                Mounted(entry.target, line.key, line.read_only, line.lifetime, line.uid)
                for line, entry in self._standing(self._ledger.lines(snapshot))
            ]

    def user(self, target: str) -> int | None:
        """Return who asked for what is mounted on ``target``; None if nothing is."""
        with self._lock, suppress(SnapdError):
            line, _ = self._find(target)
            return line.uid
        return None

    def open_tree(self, key: str, read_only: bool | None) -> int:
        """Return a mount of a snapshot that is attached nowhere; the fd is the caller's."""
        with self._lock:
            return self._detached_tree(self._mountable(key, read_only), read_only)

    def owners(self) -> Collection[str]:
        """Return all whose end may be a mount's end."""
        return frozenset(self._owners)

    def release(self, owner: str) -> None:
        """Take away soon all that was mounted for ``owner``, who is gone.

        What somebody else still uses then is detached, and stays theirs until they are done.
        """
        self._releaser.submit(partial(self._release_all, owner))

    def findings(self) -> Sequence[Finding]:
        """Return where the ledger and the kernel's table differ, but for what is unmounted."""
        if self._blind:
            return [Finding(Trouble.MOUNT, "", self._blind)]
        found = []
        with self._lock:
            lines, table = self._ledger.lines(), Table.read()
            standing = {line: self._stands(line, table) for line in lines}
            for line, entry in standing.items():
                on = quote_path(line.target)
                if line.boot != self._boot:
                    what = f"it is not mounted on {on} since the machine was started: restart the"
                    found.append((line.key, f"{what} service, or unmount it"))
                elif entry and line.read_only and not entry.read_only:
                    found.append((line.key, f"it is writable on {on}: unmount it"))
            known = {entry.id for entry in standing.values() if entry}
            found += [
                ("", f"{quote_path(entry.target)} is mounted, but not known: unmount it by hand")
                for entry in table.within(str(self._own))
                if entry.id not in known and entry.target != str(self._own)
            ]
        return [Finding(Trouble.MOUNT, key, what) for key, what in found]

    @contextmanager
    def unmounted(self) -> Iterator[Callable[[Record], None]]:
        """Keep all from being mounted, and yield what raises if a snapshot is."""
        with self._lock:
            yield self._check_unmounted

    @contextmanager
    def frozen(self, key: str, tree: int) -> Iterator[None]:
        """Turn the mounts of an active snapshot's tree read-only; undone if the block fails.

        Raises:
            FailedPrecondition: a file is open for writing on one of them.
        """
        with self._lock:
            self._check_not_loose(key, tree)
            entries = [entry for entry in self._showing(Table.read(), tree) if not entry.read_only]
            done: list[Entry] = []
            failed: tuple[Entry, OSError] | None = None
            for entry in entries:
                try:
                    mounts.make_read_only(entry)
                except OSError as error:
                    failed = entry, error
                    break
                done.append(entry)
            if failed:
                _thaw(done)
        if failed:
            raise not_frozen(key, *failed)
        try:
            yield
        except BaseException:
            with self._lock:
                _thaw(done)
            raise

    def _mount_on_own(
        self, key: str, read_only: bool | None, lifetime: Lifetime, uid: int, owner: str
    ) -> str:
        with self._lock:
            record = self._mountable(key, read_only)
            path = self._own / str(record.id)
            self._make_own(path)
            try:
                with mounts.open_target(str(path)) as opened:
                    self._mount(record, opened, read_only, lifetime, uid, owner)
                    return opened.path
            except BaseException:
                with suppress(OSError):
                    path.rmdir()
                raise

    def _make_own(self, path: Path) -> None:
        """Make a directory for a mount without a target."""
        for directory in (self._own.parent, self._own, path):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _mountable(self, key: str, read_only: bool | None) -> Record:
        record = self._store.get_mountable(key)
        if record.info.kind is Kind.VIEW and read_only is False:
            raise InvalidArgument(
                f"{quote(key)} is a view, which nobody may write: mount it read-only"
            )
        return record

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

    def _mount(
        self,
        record: Record,
        target: Target,
        read_only: bool | None,
        lifetime: Lifetime,
        uid: int,
        owner: str,
    ) -> None:
        if any(entry.target == target.path for _, entry in self._standing(self._ledger.lines())):
            raise AlreadyExists(
                f"a snapshot is mounted on {quote_path(target.path)} already: unmount it first"
            )
        is_read_only = _is_read_only(record, read_only)
        mount = self._detached_tree(record, read_only)
        try:
            if owner:
                self._owners.add(owner)
            with explained(f"mount {quote(record.info.name)}"):
                id_ = self._ledger.add(
                    record.id,
                    target.path,
                    is_read_only,
                    lifetime,
                    uid,
                    owner,
                    self._boot,
                    linux.mount_id(mount),
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
                    raise
        finally:
            os.close(mount)
        log.info("%s is mounted on %s", quote(record.info.name), quote_path(target.path))

    def _detached_tree(self, record: Record, read_only: bool | None) -> int:
        with (
            explained(f"mount {quote(record.info.name)}"),
            self._state.open_with_mounts(record.tree_id) as directory,
        ):
            return mounts.detached(directory, read_only=_is_read_only(record, read_only))

    def _find(self, target: str) -> tuple[Line, Entry | None]:
        """Return what was mounted on ``target``; without an entry if it could not be made again."""
        if not target.startswith("/"):
            raise InvalidArgument(
                f"the target {quote_path(target)} is relative: give its whole path"
            )
        # POSIX lets two slashes at the beginning mean something; Linux does not.
        path = "/" + posixpath.normpath(target).lstrip("/")
        lines = self._ledger.lines()
        for line, entry in self._standing(lines):
            if entry.target == path:
                return line, entry
        for line in lines:
            if line.boot != self._boot and line.target == path:
                return line, None
        raise NotFound(
            f"no snapshot is mounted on {quote_path(target)}: see which mounts there are"
        )

    def _detached(self, line: Line, entry: Entry, lazy: bool) -> bool:
        """Take a mount away; False if it is in use."""
        try:
            if lazy and not entry.read_only:
                self._let_loose(line, entry)
            mounts.detach(entry, lazy=lazy)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno == errno.ESTALE:
                raise FailedPrecondition(
                    f"cannot unmount {quote_path(entry.target)}: something else is mounted over it,"
                    " unmount that first"
                ) from None
            with explained(f"unmount {quote_path(entry.target)}"):
                raise
        log.info("%s is unmounted", quote_path(entry.target))
        return True

    def _let_loose(self, line: Line, entry: Entry) -> None:
        """Make a mount that goes out of sight read-only, or remember that it may be written to."""
        try:
            mounts.make_read_only(entry)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            self._loose.append((line.tree, entry))

    def _check_not_loose(self, key: str, tree: int) -> None:
        """Refuse a Commit of what can still be written to through a mount that is out of sight."""
        for number, entry in list(self._loose):
            processes = mounts.users(entry)
            if not processes:
                self._loose.remove((number, entry))
            elif number == tree:
                raise FailedPrecondition(
                    f"cannot commit {quote(key)}: {named(processes)} can still write to it on"
                    f" {quote_path(entry.target)}, which was unmounted lazily: end that first"
                )

    def _forget(self, line: Line) -> None:
        self._ledger.forget([line.id])
        if Path(line.target).parent == self._own:
            with suppress(OSError):
                os.rmdir(line.target)

    def _release_all(self, owner: str) -> None:
        for line in self._ledger.lines():
            if line.owner == owner:
                self._release(line)
        self._owners.discard(owner)

    def _release(self, line: Line) -> None:
        # What the one who is gone used itself is free in a moment.
        for lazy in (False,) * _TRIES + (True,):
            with self._lock:
                entry = self._stands(line, Table.read())
                try:
                    busy = entry is not None and not self._detached(line, entry, lazy)
                except (SnapdError, OSError) as error:
                    log.warning("a mount of a client that is gone stays: %s", error)
                    return
                if not busy:
                    self._forget(line)
                    if lazy:
                        log.warning(
                            "%s was in use when its client left: it is detached and out of sight",
                            quote_path(line.target),
                        )
                    return
            self._stopping.wait(_PAUSE)

    def _standing(self, lines: Sequence[Line]) -> list[tuple[Line, Entry]]:
        """Return what still stands, and forget what is gone."""
        if not lines:
            return []
        table = Table.read()
        standing, gone = [], []
        for line in lines:
            entry = self._stands(line, table)
            if entry is not None:
                standing.append((line, entry))
            elif line.boot == self._boot:
                gone.append(line)
        if not self._blind:
            for line in gone:
                self._forget(line)
        return standing

    def _stands(self, line: Line, table: Table) -> Entry | None:
        if line.boot != self._boot:
            return None
        entry = table.get(line.mount)
        # Another mount may have got the number.
        if entry is None or entry.root != self._state.place(line.tree):
            return None
        return entry

    def _showing(self, table: Table, tree: int) -> list[Entry]:
        place = self._state.place(tree)
        return table.showing(place) if place else []

    def _check_unmounted(self, record: Record) -> None:
        table = Table.read()
        targets = [
            entry.target if entry else line.target
            for line in self._ledger.lines(record.id)
            if (entry := self._stands(line, table)) or (self._blind and line.boot == self._boot)
        ]
        inside: list[str] = []
        if record.tree_id == record.id:
            targets += [entry.target for entry in self._showing(table, record.id)]
            directory = f"{self._state.real_path}/snapshots/{record.id}"
            inside = [entry.target for entry in table.within(directory)]
        if targets:
            raise FailedPrecondition(
                f"cannot remove {quote(record.info.name)}:"
                f" it is mounted, unmount {enumerated(targets)} first"
            )
        if inside:
            names = [os.path.relpath(target, directory) for target in inside]
            raise FailedPrecondition(
                f"cannot remove {quote(record.info.name)}:"
                f" something is mounted in it on {enumerated(names)}, unmount that first"
            )

    def _recover(self) -> None:
        lines = self._ledger.lines()
        standing = self._standing(lines)
        for line, entry in standing:
            try:
                mounts.restore(entry, read_only=line.read_only)
            except OSError as error:
                log.warning("%s may not be as it was mounted: %s", quote_path(entry.target), error)
        for line in lines:
            if line.boot != self._boot:
                if line.lifetime is Lifetime.CLIENT:
                    self._ledger.forget([line.id])
                else:
                    self._make_again(line)
        # What no mount is on by now, was made for one that is gone.
        with suppress(FileNotFoundError):
            for name in os.listdir(self._own):
                with suppress(OSError):
                    os.rmdir(self._own / name)

    def _make_again(self, line: Line) -> None:
        try:
            if Path(line.target).parent == self._own:
                self._make_own(Path(line.target))
            with (
                mounts.open_target(line.target) as target,
                self._state.open_with_mounts(line.tree) as directory,
            ):
                entry = Table.read().get(linux.mount_id(target.fd))
                place = self._state.place(line.tree)
                if entry and entry.target == target.path and entry.root == place:
                    # The service was killed when it had just made it again.
                    self._ledger.made_again(line.id, self._boot, entry.id)
                    return
                mount = mounts.detached(directory, read_only=line.read_only)
                try:
                    mounts.attach(mount, target.fd)
                    self._ledger.made_again(line.id, self._boot, linux.mount_id(mount))
                finally:
                    os.close(mount)
        except (SnapdError, OSError) as error:
            log.error(
                "%s cannot be mounted on %s again (%s): mend that and restart the service,"
                " or unmount it",
                quote(line.key),
                quote_path(line.target),
                error,
            )


_TRIES = 10
_PAUSE = 0.1
"""How often, and after how many seconds, what a client left is tried to be unmounted."""

_HIDDEN = (
    "what the service mounts would be hidden from the host: its unit has a mount name space of its"
    " own, from a setting such as ProtectSystem=, PrivateTmp= or ReadWritePaths=, remove that"
)

_CHROOT = (
    "what the service mounts cannot be looked up: it runs in a chroot that is no mount point,"
    " start it outside"
)


def _is_read_only(record: Record, read_only: bool | None) -> bool:
    return record.info.kind is Kind.VIEW or bool(read_only)


def _thaw(entries: Sequence[Entry]) -> None:
    for entry in entries:
        try:
            mounts.make_read_only(entry, read_only=False)
        except OSError as error:
            log.warning("%s stays read-only: %s", quote_path(entry.target), error)
