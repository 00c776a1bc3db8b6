"""Compare the ledger with the kernel's table of mounts, and make the two agree."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Lock

from snapd_native import linux, mounts
from snapd_native.errors import InvalidArgument, NotFound, SnapdError
from snapd_native.metastore import Ledger, Line
from snapd_native.model import Finding, Lifetime, Trouble, quote, quote_path
from snapd_native.mounts import Entry, Place, Table, Target
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class Reconciler:
    """Compares the ledger with the kernel's table of mounts; ``lock`` guards both."""

    def __init__(self, state: StateDirectory, ledger: Ledger, own: Path, boot: str) -> None:
        """Make the two agree.

        After a restart of the machine, persistent mounts are made again. One that fails stays in
        the ledger for the next start. ``own`` contains the directories that the service creates
        for mounts. For ``boot`` see `linux.boot`.
        """
        self._state = state
        self._ledger = ledger
        self.lock = Lock()
        """Never held during calls on file systems that may not answer; see `bounded`."""
        self._opened: set[tuple[int, Place]] = set()
        """The mounts that have their `turn`. The kernel can give an id to another mount later."""
        self._leaving: Counter[int] = Counter()
        """The mounts that are being unmounted, by the id of their record. A new record can get the
        id of a deleted one before the Unmount that has deleted that has ended."""
        self._closed = Condition(self.lock)
        self.own = own
        self.boot = boot
        self.blind = ""
        """Why the table does not show the mounts of the host; empty if it does."""
        if mounts.hidden_from_host():
            self.blind = _HIDDEN
        elif state.place(0) is None:
            self.blind = _CHROOT
        if self.blind:
            log.warning("%s", self.blind)
        # A Commit that was interrupted by the end of the service has left mounts read-only.
        self.repair(starting=True)

    def existing(self, lines: Sequence[Line]) -> list[tuple[Line, Entry]]:
        """Return the records whose mounts exist, each with its entry in the table."""
        if not lines:
            return []
        table = Table.read()
        return [(line, entry) for line in lines if (entry := self.entry(line, table))]

    def absent(self, lines: Sequence[Line]) -> list[Line]:
        """Return the records of persistent mounts that others have unmounted.

        systemd unmounts them when the machine shuts down, before or after it stops the service.
        """
        if self.blind:
            return [line for line in lines if line.boot != self.boot]
        mounted = {line.id for line, _ in self.existing(lines)}
        return [
            line
            for line in lines
            if line.id not in mounted
            and not self._leaving[line.id]
            and line.lifetime is Lifetime.PERSISTENT
        ]

    def entry(self, line: Line, table: Table) -> Entry | None:
        """Return the entry of a mount in the table; None if the mount is gone."""
        if line.boot != self.boot:
            return None
        entry = table.get(line.mount)
        # The kernel can have given the id to another mount.
        if entry is None or entry.root != self._state.place(line.tree):
            return None
        return entry

    def find(self, target: str) -> tuple[Line, Entry | None]:
        """Return the record of the mount on ``target``; without an entry if it is `absent`."""
        if not target.startswith("/"):
            raise InvalidArgument(
                f"the target {quote_path(target)} is relative: give its whole path"
            )
        path = mounts.plain(target)
        lines = self._ledger.lines()
        for line, entry in self.existing(lines):
            if entry.target == path:
                return line, entry
        for line in self.absent(lines):
            if line.target == path:
                return line, None
        raise NotFound(
            f"no snapshot is mounted on {quote_path(target)}: see which mounts there are"
        )

    @contextmanager
    def turn(self, entry: Entry, leaving: Line | None = None) -> Iterator[None]:
        """Let no other call open a mount during the block: an open mount cannot be unmounted.

        ``leaving`` is the record of the mount, if the block unmounts it.
        """
        mount = (entry.id, entry.root)
        with self.lock:
            self._closed.wait_for(lambda: mount not in self._opened)
            self._opened.add(mount)
            if leaving:
                self._leaving[leaving.id] += 1
        try:
            yield
        finally:
            with self.lock:
                self._opened.remove(mount)
                if leaving:
                    self._leaving -= Counter([leaving.id])
                self._closed.notify_all()

    def showing(self, table: Table, tree: int) -> list[Entry]:
        """Return all mounts of a tree, also those of others."""
        place = self._state.place(tree)
        return table.showing(place) if place else []

    def forget(self, line: Line) -> None:
        """Delete the record of a mount that is gone, and the directory that was created for it."""
        self._ledger.forget([line.id])
        if Path(line.target).parent == self.own:
            with suppress(OSError):
                os.rmdir(line.target)

    def findings(self) -> Sequence[Finding]:
        """Return the differences between the ledger and the kernel's table."""
        if self.blind:
            return [Finding(Trouble.MOUNT, "", self.blind)]
        found = []
        table = Table.read()
        lines = self._ledger.lines()
        mounted = {line: self.entry(line, table) for line in lines}
        for line in self.absent(lines):
            what = f"it is not mounted on {quote_path(line.target)} any more"
            found.append((line.key, f"{what}: call Repair, or unmount it"))
        for line, entry in mounted.items():
            if entry and line.read_only and not entry.read_only:
                on = quote_path(line.target)
                found.append((line.key, f"it is writable on {on}: call Repair"))
        known = {entry.id for entry in mounted.values() if entry}
        found += [
            ("", f"{quote_path(entry.target)} is mounted, but not known: unmount it by hand")
            for entry in table.within(str(self.own))
            if entry.id not in known and entry.target != str(self.own)
        ]
        return [Finding(Trouble.MOUNT, key, what) for key, what in found]

    def make_own(self, path: Path) -> None:
        """Create the directory for a mount without a target."""
        for directory in (self.own.parent, self.own, path):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def repair(self, frozen: Collection[int] = (), *, starting: bool = False) -> None:
        """Make the mounts as the ledger records them, and those again that are `absent`.

        The mounts of ``frozen`` trees, which are being committed, are not changed. Other read-only
        mounts stay read-only, because a person has made them so; only a start of the service makes
        them writable. A start also deletes the records of mounts that are absent since this boot:
        they were unmounted while the service was down, or its end has interrupted Mount or
        Unmount. A mount that is correct is not opened, because its file system may not answer.
        """
        if self.blind:
            return
        with self.lock:
            lines = [line for line in self._ledger.lines() if line.tree not in frozen]
            for line in lines:
                if line.boot != self.boot and line.lifetime is Lifetime.CLIENT:
                    self._ledger.forget([line.id])
            mounted, absent = self.existing(lines), self.absent(lines)
            if starting:
                for line in absent:
                    if line.boot == self.boot:
                        self.forget(line)
        for line, entry in mounted:
            read_only = line.read_only or (entry.read_only and not starting)
            if entry.read_only == read_only and not entry.propagates:
                continue
            try:
                with self.turn(entry):
                    mounts.restore(entry, read_only=read_only)
            except OSError as error:
                if Table.read().get(entry.id):
                    target, why = quote_path(entry.target), error.strerror
                    log.warning("%s may not be as it was mounted: %s", target, why)
        for line in absent:
            self._recreate(line, frozen)
        with self.lock, suppress(FileNotFoundError):
            # A directory without a mount is left over from one that is gone.
            for name in os.listdir(self.own):
                with suppress(OSError):
                    os.rmdir(self.own / name)

    def _recreate(self, line: Line, frozen: Collection[int]) -> None:
        """Make a mount again if it is still `absent` and its tree is not ``frozen``."""
        try:
            if Path(line.target).parent == self.own:
                self.make_own(Path(line.target))
            with mounts.open_target(line.target, line.uid) as target, self.lock:
                absent = self.absent(self._ledger.lines())
                if line in absent and line.tree not in frozen:
                    self._attach_again(line, target)
        except (SnapdError, OSError) as error:
            log.error(
                "%s cannot be mounted on %s again (%s): correct that and restart the service,"
                " or unmount it",
                quote(line.key),
                quote_path(line.target),
                error,
            )

    def _attach_again(self, line: Line, target: Target) -> None:
        entry = Table.read().get(linux.mount_id(target.fd))
        place = self._state.place(line.tree)
        if entry and entry.target == target.path and entry.root == place:
            # The service was killed after it had attached the mount.
            self._ledger.recreated(line.id, self.boot, entry.id)
            return
        with self._state.open_with_mounts(line.tree) as directory:
            mount = mounts.detached(directory, read_only=line.read_only)
        try:
            mounts.attach(mount, target.fd)
            self._ledger.recreated(line.id, self.boot, linux.mount_id(mount))
        finally:
            os.close(mount)


_HIDDEN = (
    "what the service mounts would be hidden from the host: its unit has a mount namespace of its"
    " own, from a setting such as ProtectSystem=, PrivateTmp= or ReadWritePaths=, remove that"
)

_CHROOT = (
    "what the service mounts cannot be looked up: it runs in a chroot that is no mount point,"
    " start it outside"
)
