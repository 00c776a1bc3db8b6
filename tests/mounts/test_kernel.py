"""The mount table of the kernel, the users of a mount, old kernels and mount namespaces."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd_native import linux, mounts
from snapd_native.mounts import Place, Table
from tests.support import PROJECT
from tests.support.engine import open_engine, populate
from tests.support.file_systems import long_on_xfs, on_ext4
from tests.support.kernel_mounts import (
    entry_on,
    make_target,
    mount_by_hand,
    mount_targets,
    mount_tmpfs,
)
from tests.support.waiting import wait_until_equal

pytestmark = [long_on_xfs, pytest.mark.usefixtures("places")]


@pytest.mark.parametrize(
    "name", ["plain", "a space", "a\ttab", "a\nline", "back\\slash", "#", "ü", "\\040"]
)
def test_the_mount_table_decodes_escaped_names(places: Path, name: str) -> None:
    here = make_target(places, name)
    (here / name).mkdir()
    with mount_tmpfs(here):
        (here / name).mkdir()
        with mount_by_hand("--bind", here / name, here / name):
            assert entry_on(here / name).root.path == f"/{name}"
            assert [entry.target for entry in Table.read().on(entry_on(here))] == [str(here / name)]


def test_a_directory_has_the_same_place_through_every_mount(places: Path) -> None:
    here, there = make_target(places), make_target(places, "there")
    (here / "deep").mkdir()
    with mount_by_hand("--bind", here, there):
        table = Table.read()
        found = []
        for path in (here / "deep", there / "deep", there):
            fd = os.open(path, os.O_PATH)
            found.append(table.place(fd))
            os.close(fd)
        first, second, root = found
        assert first == second
        assert root is not None
        assert first == root / "deep"
        assert root.holds(root)
        assert first is not None
        assert root.holds(first)
        assert not first.holds(root)
        assert not root.holds(Place(root.device, root.path + "er"))
        assert not root.holds(Place("0:0", root.path))


def mount_on_itself(path: Path) -> None:
    """Mount a directory on itself, without the time that mount(8) takes to start."""
    here = os.open(path, os.O_PATH)
    tree = linux.open_tree(linux.AT_FDCWD, str(path), linux.OPEN_TREE_CLONE)
    try:
        linux.move_mount(tree, here)
    finally:
        os.close(tree)
        os.close(here)


def test_the_mount_table_is_complete_while_mounts_change(places: Path) -> None:
    """Another thread mounts and unmounts a tmpfs all the time."""
    here, there = make_target(places), make_target(places, "there")
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            with mount_tmpfs(there):
                pass

    with mount_tmpfs(here):
        made = [here / str(number) for number in range(300)]
        for path in made:
            path.mkdir()
            mount_on_itself(path)
        thread = threading.Thread(target=busy)
        thread.start()
        try:
            for _ in range(50):
                found = {entry.target for entry in Table.read().within(str(here))}
                assert found == {str(here), *map(str, made)}
        finally:
            ended.set()
            thread.join()


USES = {
    "cwd": "os.chdir(path)",
    "open": "file = open(path + '/file')",
    "writes": "file = open(path + '/file', 'a')",
    "mapped": "fd = os.open(path + '/file', os.O_RDWR); m = mmap.mmap(fd, 0); n = os.dup(0);"
    " os.close(fd)",
    "root": "os.chroot(path)",
}


@contextmanager
def run_user(path: Path, use: str) -> Iterator[int]:
    program = (
        f"import mmap, os; path = {str(path)!r}; {USES[use]}; print(flush=True); os.read(0, 1)"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield process.pid
        finally:
            process.communicate(b"\n")


@pytest.mark.parametrize("use", USES)
def test_users_returns_the_processes_that_use_a_mount(places: Path, use: str) -> None:
    here, there = make_target(places), make_target(places, "there")
    with mount_tmpfs(here), mount_tmpfs(there):
        (here / "file").write_text("text")
        with run_user(here, use) as pid:
            expected = [(pid, Path(f"/proc/{pid}/comm").read_text().strip())]
            # A service of a parallel test also searches for users, and is a user for a moment.
            wait_until_equal(lambda: mounts.users(entry_on(here)), expected)
            writes = use in ("writes", "mapped")
            writers = expected if writes else []
            wait_until_equal(lambda: mounts.users(entry_on(here), writing=True), writers)
            wait_until_equal(lambda: mounts.users(entry_on(there)), [])
        wait_until_equal(lambda: mounts.users(entry_on(here)), [])


def test_users_returns_a_process_whose_program_is_on_the_mount(places: Path) -> None:
    here = make_target(places)
    with mount_tmpfs(here):
        subprocess.run(["mount", "-o", "remount,size=64m", str(here)], check=True)
        program = here / "cat"
        program.write_bytes(Path("/bin/cat").read_bytes())
        program.chmod(0o755)
        with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
            # The process gets its name a moment after its start.
            wait_until_equal(lambda: mounts.users(entry_on(here)), [(process.pid, "cat")])
            process.communicate()


_SYS_MOUNT_SETATTR, _ENOSYS = 442, 38


def disable_mount_setattr() -> None:
    """Make mount_setattr(2) fail with ENOSYS in this process and its children, by seccomp(2)."""
    load, equal, give = 0x20, 0x15, 0x06
    errno_, allow = 0x00050000, 0x7FFF0000
    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in [
            (load, 0, 0, 0),
            (equal, 0, 1, _SYS_MOUNT_SETATTR),
            (give, 0, 0, errno_ | _ENOSYS),
            (give, 0, 0, allow),
        ]
    )
    buffer = ctypes.create_string_buffer(program)
    filter_ = struct.pack("@HP", 4, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    assert libc.prctl(set_no_new_privs, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, mode_filter, ctypes.c_char_p(filter_)) == 0


@on_ext4
def test_the_daemon_refuses_to_start_without_mount_setattr(on_bus: str, state: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "snapd_native", "daemon", "--state-directory", str(state)],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": on_bus},
        preexec_fn=disable_mount_setattr,
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    assert outcome.returncode == 1
    (line,) = outcome.stderr.splitlines()
    assert "boot Linux 5.12 or newer" in line
    assert not state.exists()


IN_SLAVE_NAMESPACE = """
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
{second} {python} -c '
import os, sys
from pathlib import Path
from snapd_native.errors import FailedPrecondition
from snapd_native.snapshotter import Snapshotter
state = Path(sys.argv[1])
engine = Snapshotter(state, lambda *_: None, runtime=state.parent / "run")
os.close(engine.mounter.open_tree("look"))
try:
    print(engine.mounter.mount("work"))
except FailedPrecondition as error:
    print(error)
engine.close()
' {state}
"""


@on_ext4
@pytest.mark.parametrize("second", ["", "unshare -m --propagation slave"])
def test_mount_in_a_slave_mount_namespace_raises_failed_precondition(
    state: Path, places: Path, second: str
) -> None:
    """Process 1 of a new PID namespace plays the role of systemd."""
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(make_target(places)))
        lines = engine._store.ledger.lines()
    script = IN_SLAVE_NAMESPACE.format(second=second, python=sys.executable, state=state)
    outcome = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT,
    )
    if second:
        assert "ProtectSystem=" in outcome.stdout
        assert "ProtectSystem=" in outcome.stderr
        with open_engine(state) as engine:
            assert engine._store.ledger.lines() == lines
            assert mount_targets(engine) == [str(places / "here")]
    else:
        assert Path(outcome.stdout.strip()).parent == state.parent / "run" / "mounts"
