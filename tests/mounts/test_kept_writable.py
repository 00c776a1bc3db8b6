"""Ways to keep a tree writable past a Commit: each is refused, or fails to write afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native.errors import FailedPrecondition
from snapd_native.snapshotter import Snapshotter
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import make_target

pytestmark = [on_ext4, pytest.mark.usefixtures("places")]

_HOLDER = """
import ctypes, mmap, os, socket, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
here = sys.argv[1]

def proceed():
    print(flush=True)
    sys.stdin.readline()

def send(fd):
    ends = socket.socketpair()
    socket.send_fds(ends[0], [b"x"], [fd])
    os.close(fd)
    return ends

def receive(ends):
    return socket.recv_fds(ends[1], 1, 1)[1][0]

%s
print("written", flush=True)
"""

_MAPPING = """
fd = os.open(here + "/file", os.O_RDWR)
page = ctypes.c_void_p(libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0))
os.close(fd)
proceed()
assert libc.mprotect(page, 4096, mmap.PROT_READ | mmap.PROT_WRITE) == 0
ctypes.memmove(page, b"gone", 4)
"""
_MESSAGE = """
ends = send(os.open(here + "/file", os.O_RDWR))
proceed()
os.write(receive(ends), b"gone")
"""
_THREAD = """
def work():
    assert libc.unshare(0x400) == 0
    fd = os.open(here + "/file", os.O_RDWR)
    proceed()
    os.write(fd, b"gone")

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
_UNLINKED = """
os.link(here + "/file", here + "/name")
fd = os.open(here + "/name", os.O_RDWR)
os.unlink(here + "/name")
proceed()
os.write(fd, b"gone")
"""
_DEEP = """
os.chdir(here)
for _ in range(30):
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
fd = os.open("file", os.O_RDWR | os.O_CREAT)
os.chdir("/")
proceed()
os.write(fd, b"gone")
"""
_TREE_IN_MESSAGE = """
ends = send(int(sys.argv[2]))
proceed()
os.write(os.open("file", os.O_RDWR, dir_fd=receive(ends)), b"gone")
"""
_TREE_IN_USER_NAMESPACE = """
tree = int(sys.argv[2])
proceed()
assert libc.unshare(0x10020000) == 0
attributes = struct.pack("=QQQQ", 0, 1, 0, 0)
assert libc.syscall(442, tree, b"", 0x1000, attributes, 32) == 0
os.write(os.open("file", os.O_RDWR, dir_fd=tree), b"gone")
"""


@contextmanager
def holder(script: str, *arguments: object, fd: int = -1) -> Iterator[subprocess.Popen[str]]:
    """Run a process that keeps something of a tree."""
    command = [sys.executable, "-c", _HOLDER % script, *map(str, arguments)]
    pipe = subprocess.PIPE
    fds = [fd] if fd >= 0 else []
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, pass_fds=fds
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        yield process


def commit_and_write(engine: Snapshotter, process: subprocess.Popen[str]) -> None:
    """Commit, let the process write, and check that the tree is what was committed."""
    try:
        engine.commit("done", "work", digest=True)
    except FailedPrecondition:
        return
    process.communicate("\n")
    engine.upkeep.verify("done")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(_MAPPING, id="mapping"),
        pytest.param(_MESSAGE, id="message"),
        pytest.param(_THREAD, id="thread"),
        pytest.param(_UNLINKED, id="unlinked"),
        pytest.param(_DEEP, id="deep"),
    ],
)
def test_a_lazily_unmounted_file_cannot_be_written_after_commit(
    populated: Snapshotter, places: Path, script: str
) -> None:
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    with holder(script, here) as process:
        populated.mounter.unmount(str(here), lazy=True)
        commit_and_write(populated, process)


def test_a_lazily_unmounted_part_of_a_tree_cannot_be_written_after_commit(
    populated: Snapshotter, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    populated.mounter.mount("work", str(here))
    (here / "part").mkdir()
    (here / "part" / "file").write_text("kept")
    subprocess.run(["mount", "--bind", here / "part", there], check=True)
    script = 'fd = os.open(here + "/file", os.O_RDWR)\nproceed()\nos.write(fd, b"gone")'
    with holder(script, there) as process:
        subprocess.run(["umount", "--lazy", there], check=True)
        commit_and_write(populated, process)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(_TREE_IN_MESSAGE, id="message"),
        pytest.param(_TREE_IN_USER_NAMESPACE, id="user-namespace"),
    ],
)
def test_a_tree_of_open_tree_cannot_be_written_after_commit(
    populated: Snapshotter, script: str
) -> None:
    tree = populated.mounter.open_tree("work")
    with holder(script, "", tree, fd=tree) as process:
        os.close(tree)
        commit_and_write(populated, process)


def test_a_view_of_open_tree_cannot_be_written(populated: Snapshotter) -> None:
    tree = populated.mounter.open_tree("look")
    with holder(_TREE_IN_USER_NAMESPACE, "", tree, fd=tree) as process:
        written, _ = process.communicate("\n")
    os.close(tree)
    assert "written" not in written


@pytest.mark.parametrize(
    "how",
    ["present", "unmounted", "linked"],
)
def test_an_overlay_cannot_write_after_commit(
    populated: Snapshotter, places: Path, how: str
) -> None:
    here, shown, lower = (make_target(places, name) for name in ("here", "shown", "lower"))
    (places / "link").symlink_to(here)
    populated.mounter.mount("work", str(here))
    for name in ("upper", "work"):
        (here / name).mkdir()
    base = places / "link" if how == "linked" else here
    options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", shown], check=True)
    try:
        if how == "unmounted":
            populated.mounter.unmount(str(here))
        try:
            populated.commit("done", "work", digest=True)
        except FailedPrecondition:
            return
        with suppress(OSError):
            (shown / "new").write_text("new")
        populated.upkeep.verify("done")
    finally:
        subprocess.run(["umount", shown], check=True)
