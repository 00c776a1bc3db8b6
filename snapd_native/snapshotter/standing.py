"""What of the ledger stands in the kernel's table, and brings the two together."""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from snapd_native import linux, mounts
from snapd_native.errors import InvalidArgument, NotFound, SnapdError
from snapd_native.metastore import Ledger, Line
from snapd_native.model import Finding, Lifetime, Trouble, quote, quote_path
from snapd_native.mounts import Entry, Table
from snapd_native.snapshotter.state import StateDirectory

log = logging.getLogger(__name__)


class Standing:
    """The ledger beside the kernel's table; only one call at a time may look at both."""

    def __init__(self, state: StateDirectory, ledger: Ledger, own: Path) -> None:
        """Bring them together.

        What stands is kept, what is gone is forgotten. After a restart of the machine, persistent
        mounts are made again; one that cannot be stays in the ledger for the next time. In ``own``
        are the directories that are made for mounts.
        """
        self._state = state
        self._ledger = ledger
        self.own = own
        self.boot = linux.boot_id()
        self.blind = ""
        """Why the table says nothing of what the host has mounted; empty if it does."""
        if mounts.hidden_from_host():
            self.blind = _HIDDEN
        elif state.place(0) is None:
            self.blind = _CHROOT
        if self.blind:
            log.warning("%s", self.blind)
        # A Commit that was going on when the service ended has left its mounts read-only.
        self.mend(thaw=True)

    def of(self, lines: Sequence[Line]) -> list[tuple[Line, Entry]]:
        """Return what still stands, and forget what is gone."""
        if not lines:
            return []
        table = Table.read()
        standing, gone = [], []
        for line in lines:
            entry = self.entry(line, table)
            if entry is not None:
                standing.append((line, entry))
            elif line.boot == self.boot:
                gone.append(line)
        if not self.blind:
            for line in gone:
                self.forget(line)
        return standing

    def entry(self, line: Line, table: Table) -> Entry | None:
        """Return what stands of a mount; None if it is gone."""
        if line.boot != self.boot:
            return None
        entry = table.get(line.mount)
        # Another mount may have got the number.
        if entry is None or entry.root != self._state.place(line.tree):
            return None
        return entry

    def find(self, target: str) -> tuple[Line, Entry | None]:
        """Return what was mounted on ``target``; without an entry if it could not be made again."""
        if not target.startswith("/"):
            raise InvalidArgument(
                f"the target {quote_path(target)} is relative: give its whole path"
            )
        # POSIX lets two slashes at the beginning mean something; Linux does not.
        path = "/" + posixpath.normpath(target).lstrip("/")
        lines = self._ledger.lines()
        for line, entry in self.of(lines):
            if entry.target == path:
                return line, entry
        for line in lines:
            if line.boot != self.boot and line.target == path:
                return line, None
        raise NotFound(
            f"no snapshot is mounted on {quote_path(target)}: see which mounts there are"
        )

    def showing(self, table: Table, tree: int) -> list[Entry]:
        """Return all mounts of a tree, the service's and anybody's."""
        place = self._state.place(tree)
        return table.showing(place) if place else []

    def forget(self, line: Line) -> None:
        """Strike out what is gone, and remove the directory that was made for it."""
        self._ledger.forget([line.id])
        if Path(line.target).parent == self.own:
            with suppress(OSError):
                os.rmdir(line.target)

    def findings(self) -> Sequence[Finding]:
        """Return where the ledger and the kernel's table differ, but for what is unmounted."""
        if self.blind:
            return [Finding(Trouble.MOUNT, "", self.blind)]
        found = []
        table = Table.read()
        standing = {line: self.entry(line, table) for line in self._ledger.lines()}
        for line, entry in standing.items():
            on = quote_path(line.target)
            if line.boot != self.boot:
                what = f"it is not mounted on {on} since the machine was started"
                found.append((line.key, f"{what}: call Repair, or unmount it"))
            elif entry and line.read_only and not entry.read_only:
                found.append((line.key, f"it is writable on {on}: call Repair"))
        known = {entry.id for entry in standing.values() if entry}
        found += [
            ("", f"{quote_path(entry.target)} is mounted, but not known: unmount it by hand")
            for entry in table.within(str(self.own))
            if entry.id not in known and entry.target != str(self.own)
        ]
        return [Finding(Trouble.MOUNT, key, what) for key, what in found]

    def make_own(self, path: Path) -> None:
        """Make a directory for a mount without a target."""
        for directory in (self.own.parent, self.own, path):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def mend(self, frozen: Collection[int] = (), *, thaw: bool = False) -> None:
        """Make what stands what the ledger says, and again what stood before a restart.

        Mounts of trees that are ``frozen`` are left alone: they are being committed. What else is
        read-only stays so, unless it is to ``thaw``: a person has made it so.
        """
        if self.blind:
            return
        lines = [line for line in self._ledger.lines() if line.tree not in frozen]
        for line, entry in self.of(lines):
            try:
                kept = entry.read_only and not thaw
                mounts.restore(entry, read_only=line.read_only or kept)
            except OSError as error:
                log.warning("%s may not be as it was mounted: %s", quote_path(entry.target), error)
        for line in lines:
            if line.boot != self.boot:
                if line.lifetime is Lifetime.CLIENT:
                    self._ledger.forget([line.id])
                else:
                    self._make_again(line)
        # What no mount is on by now, was made for one that is gone.
        with suppress(FileNotFoundError):
            for name in os.listdir(self.own):
                with suppress(OSError):
                    os.rmdir(self.own / name)

    def _make_again(self, line: Line) -> None:
        try:
            if Path(line.target).parent == self.own:
                self.make_own(Path(line.target))
            with (
                mounts.open_target(line.target) as target,
                self._state.open_with_mounts(line.tree) as directory,
            ):
                entry = Table.read().get(linux.mount_id(target.fd))
                place = self._state.place(line.tree)
                if entry and entry.target == target.path and entry.root == place:
                    # The service was killed when it had just made it again.
                    self._ledger.made_again(line.id, self.boot, entry.id)
                    return
                mount = mounts.detached(directory, read_only=line.read_only)
                try:
                    mounts.attach(mount, target.fd)
                    self._ledger.made_again(line.id, self.boot, linux.mount_id(mount))
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


_HIDDEN = (
    "what the service mounts would be hidden from the host: its unit has a mount name space of its"
    " own, from a setting such as ProtectSystem=, PrivateTmp= or ReadWritePaths=, remove that"
)

_CHROOT = (
    "what the service mounts cannot be looked up: it runs in a chroot that is no mount point,"
    " start it outside"
)


def thaw(entries: Sequence[Entry]) -> None:
    """Make mounts writable again that were for a moment not, wherever they are by now."""
    table = Table.read()
    for entry in entries:
        now = table.get(entry.id)
        if now is None or now.root != entry.root or not now.read_only:
            continue
        try:
            mounts.make_read_only(now, read_only=False)
        except OSError as error:
            log.warning("%s stays read-only: %s", quote_path(now.target), error)
