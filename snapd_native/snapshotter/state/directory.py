"""The state directory and its contents."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from snapd_native import linux, trees
from snapd_native.errors import DataLoss, FailedPrecondition, Unavailable
from snapd_native.metastore import Metastore
from snapd_native.model import Change, Finding, Trouble, Usage, quote, quote_path
from snapd_native.mounts import Place, Table
from snapd_native.snapshotter.state.ballast import Ballast
from snapd_native.snapshotter.state.privacy import (
    check_not_shared,
    lock,
    make_private,
    open_to_others,
    own_directory,
    refuse_nfs,
)

log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STANDBY = re.compile(r"(making|ready)-([1-9][0-9]{0,18})-([1-9][0-9]{0,18})", re.ASCII)
_OURS = re.compile(r"(new-|rm-|found-)?([1-9][0-9]{0,18})", re.ASCII)


class StateDirectory:
    """The state of one service: ``metadata.db``, and ``snapshots/`` with a directory a snapshot.

    The directory of a snapshot is named by its id: ``new-<id>`` while it is made, ``<id>`` while
    the snapshot exists, ``rm-<id>`` while it is deleted, ``found-<id>`` if its record was lost. The
    directory of a standby clone is ``making-<parent>-<number>`` until it is complete, and
    ``ready-<parent>-<number>`` then.
    """

    def __init__(self, path: Path) -> None:
        """Open the directory, or create it, and lock it for this process.

        Raises:
            Unavailable: another process uses it.
            FailedPrecondition: another user owns it, it is not a directory, or it is on NFS.
        """
        self.path = path
        with ExitStack() as undo:
            self._fd = own_directory(path)
            undo.callback(os.close, self._fd)
            refuse_nfs(path, self._fd)
            check_not_shared(path, self._fd, {"snapshots", "metadata.db"})
            make_private(self._fd)
            try:
                lock(self._fd)
            except BlockingIOError:
                raise Unavailable(
                    f"{path} is in use by another snapd-native daemon: stop that one,"
                    " or choose another --state-directory"
                ) from None
            self.ballast = Ballast(self._fd)
            undo.callback(self.ballast.take)
            self._snapshots = own_directory(path / "snapshots")
            undo.callback(os.close, self._snapshots)
            refuse_nfs(path / "snapshots", self._snapshots)
            make_private(self._snapshots)
            os.fsync(self._fd)
            self.mounting = linux.mounting_id(self._snapshots)
            self._place = Table.read().place(self._snapshots)
            self.filesystem_type = linux.filesystem_type(self._snapshots)
            self.reflink = False
            """See `try_reflink`."""
            self.seals = False
            """See `try_sealing`."""
            undo.pop_all()

    def close(self) -> None:
        """Unlock the directory. The ballast takes the space that the database has just freed."""
        self.ballast.take()
        for fd in (self._snapshots, self._fd):
            os.close(fd)

    def open_store(self, announce: Callable[[Change], None]) -> Metastore:
        """Open the metastore, and remove snapshots that a power cut may have left incomplete.

        Raises:
            Unavailable: another process has the database open.
            FailedPrecondition: the database is not a file.
            DataLoss: it is damaged, gone, or was made by a newer version.
            ResourceExhausted: the disk is full.
        """
        path = self.path / "metadata.db"
        there = self.ids()
        if there and _is_empty(path):
            raise DataLoss(
                f"{path} is gone, but its snapshots are there:"
                " restore it from a backup, or move the snapshots away"
            )
        ours = filter(None, map(_OURS.fullmatch, self._names()))
        store = Metastore(
            path,
            announce,
            # The id of a directory that could not be deleted is not used again.
            first_id=max((int(match[2]) for match in ours), default=0) + 1,
            make_room=self.ballast.drop,
            may_be_new=not there,
        )
        try:
            for name in store.forget_unsettled(self.mounting):
                log.warning(
                    "%s is gone: it was prepared just before a power cut or a disk's failure",
                    quote(name),
                )
            if missing := len(store.directories().keys() - there):
                log.error("%d snapshots have lost their directories", missing)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def real_path(self) -> str:
        """The path of the directory, as the kernel writes it."""
        return os.readlink(f"/proc/self/fd/{self._fd}")

    def try_reflink(self) -> None:
        """Find out whether reflink works, by means of two temporary files."""
        self.reflink = trees.reflink_works(self._snapshots)

    def try_sealing(self) -> None:
        """Find out whether Commit can seal trees, by means of a temporary file.

        Raises:
            FailedPrecondition: the kernel does not permit that.
        """
        try:
            self.seals = trees.sealing_works(self._snapshots)
        except PermissionError:
            raise FailedPrecondition(
                "the kernel does not permit to make files immutable: run the service on the host,"
                " or give its container the capabilities CAP_LINUX_IMMUTABLE and CAP_LEASE"
            ) from None
        if not self.seals:
            log.warning(
                "%s lacks inode flags or leases: Commit cannot make trees immutable",
                self.filesystem_type,
            )

    @property
    def device(self) -> int:
        """The device of the file system, as in ``st_dev`` of stat(3type)."""
        return os.fstat(self._snapshots).st_dev

    def place(self, id_: int) -> Place | None:
        """Return the place of a snapshot's directory in the table of mounts; None if unknown."""
        return self._place / str(id_) if self._place else None

    def source(self, id_: int) -> str:
        """Return the path of a snapshot's directory."""
        return str(self.path / "snapshots" / str(id_))

    def check_exists(self, id_: int) -> None:
        """Check that the directory of a snapshot exists.

        Raises:
            DataLoss: it does not.
        """
        if not stat.S_ISDIR(self._mode(str(id_))):
            raise _lost()

    def create(self, id_: int) -> str:
        """Create the directory of a new snapshot under its first name; return that."""
        name = f"new-{id_}"
        os.mkdir(name, 0o700, dir_fd=self._snapshots)
        os.chmod(name, 0o755, dir_fd=self._snapshots)  # noqa: S103 - the contract's mode
        return name

    def complete(self, id_: int) -> None:
        """Rename the directory of `create` to its final name."""
        self._rename(f"new-{id_}", str(id_))

    def create_empty(self, id_: int, *, sealed: bool = False) -> None:
        """Create an empty directory for a new snapshot under its final name, on disk."""
        self.create(id_)
        self.complete(id_)
        if sealed:
            fd = os.open(str(id_), _DIRECTORY, dir_fd=self._snapshots)
            try:
                trees.seal(fd)
            finally:
                os.close(fd)
        # A journal that contains the rename also contains the directory and its mode.
        os.fsync(self._snapshots)

    def sync(self) -> None:
        """Write everything on the file system of the state to the disk.

        Raises:
            OSError: a write has failed now or since the last call. The kernel reports that once
                for each time that the directory was opened; see `WriteBack`.
        """
        linux.syncfs(self._snapshots)

    def has_room(self, least: float, more: Usage) -> bool:
        """Tell whether the share ``least`` of space and inodes stays free after using ``more``."""
        room = os.fstatvfs(self._snapshots)
        blocks = room.f_bavail - more.size / room.f_frsize
        inodes = room.f_favail - more.inodes
        # Where inodes are made as they are needed, there is no number of them.
        return blocks >= least * room.f_blocks and (
            not room.f_files or inodes >= least * room.f_files
        )

    def standbys(self) -> Sequence[tuple[str, int, int, bool]]:
        """Return all standby clones: directory, id of the parent, number, completeness."""
        matches = map(_STANDBY.fullmatch, self._names())
        return [(m[0], int(m[2]), int(m[3]), m[1] == "ready") for m in matches if m]

    def create_standby(self, parent: int, number: int) -> str:
        """Create the empty directory of an incomplete standby clone; return its name."""
        name = f"making-{parent}-{number}"
        os.mkdir(name, 0o700, dir_fd=self._snapshots)
        return name

    def complete_standby(self, name: str) -> str:
        """Rename a standby clone that is on disk to a complete one; return the new name."""
        complete = "ready" + name.removeprefix("making")
        os.rename(name, complete, src_dir_fd=self._snapshots, dst_dir_fd=self._snapshots)
        return complete

    def adopt_standby(self, name: str, id_: int) -> bool:
        """Turn a complete standby clone into the tree of a snapshot, on disk.

        Return False if it is gone, or has another quota project than a new directory.
        """
        try:
            os.rename(name, str(id_), src_dir_fd=self._snapshots, dst_dir_fd=self._snapshots)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EXDEV):
                raise
            return False
        os.fsync(self._snapshots)
        return True

    def drop_standby(self, name: str, report: trees.Report) -> None:
        """Rename a standby clone to an incomplete one, and delete it."""
        doomed = "making" + name.removeprefix("making").removeprefix("ready")
        with suppress(FileNotFoundError):
            self._rename(name, doomed)
        self.delete(doomed, report)

    @contextmanager
    def open(self, name: str, *, writable: bool = False) -> Iterator[int]:
        """Open the tree of a snapshot; see `trees.open_tree`.

        Raises:
            DataLoss: it does not exist.
        """
        with ExitStack() as stack:
            with _lost_if_gone():
                fd = stack.enter_context(trees.open_tree(self._snapshots, name, writable=writable))
            yield fd

    @contextmanager
    def open_with_mounts(self, id_: int) -> Iterator[int]:
        """Open the directory of a snapshot with the mounts inside, only to mount it.

        Raises:
            DataLoss: it does not exist.
            FailedPrecondition: something is mounted on it.
        """
        rules = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            with _lost_if_gone():
                fd = linux.openat2(self._snapshots, str(id_), flags, rules)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise FailedPrecondition(
                    "something else is mounted on the snapshot's directory: unmount that"
                ) from None
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    def is_sealed(self, id_: int) -> bool | None:
        """Tell whether the root of a tree is immutable; None if the tree is gone."""
        try:
            fd = os.open(str(id_), os.O_PATH | _DIRECTORY, dir_fd=self._snapshots)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return linux.is_immutable(fd)
        finally:
            os.close(fd)

    def retire(self, id_: int) -> str | None:
        """Rename the directory of a snapshot for its deletion; return None if there is none."""
        name = f"rm-{id_}"
        try:
            self._rename(str(id_), name)
        except FileNotFoundError:
            return None
        return name

    def delete(self, name: str, report: trees.Report) -> None:
        """Delete a directory and everything below it; see `trees.delete`."""
        with suppress(FileNotFoundError):
            trees.delete(self._snapshots, name, report)

    def discard(self, id_: int) -> None:
        """Delete the directory of `create`, under its first or its final name."""
        # While it is called `new-<id>`, a directory with the final name belongs to another program.
        making = f"new-{id_}"
        self.delete(making if self._mode(making) else str(id_), lambda *_: None)

    def set_aside(self, id_: int) -> str:
        """Rename a directory, on disk, so that it is never deleted; return its new name."""
        name = f"found-{id_}"
        self._rename(str(id_), name)
        os.fsync(self._snapshots)
        return name

    def undo_set_aside(self, id_: int) -> None:
        """Undo `set_aside`."""
        self._rename(f"found-{id_}", str(id_))

    def ids(self) -> set[int]:
        """Return the ids of the snapshots that have a directory under its final name."""
        return {id_ for _, prefix, id_ in self.listing() if not prefix}

    def listing(self) -> Sequence[tuple[str, str, int]]:
        """Return the directories of all snapshots: name, prefix such as ``rm-`` or empty, id.

        Directories that are not the service's are left out, and so never changed.
        """
        matches = map(_OURS.fullmatch, self._names())
        return [
            (found[0], found[1] or "", int(found[2]))
            for found in matches
            if found and stat.S_ISDIR(self._mode(found[0]))
        ]

    def findings(self) -> Iterator[Finding]:
        """Yield what other users can access, and what in ``snapshots`` is not the service's."""
        for name, _, found in open_to_others(self._fd, self._snapshots):
            path = quote_path(os.path.normpath(self.path / name))
            remedy = "call Repair" if _is_plain(found) else "it is no file, move it away"
            yield Finding(Trouble.MODE, "", f"others may reach {path}: {remedy}")
        for name in self._names():
            ours = _OURS.fullmatch(name) or _STANDBY.fullmatch(name)
            mode = self._mode(name)
            if mode and not (ours and stat.S_ISDIR(mode)):
                what = f"{quote_path(name)} is not the service's: move it out of snapshots/"
                yield Finding(Trouble.FOREIGN, "", what)

    def close_to_others(self) -> None:
        """Deny all other users the files of the service."""
        for _, path, found in open_to_others(self._fd, self._snapshots):
            # If this fails, the next check reports the same finding.
            with suppress(OSError):
                if _is_plain(found):
                    os.chown(path, os.geteuid(), -1)
                    os.chmod(path, found.st_mode & 0o700)

    def _rename(self, old: str, new: str) -> None:
        """Rename a directory, also one that is sealed or in another quota project."""
        try:
            os.rename(old, new, src_dir_fd=self._snapshots, dst_dir_fd=self._snapshots)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM):
                raise
            fd = os.open(old, _DIRECTORY, dir_fd=self._snapshots)
            try:
                if error.errno == errno.EXDEV:
                    linux.join_project(fd, self._snapshots)
                    os.rename(old, new, src_dir_fd=self._snapshots, dst_dir_fd=self._snapshots)
                    return
                if not trees.unseal(fd):
                    raise
                try:
                    self._rename(old, new)
                finally:
                    if not new.startswith("rm-"):
                        trees.seal(fd)
            finally:
                os.close(fd)

    def _names(self) -> list[str]:
        # With a descriptor of its own: threads that share one share the position in the directory.
        fd = os.open(".", _DIRECTORY, dir_fd=self._snapshots)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def _mode(self, name: str) -> int:
        """Return the type and mode of an entry of ``snapshots``; 0 if there is none."""
        try:
            return os.stat(name, dir_fd=self._snapshots, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return 0


def _is_empty(path: Path) -> bool:
    """Tell whether a file does not exist or is empty."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return True
    return found.st_size == 0 and stat.S_ISREG(found.st_mode)


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)


@contextmanager
def _lost_if_gone() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise _lost() from None
        raise


def _lost() -> DataLoss:
    return DataLoss("the snapshot's directory is gone, restore it from a backup")
