"""Disks that fail when they are told to, and can be healed: loop devices on a full tmpfs."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapd_native import linux
from tests.support.file_systems import unmount, unmount_when_free
from tests.support.waiting import eventually

_SIZES = {"ext4": 128 << 20, "xfs": 320 << 20}
_ENOUGH = 512 << 20
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=0"),
}

KINDS = ("ext4 without its journal", "ext4", "xfs")
"""What is left when a disk fails: the journal, with which a file system lives on, or not."""


@dataclass(frozen=True)
class FailingDisk:
    """A mounted file system whose disk takes what it has taken before, until it fails."""

    kind: str
    root: Path
    device: str
    backing: Path

    @property
    def lives_on(self) -> bool:
        """Whether the file system can be written to after its disk was healed."""
        return self.kind != KINDS[0]

    def sync(self) -> None:
        """Put everything where it belongs, and not only into the journal."""
        fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            linux.syncfs(fd)
        finally:
            os.close(fd)

    def trim(self) -> None:
        """Have the disk forget what is in free blocks, so that it would not take it again."""
        self.sync()
        _run("fstrim", str(self.root))

    def fail(self) -> None:
        """From now on whatever is written to a block for the first time is lost."""
        # Until it holds more by the time it is told.
        eventually(self._is_full)

    def _is_full(self) -> bool:
        room = os.statvfs(self.backing)
        with suppress(subprocess.CalledProcessError):
            self._resize((room.f_blocks - room.f_bfree) * room.f_frsize)
        return not os.statvfs(self.backing).f_bfree

    def heal(self) -> None:
        """Take everything again."""
        self._resize(_ENOUGH)

    def shut_down(self) -> None:
        """Have the file system fail everything, as after an error that it cannot bear."""
        fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # FS_IOC_SHUTDOWN with FSOP_GOING_FLAGS_NOLOGFLUSH
            fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 2))
        finally:
            os.close(fd)

    def mount_again(self, *, heal: bool = False) -> None:
        """Mount what is on the disk, as after a restart of the machine, which may ``heal`` it."""
        unmount_when_free(self.root)
        # Workers that have not seen the end yet keep what was cut off by clones of its mount.
        eventually(self._is_free)
        if heal:
            self.heal()
        if self.kind != "xfs":
            # Some damage it mends only when a person has asked for it, as by -y.
            done = _e2fsck("-p", self.device)
            if done.returncode & 4:
                done = _e2fsck("-fy", self.device)
            # It returns 1 for what it has mended.
            assert done.returncode in (0, 1), done.stdout
        self.mount()

    def mount(self) -> None:
        """Mount it, with nothing written to blocks but what is in their files."""
        _run("mount", "--make-private", self.device, str(self.root))
        if self.kind != "xfs":
            settings = Path("/sys/fs/ext4") / Path(self.device).name
            (settings / "extent_max_zeroout_kb").write_text("0")

    def _resize(self, size: int) -> None:
        _run("mount", "-o", f"remount,size={size}", str(self.backing))

    def _is_free(self) -> bool:
        try:
            os.close(os.open(self.device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError:
            return False
        return True


@contextmanager
def failing_disk(kind: str, directory: Path) -> Iterator[FailingDisk]:
    """Make one; skip the test if none can be made here."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    name = kind.split()[0]
    with ExitStack() as stack:
        backing = Path(tempfile.mkdtemp(prefix="tmpfs", dir=directory))
        stack.callback(backing.rmdir)
        options = f"size={_ENOUGH}"
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
        stack.enter_context(_page_by_page(device))
        root = Path(tempfile.mkdtemp(prefix=name, dir=directory))
        stack.callback(root.rmdir)
        disk = FailingDisk(kind, root, device, backing)
        disk.mount()
        stack.callback(unmount, root)
        stack.callback(disk.heal)
        # The journal, the tables of inodes and what else is in use stays.
        disk.trim()
        yield disk


@contextmanager
def _page_by_page(device: str) -> Iterator[None]:
    """Have each request to a loop device be one page.

    A tmpfs that gets full within a write has written less, which the loop driver takes for all: the
    disk would lose data and not say so.
    """
    limit = Path("/sys/block") / Path(device).name / "queue" / "max_sectors_kb"
    before = limit.read_text()
    limit.write_text(str(os.sysconf("SC_PAGE_SIZE") >> 10))
    try:
        yield
    finally:
        # The device keeps it for whoever takes it next.
        limit.write_text(before)


def _e2fsck(option: str, device: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["e2fsck", option, device], check=False, capture_output=True)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"a disk that fails needs {command[0]}, which is not installed")
    return done.stdout.strip()
