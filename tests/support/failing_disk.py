"""Disks that fail on demand, and can be repaired: loop devices on a full tmpfs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapd_native import linux
from tests.support.file_systems import is_free, shut_down, unmount, unmount_when_free
from tests.support.waiting import wait_until

_SIZES = {"ext4": 128 << 20, "xfs": 320 << 20}
_LARGE_ENOUGH = 512 << 20
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=0"),
}

KINDS = ("ext4 without its journal", "ext4", "xfs")
"""The kinds of failing disks. On all but the first, the journal can be written after a failure."""


@dataclass(frozen=True)
class FailingDisk:
    """A mounted file system on a disk. After `fail`, only allocated blocks can be written."""

    kind: str
    root: Path
    device: str
    backing: Path

    @property
    def writable_after_heal(self) -> bool:
        """Whether the file system can be written to after `heal`, without a new mount."""
        return self.kind != KINDS[0]

    def sync(self) -> None:
        """Write all changes to their final blocks, and not only to the journal."""
        fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            linux.syncfs(fd)
        finally:
            os.close(fd)

    def trim(self) -> None:
        """Discard the free blocks, so that they cannot be written after `fail`."""
        self.sync()
        _run("fstrim", str(self.root))

    def fail(self) -> None:
        """Let all writes to new blocks fail from now on."""
        # A remount fails if the tmpfs has grown since its usage was read.
        wait_until(self._is_full)

    def _is_full(self) -> bool:
        room = os.statvfs(self.backing)
        with suppress(subprocess.CalledProcessError):
            self._resize((room.f_blocks - room.f_bfree) * room.f_frsize)
        return not os.statvfs(self.backing).f_bfree

    def heal(self) -> None:
        """Let all writes succeed again."""
        self._resize(_LARGE_ENOUGH)

    def shut_down(self) -> None:
        """Shut the file system down, as after a fatal error."""
        shut_down(self.root)

    def mount_again(self, *, heal: bool = False) -> None:
        """Mount the file system again, as after a restart; with ``heal`` repair the disk first."""
        unmount_when_free(self.root)
        # Workers that have not ended yet hold clones of the mount.
        wait_until(lambda: is_free(self.device))
        if heal:
            self.heal()
        if self.kind != "xfs":
            # e2fsck repairs some damage only with -y.
            done = _e2fsck("-p", self.device)
            if done.returncode & 4:
                done = _e2fsck("-fy", self.device)
            # The status 1 means that e2fsck has repaired something.
            assert done.returncode in (0, 1), done.stdout
        self.mount()

    def mount(self) -> None:
        """Mount the file system. ext4 must not write zeros in place of unwritten extents."""
        _run("mount", "--make-private", self.device, str(self.root))
        if self.kind != "xfs":
            settings = Path("/sys/fs/ext4") / Path(self.device).name
            (settings / "extent_max_zeroout_kb").write_text("0")

    def _resize(self, size: int) -> None:
        _run("mount", "-o", f"remount,size={size}", str(self.backing))


@contextmanager
def failing_disk(kind: str, directory: Path) -> Iterator[FailingDisk]:
    """Yield a disk, or skip the test if this machine cannot provide one."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    name = kind.split()[0]
    with ExitStack() as stack:
        backing = Path(tempfile.mkdtemp(prefix="tmpfs", dir=directory))
        stack.callback(backing.rmdir)
        options = f"size={_LARGE_ENOUGH}"
        _run("mount", "-t", "tmpfs", "-o", options, "--make-private", "tmpfs", str(backing))
        stack.callback(unmount, backing)
        image = backing / "image"
        image.touch()
        os.truncate(image, _SIZES[name])
        _run(*_MKFS[name], str(image))
        if kind == "ext4":
            _run("fallocate", "--length", str(_SIZES[name]), str(image))
        device = _run("losetup", "--find", "--show", str(image))
        stack.callback(_run, "losetup", "--detach", device)
        stack.enter_context(_limit_requests_to_one_page(device))
        root = Path(tempfile.mkdtemp(prefix=name, dir=directory))
        stack.callback(root.rmdir)
        disk = FailingDisk(kind, root, device, backing)
        disk.mount()
        stack.callback(unmount, root)
        stack.callback(disk.heal)
        # Used blocks are not discarded, such as the journal and the tables of inodes.
        disk.trim()
        yield disk


@contextmanager
def _limit_requests_to_one_page(device: str) -> Iterator[None]:
    """Limit each request to a loop device to one page.

    A tmpfs that becomes full during a write has written only a part of the data. The loop driver
    reports the whole write as successful. So the disk would lose data without an error.
    """
    limit = Path("/sys/block") / Path(device).name / "queue" / "max_sectors_kb"
    before = limit.read_text()
    limit.write_text(str(os.sysconf("SC_PAGE_SIZE") >> 10))
    try:
        yield
    finally:
        # Otherwise the next user of the device would get this limit.
        limit.write_text(before)


def _e2fsck(option: str, device: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["e2fsck", option, device], check=False, capture_output=True)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"a disk that fails needs {command[0]}, which is not installed")
    return done.stdout.strip()
