"""Fill small file systems, and check engines on them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from snapd_native.errors import ResourceExhausted
from snapd_native.model import quote
from snapd_native.snapshotter import Snapshotter
from tests.support import PROJECT
from tests.support.engine import state_of
from tests.support.service import check_sentence
from tests.support.waiting import wait_until

MIB = 1 << 20

SMALL_SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
"""The sizes of small file systems, in bytes. mkfs.xfs refuses sizes below 300 MiB."""

BTRFS_SIZE = 128 * MIB

FEW_INODES = {"ext4": ("-N", "512"), "xfs": ("-i", "maxpct=1")}
"""Options of mkfs for a file system with few inodes."""


def use_all_space(root: Path) -> None:
    """Fill the file system up to the last free byte."""
    fd = os.open(root / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    os.write(fd, b"x" * size)
                    if size == MIB:
                        os.fsync(fd)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            os.sync()
    finally:
        os.close(fd)


def use_all_inodes(root: Path) -> None:
    """Create files until no inode is free."""
    empty_files = root / "empty-files"
    empty_files.mkdir(exist_ok=True)
    number = len(os.listdir(empty_files))
    try:
        while True:
            os.mknod(empty_files / str(number))
            number += 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def free_space(root: Path) -> None:
    """Free the space and the inodes that `use_all_space` and `use_all_inodes` have used."""
    if (root / "filler").exists():
        with suppress(OSError):
            os.truncate(root / "filler", 0)
        (root / "filler").unlink()
    if (root / "empty-files").exists():
        shutil.rmtree(root / "empty-files")
        # xfs frees inodes in the background.
        wait_until(lambda: os.statvfs(root).f_ffree > 100)


def populate_large(engine: Snapshotter) -> None:
    """Make `base 0` to `base 3` of 1 MiB each, and `work` and `look` from `base 0`."""
    for number in range(4):
        tree = Path(engine.prepare("preparing").source)
        (tree / "file").write_bytes(os.urandom(MIB))
        engine.commit(f"base {number}", "preparing")
    engine.prepare("work", "base 0")
    engine.view("look", "base 0")


KILLED_PROGRAM = """
import os, signal, sys
from pathlib import Path
from snapd_native.snapshotter import Snapshotter

state = Path(sys.argv[1])
engine = Snapshotter(state, lambda *_: None, runtime=state.parent / "run")
engine.update("work", {"killed": "after this"})
engine.view("last", "base 1")
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_as_killed(state: Path) -> None:
    """Leave ``state`` as a killed service does: with a WAL to recover and directories to delete."""
    done = subprocess.run([sys.executable, "-c", KILLED_PROGRAM, state], check=False, cwd=PROJECT)
    assert done.returncode == -signal.SIGKILL
    assert (state / "metadata.db-wal").stat().st_size > 0
    for name in ("new-900", "rm-901", "902", "making-1-903"):
        (state / "snapshots" / name / "deep").mkdir(parents=True)


def fill_wal(engine: Snapshotter) -> None:
    """Change labels until the database has no space for any change."""
    with suppress(ResourceExhausted):
        while True:
            engine.update("base 3", {"many": "x" * 1000})


def state_with_mounts(engine: Snapshotter) -> object:
    """Return everything that a failed call must not change."""
    return state_of(engine), engine.mounter.list_mounts(), engine._store.ledger.lines()


def check_refused(engine: Snapshotter, calls: dict[str, Callable[[], object]]) -> None:
    """Make each call twice without free space; check that it raises and changes nothing."""
    before = state_with_mounts(engine)
    for _ in range(2):
        for name, call in calls.items():
            with pytest.raises(ResourceExhausted) as caught:
                call()
            check_sentence(caught.value.message, "free", "try again")
            assert state_with_mounts(engine) == before, name
            check_reads(engine)
    assert engine.upkeep.check() == []


def check_reads(engine: Snapshotter) -> None:
    """Check that all reading calls work."""
    assert engine.stat("work").parent == "base 0"
    assert engine.usage("base 1").size >= MIB
    assert engine.usage("work").size >= MIB
    assert engine.list([f"parent=={quote('base 0')}"])[0].name == "look"
    assert engine.mounts("work").options == ("rbind", "rw")
    engine.check_health()
