"""Encrypted directories (fscrypt), inside a tree and around the state directory."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import FailedPrecondition
from tests.support.commands import run_command
from tests.support.engine import open_engine
from tests.support.file_systems import FileSystem, new_file_system
from tests.support.sealing import flags, is_sealed
from tests.support.service import expect_error, run_daemon
from tests.support.waiting import wait_until

# See <linux/fscrypt.h>.
_ADD_KEY, _REMOVE_KEY, _SET_POLICY = 0xC0506617, 0xC0406618, 0x800C6613
_POLICY_V2, _AES_256_XTS, _AES_256_CTS = 2, 1, 4
_BY_IDENTIFIER = 2


class Key:
    """A key for directories of one file system."""

    _RAW = b"k" * 64

    def __init__(self, filesystem: FileSystem) -> None:
        self._root = filesystem.root
        self._identifier = self.unlock()

    def unlock(self) -> bytes:
        """Give the file system the key, and return its identifier."""
        head = struct.pack("=II32sI36x", _BY_IDENTIFIER, 0, b"", len(self._RAW))
        argument = bytearray(head + self._RAW)
        self._control(self._root, _ADD_KEY, argument)
        return bytes(argument[8:24])

    def lock(self) -> None:
        """Take the key from the file system; wait until nothing in the kernel uses it."""
        wait_until(self._is_locked)

    def _is_locked(self) -> bool:
        argument = bytearray(struct.pack("=II32s24x", _BY_IDENTIFIER, 0, self._identifier))
        os.sync()
        try:
            self._control(self._root, _REMOVE_KEY, argument)
        except OSError as error:
            if error.errno != errno.ENOKEY:
                raise
            return True
        return not argument[40]

    def encrypted_directory(self, path: Path) -> Path:
        """Make a directory whose files are encrypted."""
        path.mkdir()
        modes = (_POLICY_V2, _AES_256_XTS, _AES_256_CTS)
        policy = struct.pack("=BBB5x16s", *modes, self._identifier)
        self._control(path, _SET_POLICY, bytearray(policy))
        return path

    @staticmethod
    def _control(path: Path, request: int, argument: bytearray) -> None:
        directory = os.open(path, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, request, argument)
        finally:
            os.close(directory)


@pytest.fixture
def disk(loop_directory: Path) -> Iterator[FileSystem]:
    with new_file_system("ext4", 256 << 20, loop_directory, ["-O", "encrypt"]) as made:
        yield made


@pytest.fixture
def key(disk: FileSystem) -> Key:
    try:
        return Key(disk)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
        pytest.skip("the kernel has no fscrypt")


def encrypted_entries(tree: Path) -> set[str]:
    """Return the names of the entries of a tree that are encrypted."""
    lines = [line.split() for line in run_command("lsattr", "-R", tree).splitlines() if line]
    return {Path(line[1]).name for line in lines if len(line) == 2 and "E" in line[0]}


def test_a_copy_of_an_encrypted_directory_is_not_encrypted(
    on_bus: str, disk: FileSystem, key: Key
) -> None:
    with run_daemon(on_bus, disk.root / "state"), BlockingClient() as client:
        tree = Path(client.prepare("work").source)
        (key.encrypted_directory(tree / "directory") / "file").write_text("text")
        client.commit("base", "work", digest=True)
        assert encrypted_entries(tree) == {"directory", "file"}
        copy = Path(client.prepare("copy", "base").source)
        assert (copy / "directory" / "file").read_text() == "text"
        assert encrypted_entries(copy) == set()
        client.verify("base")


def test_all_copies_in_an_encrypted_state_directory_are_encrypted(
    on_bus: str, disk: FileSystem, key: Key
) -> None:
    place = key.encrypted_directory(disk.root / "place")
    with run_daemon(on_bus, place / "state"), BlockingClient() as client:
        tree = Path(client.prepare("work").source)
        (tree / "file").write_text("text")
        client.commit("base", "work")
        copy = Path(client.prepare("copy", "base").source)
        assert (copy / "file").read_text() == "text"
        assert encrypted_entries(copy) == {"file"}


def test_calls_that_read_locked_files_are_refused_until_these_are_unlocked(
    on_bus: str, disk: FileSystem, key: Key
) -> None:
    with run_daemon(on_bus, disk.root / "state"), BlockingClient() as client:
        for name in ("work", "other"):
            tree = Path(client.prepare(name).source)
            (key.encrypted_directory(tree / "directory") / "file").write_text("text")
        client.commit("base", "work", digest=True)
        key.lock()
        for call in (
            lambda: client.prepare("copy", "base"),
            lambda: client.verify("base"),
            lambda: client.commit("done", "other"),
        ):
            with expect_error(FailedPrecondition, "encrypted", "unlock"):
                call()
        assert [info.name for info in client.walk()] == ["base", "other"]
        assert client.check() == []
        key.unlock()
        client.verify("base")
        client.commit("done", "other")


def test_a_start_unseals_what_is_not_locked_after_an_interrupted_commit(
    disk: FileSystem, key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    with open_engine(disk.root / "state") as engine:
        tree = Path(engine.prepare("work").source)
        # Entries are read in the order of their inodes.
        (key.encrypted_directory(tree / "locked") / "file").write_text("text")
        (tree / "plain").write_text("text")
    subprocess.run(["chattr", "-R", "+i", tree], check=True)
    key.lock()
    with open_engine(disk.root / "state"):
        assert not is_sealed(tree / "plain")
        assert "immutable in part" in caplog.text
    key.unlock()
    with open_engine(disk.root / "state"):
        assert set(flags(tree).values()) == {""}


def test_a_locked_committed_tree_is_deleted_when_it_is_unlocked(
    on_bus: str, disk: FileSystem, key: Key
) -> None:
    """The flag immutable cannot be cleared without the key."""
    snapshots = disk.root / "state" / "snapshots"
    with run_daemon(on_bus, disk.root / "state"), BlockingClient() as client:
        tree = Path(client.prepare("work").source)
        (key.encrypted_directory(tree / "locked") / "file").write_text("text")
        (tree / "plain").mkdir()
        (tree / "plain" / "file").write_text("text")
        client.commit("base", "work")
        key.lock()
        client.remove("base")
        with expect_error(FailedPrecondition, "encrypted", "unlock"):
            client.cleanup()
        # All that can be deleted is deleted.
        (tree,) = snapshots.iterdir()
        assert [path.name for path in tree.iterdir()] == ["locked"]
        key.unlock()
        client.cleanup()
        assert list(snapshots.iterdir()) == []
