"""Remove and Commit of snapshots that the daemon or another process has mounted."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from snapd_native import linux, trees
from snapd_native.errors import AlreadyExists, FailedPrecondition, SnapdError
from snapd_native.jobs import Job
from snapd_native.model import Kind, Lifetime, Mounted
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests.support.engine import directories, fail, fill, gated, identity, names, opened
from tests.support.file_systems import long_on_xfs
from tests.support.kernel_mounts import below, by_hand, mounted_on, place, targets, tmpfs, writable
from tests.support.waiting import WAIT, becomes

pytestmark = [long_on_xfs, pytest.mark.usefixtures("places")]


def source(engine: Snapshotter, key: str = "work") -> Path:
    return Path(engine.mounts(key).source)


def whole(engine: Snapshotter, _: Path) -> list[str | Path]:
    return ["--bind", source(engine)]


def part(engine: Snapshotter, _: Path) -> list[str | Path]:
    (source(engine) / "part").mkdir()
    return ["--bind", source(engine) / "part"]


def alias(engine: Snapshotter, places: Path) -> list[str | Path]:
    """Return the arguments of a bind mount through another mount of the state directory."""
    other = place(places, "alias")
    return ["--bind", other / "snapshots" / identity(engine, "work")]


@contextmanager
def namespace(*more: str) -> Iterator[int]:
    """Run a process in its own mount namespace, with a copy of each mount; yield its pid."""
    pipe = subprocess.PIPE
    command = ["unshare", "--mount", *more, "cat"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # The process answers as soon as it is in its namespace.
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        yield process.pid


def write_inside(pid: int, path: Path) -> str:
    """Write to a file in the mount namespace of a process; return the error message."""
    command = ["nsenter", "--mount", "--target", str(pid), "sh", "-c", 'echo new > "$1"', "sh"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    return done.stderr


def test_commit_makes_the_mounts_in_other_namespaces_read_only(
    full: Snapshotter, places: Path
) -> None:
    here, there = place(places), place(places, "there")
    with by_hand("--bind", places, places):
        subprocess.run(["mount", "--make-shared", str(places)], check=True)
        # One namespace gets its copies when the snapshot is mounted, the other at its creation.
        with namespace("--propagation", "slave") as before:
            full.mounter.mount("work", str(here))
            full.mounter.mount("work", str(there), read_only=True)
            with namespace() as after:
                for pid in (before, after):
                    assert write_inside(pid, here / f"from {pid}") == ""
                full.commit("done", "work", digest=True)
                for pid in (before, after):
                    for name in (f"from {pid}", "other"):
                        assert "Read-only file system" in write_inside(pid, here / name)
                full.upkeep.verify("done")


_THREAD = """
import ctypes, sys, threading

def work():
    assert libc.unshare(0x00020000) == 0
    print(flush=True)
    sys.stdin.readline()
    try:
        open(sys.argv[1], "a").write("more")
    except OSError as error:
        print(error.strerror, flush=True)

libc = ctypes.CDLL(None)
thread = threading.Thread(target=work)
thread.start()
if sys.argv[2] == "ended":
    libc.pthread_exit(None)
"""
"""A thread in a mount namespace of its own writes to a file; the first thread can end before."""


@pytest.mark.parametrize("first_thread", ["waits", "ended"])
def test_commit_makes_mounts_in_the_namespace_of_a_thread_read_only(
    full: Snapshotter, places: Path, first_thread: str
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
    command = [sys.executable, "-c", _THREAD, str(here / "file"), first_thread]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        if first_thread == "ended":
            status = Path(f"/proc/{process.pid}/status")
            becomes(lambda: "(zombie)" in status.read_text(), expected=True)
        full.commit("done", "work", digest=True)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "Read-only file system\n"
    full.upkeep.verify("done")


def test_commit_makes_mounts_in_a_namespace_without_a_process_read_only(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
    with namespace() as pid:
        kept = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    try:
        if linux.neighbour_namespace(kept, linux.NS_MNT_GET_PREV) is None:
            pytest.skip("Linux before 6.12 does not list mount namespaces")
        full.commit("done", "work", digest=True)
        enter = ["nsenter", f"--mount=/proc/self/fd/{kept}", "touch", str(here / "new")]
        done = subprocess.run(enter, pass_fds=[kept], capture_output=True, text=True, check=False)
        assert "Read-only file system" in done.stderr
        full.upkeep.verify("done")
    finally:
        os.close(kept)


@pytest.mark.alone
@pytest.mark.parametrize("theirs", ["rw", "ro"])
def test_commit_is_refused_while_a_user_namespace_has_a_copy_of_a_writable_mount(
    full: Snapshotter, places: Path, theirs: str
) -> None:
    """Its user could make the copy writable again, also after Commit.

    The user namespace has copies of the mounts of all other tests, too.
    """
    here = place(places)
    full.mounter.mount("work", str(here))
    with namespace("--user", "--map-root-user") as pid:
        enter = ["nsenter", "--user", "--mount", "--target", str(pid)]
        remount = [*enter, "mount", "-o", f"remount,bind,{theirs}", str(here)]
        subprocess.run(remount, check=True)
        says = rf"stays writable on .* of pid {pid} \(its user can make it writable again\)"
        with pytest.raises(FailedPrecondition, match=says):
            full.commit("done", "work")
        assert writable(here)
        flags = subprocess.run(
            [*enter, "findmnt", "--noheadings", "--output", "VFS-OPTIONS", here],
            check=True,
            capture_output=True,
            text=True,
        )
        assert flags.stdout.split(",")[0] == theirs
    full.commit("done", "work")


@pytest.mark.alone
def test_commit_accepts_a_copy_of_a_read_only_mount_in_a_user_namespace(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here), read_only=True)
    with namespace("--user", "--map-root-user") as pid:
        full.commit("done", "work")
        enter = ["nsenter", "--user", "--mount", "--target", str(pid)]
        remount = [*enter, "mount", "-o", "remount,bind,rw", str(here)]
        assert subprocess.run(remount, check=False, capture_output=True).returncode != 0


def test_commit_after_a_restart_is_refused_while_a_lazily_unmounted_file_is_open(
    state: Path, places: Path
) -> None:
    here = place(places)
    with opened(state) as engine:
        fill(engine)
        engine.mounter.mount("work", str(here))
        command = ["sh", "-c", 'exec cat >> "$1"', "sh", str(here / "file")]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE)
        becomes(Path(f"/proc/{writer.pid}/comm").read_text, "cat\n")
        engine.mounter.unmount(str(here), lazy=True)
    with writer, opened(state) as engine:
        says = rf"cat \(pid {writer.pid}\).* can still write"
        with pytest.raises(FailedPrecondition, match=says):
            engine.commit("done", "work")
        writer.terminate()
        writer.wait()
        engine.commit("done", "work", digest=True)
        engine.upkeep.verify("done")


def test_commit_makes_the_trees_that_open_tree_returned_read_only(full: Snapshotter) -> None:
    tree = full.mounter.open_tree("work")
    with subprocess.Popen(["sleep", "infinity"], pass_fds=[tree]) as holder:
        os.close(tree)
        theirs = Path(f"/proc/{holder.pid}/fd/{tree}")
        (theirs / "file").write_text("theirs")
        full.commit("done", "work", digest=True)
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            (theirs / "file").write_text("later")
        full.upkeep.verify("done")
        holder.terminate()


def test_commit_is_refused_while_a_tree_of_open_tree_has_a_file_open_for_writing(
    full: Snapshotter,
) -> None:
    tree = full.mounter.open_tree("work")
    with subprocess.Popen(["sleep", "infinity"], pass_fds=[tree]) as holder:
        os.close(tree)
        theirs = Path(f"/proc/{holder.pid}/fd/{tree}")
        with (theirs / "file").open("a") as file:
            with pytest.raises(FailedPrecondition, match="can still write to it"):
                full.commit("done", "work")
            file.write("more")
        (theirs / "file").write_text("again")
        full.commit("done", "work")
        holder.terminate()


def test_a_commit_that_fails_leaves_mounts_in_other_namespaces_writable(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
    with namespace() as pid:
        with pytest.raises(AlreadyExists):
            full.commit("base", "work")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateDirectory, "sync", fail(errno.EDQUOT))
            with pytest.raises(SnapdError):
                full.commit("done", "work")
        assert write_inside(pid, here / "file") == ""


def test_commit_with_a_file_open_for_writing_in_another_namespace_is_refused(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
    with namespace() as pid:
        command = ["nsenter", "--mount", "--target", str(pid), "sh", "-c", 'exec cat >> "$1"', "sh"]
        with subprocess.Popen([*command, here / "file"], stdin=subprocess.PIPE) as writer:
            becomes(Path(f"/proc/{writer.pid}/comm").read_text, "cat\n")
            says = rf"cat \(pid {writer.pid}\).* has a file open"
            with pytest.raises(FailedPrecondition, match=says):
                full.commit("done", "work")
            assert mounted_on(here)
            assert writable(here)
            writer.terminate()
    full.commit("done", "work")


def test_commit_is_refused_while_a_process_hides_its_copy_of_a_mount(
    full: Snapshotter, places: Path
) -> None:
    """A process could still write to a file that it has opened through the copy."""
    here = place(places)
    full.mounter.mount("work", str(here))
    with namespace() as pid:
        enter = ["nsenter", "--mount", "--target", str(pid)]
        subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", here], check=True)
        says = rf"it stays writable on .* in the mount namespace of pid {pid} .*, end that process"
        with pytest.raises(FailedPrecondition, match=says):
            full.commit("done", "work")
        assert writable(here)
    full.commit("done", "work")


@pytest.mark.parametrize("kind", [whole, part, alias])
def test_remove_of_a_snapshot_mounted_by_hand_raises_failed_precondition(
    full: Snapshotter, places: Path, kind: object
) -> None:
    here = place(places)
    assert callable(kind)
    arguments = kind(full, places)
    with ExitStack() as stack:
        if kind is alias:
            stack.enter_context(by_hand("--bind", full.state_directory, places / "alias"))
        with by_hand(*arguments, here):
            before = directories(full)
            with pytest.raises(FailedPrecondition, match=f'"work": it is mounted.* "{here}" first'):
                full.remove("work")
            assert directories(full) == before
            full.remove("lone")
    full.remove("work")


def test_remove_with_a_file_mounted_by_hand_raises_failed_precondition(
    full: Snapshotter, places: Path
) -> None:
    here = places / "file"
    here.touch()
    with (
        by_hand("--bind", source(full) / "file", here),
        pytest.raises(FailedPrecondition, match="is mounted"),
    ):
        full.remove("work")
    full.remove("work")


def test_remove_with_a_mount_inside_the_tree_raises_failed_precondition(full: Snapshotter) -> None:
    inside = source(full) / "deep" / "inside"
    inside.mkdir(parents=True)
    with tmpfs(inside):
        with pytest.raises(FailedPrecondition, match='in it on "deep/inside"') as caught:
            full.remove("work")
        assert str(full.state_directory) not in str(caught.value)
    full.remove("work")


def test_remove_before_unmount_raises_failed_precondition(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("look", str(here))
    full.mounter.mount("work", str(there))
    for key, target in (("look", here), ("work", there)):
        with pytest.raises(FailedPrecondition, match=f'unmount "{target}" first'):
            full.remove(key)
    with pytest.raises(FailedPrecondition, match="it has children"):
        full.remove("base")
    full.mounter.unmount(str(here))
    full.remove("look")
    assert targets(full) == [str(there)]


def test_a_committed_snapshot_mounted_by_hand_cannot_be_removed(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    with by_hand("--bind", source(full, "look"), here):
        for key in ("look", "work"):
            full.remove(key)
        with pytest.raises(FailedPrecondition, match="is mounted"):
            full.remove("base")
    full.remove("base")


def test_commit_turns_mounts_read_only(full: Snapshotter, places: Path) -> None:
    ours, theirs, other = (place(places, name) for name in ("ours", "theirs", "other"))
    full.mounter.mount("work", str(ours))
    full.mounter.mount("lone", str(other))
    with by_hand("--bind", source(full), theirs), (ours / "file").open() as reading:
        assert writable(ours)
        assert writable(theirs)
        full.commit("done", "work")
        assert not writable(ours)
        assert not writable(theirs)
        assert writable(other)
        assert reading.read() == "base"
        assert full.mounter.list_mounts("done") == [
            Mounted(str(ours), "done", True, Lifetime.PERSISTENT, 0)
        ]
        state = full.state_directory
        full.close()
        with opened(state) as again:
            assert [mounted.read_only for mounted in again.mounter.list_mounts()] == [True, False]
            assert not writable(ours)


@contextmanager
def written(path: Path) -> Iterator[None]:
    with path.open("a"):
        yield


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    # The mapping has its own copy of the descriptor, and stays when the file is closed.
    try:
        yield
    finally:
        memory.close()


@pytest.mark.parametrize("use", [written, mapped])
@pytest.mark.parametrize("where", ["ours", "theirs"])
def test_commit_with_a_file_open_for_writing_raises_failed_precondition(
    full: Snapshotter, places: Path, use: object, where: str
) -> None:
    assert callable(use)
    mounts = [place(places, name) for name in ("ours", "theirs")]
    full.mounter.mount("work", str(mounts[0]))
    with by_hand("--bind", source(full), mounts[1]):
        with use(places / where / "file"):
            with pytest.raises(FailedPrecondition) as caught:
                full.commit("done", "work")
            assert f"(pid {os.getpid()}) has a file open for writing" in caught.value.message
            assert str(places / where) in caught.value.message
            assert full.stat("work").kind is Kind.ACTIVE
            assert all(writable(mount) for mount in mounts)
            assert [mounted.read_only for mounted in full.mounter.list_mounts()] == [False]
        full.commit("done", "work")
        assert not any(writable(mount) for mount in mounts)


@pytest.mark.parametrize("how", ["measure", "sync", "cancel"])
def test_a_failed_commit_turns_the_mounts_writable_again(
    full: Snapshotter, places: Path, how: str
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
    job = Job()
    with pytest.MonkeyPatch.context() as patch:
        match how:
            case "measure":
                patch.setattr(trees.Crew, "measure", fail(errno.EIO))
            case "sync":
                patch.setattr(StateDirectory, "sync", fail(errno.ENOSPC))
            case "cancel":
                job = Job(lambda: job.cancel())
        with pytest.raises(SnapdError):
            full.commit("done", "work", job=job)
    assert "work" in names(full)
    assert writable(here)
    if how != "sync":
        full.commit("done", "work")
        assert not writable(here)


def test_mount_and_open_tree_during_commit_raise_failed_precondition(
    full: Snapshotter, places: Path
) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("work", str(here))
    with ThreadPoolExecutor(1) as pool, gated("measure") as gate:
        committing = pool.submit(full.commit, "done", "work")
        gate.wait_until_reached()
        assert not writable(here)
        for call in (
            lambda: full.mounter.mount("work", str(there)),
            lambda: full.mounter.open_tree("work"),
        ):
            with pytest.raises(FailedPrecondition, match="is being committed"):
                call()
        # Calls on other snapshots succeed, and do not wait.
        full.mounter.mount("lone", str(there))
        gate.open()
        committing.result(WAIT)
    assert below(places) == [str(here), str(there)]


def test_commit_with_a_covered_mount_raises_failed_precondition(
    full: Snapshotter, places: Path
) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("work", str(there))
    full.mounter.mount("work", str(here))
    with tmpfs(here):
        with pytest.raises(FailedPrecondition, match=f'"{here}" is mounted over it'):
            full.commit("done", "work")
        assert writable(there)
        assert "work" in names(full)
    full.commit("done", "work")


def test_commit_leaves_mounts_inside_the_tree_writable(full: Snapshotter, places: Path) -> None:
    """Mounts inside a mount of the snapshot are not changed."""
    here = place(places)
    (source(full) / "inside").mkdir()
    full.mounter.mount("work", str(here))
    with tmpfs(here / "inside"):
        full.commit("done", "work")
        assert not writable(here)
        assert writable(here / "inside")
        assert mounted_on(here / "inside")


def test_usage_commit_and_prepare_skip_mounts_inside_the_tree(full: Snapshotter) -> None:
    before = full.usage("work")
    inside = source(full) / "inside"
    inside.mkdir()
    with tmpfs(inside):
        (inside / "elsewhere").touch()
        assert full.usage("work").inodes == before.inodes + 1
        full.commit("done", "work")
        copy = Path(full.prepare("copy", "done").source)
        assert list((copy / "inside").iterdir()) == []


@contextmanager
def overlay(on: Path, lower: str, upper: str = "") -> Iterator[None]:
    """Mount an overlay for the block."""
    options = f"lowerdir={lower}" + (f",upperdir={upper}/upper,workdir={upper}/work" * bool(upper))
    with by_hand("-t", "overlay", "-o", options, "overlay", on):
        yield


def test_commit_is_refused_while_an_overlay_writes_to_the_tree(
    full: Snapshotter, places: Path
) -> None:
    here, mounted = place(places), place(places, "mounted")
    full.mounter.mount("work", str(mounted))
    for name in ("upper", "work"):
        (mounted / name).mkdir()
    for upper in (full.mounts("work").source, str(mounted)):
        with overlay(here, full.mounts("look").source, upper):
            with pytest.raises(FailedPrecondition, match=f'overlay on "{here}" writes to it'):
                full.commit("done", "work")
            (here / "new").write_text("text")
    full.commit("done", "work")


def test_commit_is_refused_while_an_overlay_in_another_namespace_writes_to_the_tree(
    full: Snapshotter, places: Path
) -> None:
    here, tree = place(places), Path(full.mounts("work").source)
    for name in ("upper", "work"):
        (tree / name).mkdir()
    options = f"lowerdir={full.mounts('look').source},upperdir={tree}/upper,workdir={tree}/work"
    with namespace() as pid:
        inside = ["nsenter", "--mount", "--target", str(pid)]
        overlay = ["mount", "-t", "overlay", "-o", options, "overlay", str(here)]
        subprocess.run([*inside, *overlay], check=True)
        says = rf'"{here}" in the mount namespace of pid {pid} \(an overlay writes to it\)'
        with pytest.raises(FailedPrecondition, match=says):
            full.commit("done", "work")
        subprocess.run([*inside, "umount", here], check=True)
        full.commit("done", "work")


def test_remove_is_refused_while_an_overlay_shows_the_tree(full: Snapshotter, places: Path) -> None:
    here, odd = place(places), place(places, "a:b,c \\ d")
    escaped = str(odd).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    layers = f"{escaped}:{full.mounts('lone').source}"
    says = f'overlay on "{here}" shows it'
    with overlay(here, layers), pytest.raises(FailedPrecondition, match=says):
        full.remove("lone")
    full.remove("lone")
