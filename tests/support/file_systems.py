"""Real file systems on loop devices, made when a test first needs them."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapd_native import trees
from tests.support.waiting import wait_until, wait_until_equal

_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-i", "8192"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "--mixed"),
}


@dataclass(frozen=True)
class FileSystem:
    """A mounted file system for tests."""

    name: str
    root: Path
    reflink: bool


@pytest.fixture(scope="session", autouse=True)
def loop_directory() -> Iterator[Path]:
    """Yield a directory for the images and mounts of all tests; check that none is left at the end.

    The directory is a shared mount, as / is under systemd. So a file system that is unmounted here
    is also unmounted in the mount namespaces of other programs, such as a virtual machine that was
    started during the tests.
    """
    path = Path(tempfile.mkdtemp(prefix="snapd-native-"))
    # If mounts are forbidden, the tests that need file systems are skipped.
    share = ["mount", "--bind", "--make-shared", str(path), str(path)]
    shared = os.geteuid() == 0 and subprocess.run(share, check=False).returncode == 0
    yield path
    assert _mounts_below(path) == [str(path)] * shared
    if shared:
        subprocess.run(["umount", path], check=True)
    path.rmdir()
    # udev can still have a loop device open, and a mount namespace of another test can hold a copy
    # of its mount until that namespace ends.
    wait_until_equal(lambda: _loops_below(path), [])


@contextmanager
def new_file_system(
    name: str, size: int, directory: Path, options: Sequence[str] = (), flags: str = "defaults"
) -> Iterator[FileSystem]:
    """Mount a new file system of ``size`` bytes below ``directory`` for the block.

    If that is impossible, the test is skipped. ``options`` are options of mkfs, and ``flags`` of
    mount. The image is unlinked after the mount, so that an unmount frees its space.
    """
    image, root = _make(name, size, directory, options)
    try:
        command = ["mount", "-o", f"loop,{flags}", "--make-private", str(image), str(root)]
        _run(command, f"mounting {name} on a loop device")
    except BaseException:
        root.rmdir()
        raise
    finally:
        image.unlink()
    try:
        yield FileSystem(name, root, reflink=name == "xfs")
    finally:
        unmount(root)
        root.rmdir()


def _make(name: str, size: int, directory: Path, options: Sequence[str]) -> tuple[Path, Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    descriptor, path = tempfile.mkstemp(prefix=name, suffix=".img", dir=directory)
    try:
        os.truncate(descriptor, size)
    finally:
        os.close(descriptor)
    image = Path(path)
    try:
        _run([*_MKFS[name], *options, path], f"making {name}")
        root = Path(tempfile.mkdtemp(prefix=name, dir=directory))
    except BaseException:
        image.unlink()
        raise
    return image, root


def _run(command: list[str], what: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{what} needs {command[0]}, which is not installed")
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())
        pytest.skip(f"{what} is impossible here: {reason}")


def unmount(root: Path) -> None:
    """Unmount ``root`` and the mounts that a failed test has left inside; lazily if necessary."""
    for extra in ([], ["--lazy"]):
        subprocess.run(["umount", "--recursive", *extra, str(root)], check=False)
        if not _mounts_below(root):
            return


def unmount_when_free(root: Path) -> None:
    """Unmount ``root``, which has no mounts inside; retry while it is busy.

    A Commit in another test examines the files of all processes, and can have a file of this file
    system open for a moment.
    """

    def is_unmounted() -> bool:
        subprocess.run(["umount", str(root)], check=False)
        return not os.path.ismount(root)

    wait_until(is_unmounted)


def shut_down(root: Path) -> None:
    """Shut down a file system, as after a fatal error: its disk cannot be used until an unmount."""
    fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # FS_IOC_SHUTDOWN with FSOP_GOING_FLAGS_NOLOGFLUSH.
        fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 2))
    finally:
        os.close(fd)


def is_free(device: str) -> bool:
    """Return whether no file system on a block device is mounted, in any mount namespace."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _mounts_below(path: Path) -> list[str]:
    points = (
        line.split(b" ")[4].decode("unicode_escape")
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines()
    )
    return [point for point in points if Path(point).is_relative_to(path)]


def _loops_below(path: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            image = backing.read_text().strip()
        except OSError:
            continue  # The device was detached after it was listed.
        if Path(image).is_relative_to(path):
            found.append(f"{backing.parts[3]}: {image}")
    return found


@pytest.fixture(scope="session")
def ext4(loop_directory: Path) -> Iterator[FileSystem]:
    with new_file_system("ext4", 4 << 30, loop_directory) as made:
        yield made


@pytest.fixture(scope="session")
def xfs(loop_directory: Path) -> Iterator[FileSystem]:
    with new_file_system("xfs", 4 << 30, loop_directory) as made:
        yield made


@pytest.fixture(scope="session", params=["ext4", "xfs"])
def filesystem(request: pytest.FixtureRequest) -> FileSystem:
    """Run the test on each file system."""
    made = request.getfixturevalue(request.param)
    assert isinstance(made, FileSystem)
    return made


on_ext4 = pytest.mark.parametrize("filesystem", ["ext4"], indirect=True)
"""For tests that do not depend on the file system."""

long_on_xfs = pytest.mark.long_on_xfs
"""For tests that depend little on the file system: only `make test-all` runs them on xfs."""


@pytest.fixture
def scratch(filesystem: FileSystem) -> Iterator[Path]:
    with scratch_on(filesystem) as path:
        yield path


@contextmanager
def scratch_on(filesystem: FileSystem) -> Iterator[Path]:
    """Yield an empty directory, and delete it with its contents at the end."""
    path = Path(tempfile.mkdtemp(prefix="scratch", dir=filesystem.root))
    try:
        yield path
    finally:
        parent = os.open(filesystem.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            trees.delete(parent, path.name)
        finally:
            os.close(parent)
