"""A process that has leases on files of a tree; see F_SETLEASE in fcntl(2)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from snapd_native.errors import FailedPrecondition
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import open_engine, write_files
from tests.support.sealing import flags, is_sealed, tree_of
from tests.support.service import NOBODY

_LEASES = """
import fcntl, os, signal, sys

def call(fd, kind):
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except BlockingIOError:
        return False
    return True

def renew(*_):
    for fd in fds:
        call(fd, fcntl.F_UNLCK)
        while not call(fd, fcntl.F_WRLCK):
            pass

os.setuid(int(sys.argv.pop()))
fds = [int(number) for number in sys.argv[1:]]
signal.signal(signal.SIGIO, renew)
renew()
print(flush=True)
while True:
    signal.pause()
"""
"""A user's process that has leases on files of the user, and renews each that it must give up."""


@contextmanager
def leases(*files: Path) -> Iterator[None]:
    with ExitStack() as stack:
        fds = []
        for file in files:
            fds.append(os.open(file, os.O_RDONLY))
            stack.callback(os.close, fds[-1])
        process = subprocess.Popen(
            [sys.executable, "-c", _LEASES, *map(str, [*fds, NOBODY])],
            pass_fds=fds,
            stdout=subprocess.PIPE,
        )
        # The process must be the only one that has the files open.
        stack.close()
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            try:
                yield
            finally:
                process.kill()


def test_cleanup_deletes_all_files_except_those_with_a_lease(populated: Snapshotter) -> None:
    work = tree_of(populated, "work")
    os.chown(work / "file", NOBODY, -1)
    populated.commit("done", "work")
    doomed = work.with_name(f"rm-{work.name}")
    with leases(work / "file"):
        populated.remove("done")
        with pytest.raises(FailedPrecondition, match="has a lease on a file in it"):
            populated.upkeep.cleanup()
        assert [path.name for path in doomed.iterdir()] == ["file"]
    populated.upkeep.cleanup()
    assert not doomed.exists()


def test_a_start_does_not_wait_for_leases_on_sealed_files(state: Path) -> None:
    """A start that waited would last until the kernel has ended the leases, 45 s for each."""
    with open_engine(state) as engine:
        write_files(engine.prepare("work"), first="text", second="text", third="text")
        work = tree_of(engine, "work")
    for name in ("first", "third"):
        os.chown(work / name, NOBODY, -1)
    subprocess.run(["chattr", "-R", "+i", work], check=True)
    with leases(work / "first", work / "third"), open_engine(state):
        sealed = [path.name for path in work.iterdir() if is_sealed(path)]
        assert sorted(sealed) == ["first", "third"]
        assert is_sealed(work)
    with open_engine(state):
        assert set(flags(work).values()) == {""}
