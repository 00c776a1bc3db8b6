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

from snapd_native import trees
from snapd_native.errors import AlreadyExists, FailedPrecondition, SnapdError
from snapd_native.jobs import Job
from snapd_native.model import Kind, Lifetime, Mounted
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests.support.engine import (
    directories,
    failing_function,
    id_of,
    open_engine,
    populate,
    snapshot_names,
)
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_function
from tests.support.kernel_mounts import (
    is_writable,
    make_target,
    mount_by_hand,
    mount_targets,
    mount_tmpfs,
    mounted_on,
    mounts_below,
)
from tests.support.waiting import WAIT_TIMEOUT, wait_until_equal

pytestmark = [long_on_xfs, pytest.mark.usefixtures("places")]


def tree_of(engine: Snapshotter, key: str = "work") -> Path:
    return Path(engine.mounts(key).source)


def whole_tree(engine: Snapshotter, _: Path) -> list[str | Path]:
    return ["--bind", tree_of(engine)]


def part_of_tree(engine: Snapshotter, _: Path) -> list[str | Path]:
    (tree_of(engine) / "part").mkdir()
    return ["--bind", tree_of(engine) / "part"]


def tree_through_alias(engine: Snapshotter, places: Path) -> list[str | Path]:
    """Return the arguments of a bind mount through another mount of the state directory."""
    other = make_target(places, "alias")
    return ["--bind", other / "snapshots" / id_of(engine, "work")]


@contextmanager
def run_in_namespace(*more: str) -> Iterator[int]:
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


_CHANGES = """
import os, sys
file, directory = "file", "directory"
os.chdir(sys.argv[1])
for change in (
    lambda: open(file, "a"),
    lambda: os.truncate(file, 0),
    lambda: os.chmod(file, 0o600),
    lambda: os.chown(file, 0, 0),
    lambda: os.utime(file),
    lambda: os.setxattr(file, "user.new", b""),
    lambda: os.link(file, "second"),
    lambda: os.rename(file, "renamed"),
    lambda: os.unlink(file),
    lambda: os.unlink("link"),
    lambda: open("new", "x"),
    lambda: open(directory + "/new", "x"),
    lambda: os.mkdir("new"),
    lambda: os.symlink("new", "new"),
    lambda: os.chmod(directory, 0o700),
    lambda: os.rmdir(directory),
    lambda: os.chmod(".", 0o700),
):
    try:
        change()
    except PermissionError as error:
        print(error.strerror)
    else:
        print("changed")
"""


@pytest.mark.parametrize("kind", [(), ("--user", "--map-root-user")], ids=["root", "user"])
def test_nobody_can_change_a_committed_tree_in_another_namespace(
    populated: Snapshotter, places: Path, kind: tuple[str, ...]
) -> None:
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    (here / "directory").mkdir()
    (here / "link").symlink_to("file")
    with run_in_namespace(*kind) as pid:
        assert write_inside(pid, here / "file") == ""
        populated.commit("done", "work", digest=True)
        enter = ["nsenter", *kind[:1], "--mount", "--target", str(pid), sys.executable]
        done = subprocess.run(
            [*enter, "-c", _CHANGES, here], check=True, capture_output=True, text=True
        )
        assert set(done.stdout.splitlines()) == {os.strerror(errno.EPERM)}
    populated.upkeep.verify("done")


def test_commit_after_a_restart_is_refused_while_a_lazily_unmounted_file_is_open(
    state: Path, places: Path
) -> None:
    here = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("work", str(here))
        command = ["sh", "-c", 'exec cat >> "$1"', "sh", str(here / "file")]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE)
        wait_until_equal(Path(f"/proc/{writer.pid}/comm").read_text, "cat\n")
        engine.mounter.unmount(str(here), lazy=True)
    with writer, open_engine(state) as engine:
        says = rf"cat \(pid {writer.pid}\).* has a file in it open"
        with pytest.raises(FailedPrecondition, match=says):
            engine.commit("done", "work")
        writer.terminate()
        writer.wait()
        engine.commit("done", "work", digest=True)
        engine.upkeep.verify("done")


def test_nobody_can_change_a_committed_tree_of_open_tree(populated: Snapshotter) -> None:
    tree = populated.mounter.open_tree("work")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[tree]) as holder:
        os.close(tree)
        theirs = Path(f"/proc/{holder.pid}/fd/{tree}")
        (theirs / "file").write_text("theirs")
        populated.commit("done", "work", digest=True)
        with pytest.raises(PermissionError):
            (theirs / "file").write_text("later")
        populated.upkeep.verify("done")


def test_commit_is_refused_while_a_tree_of_open_tree_has_a_file_open_for_writing(
    populated: Snapshotter,
) -> None:
    tree = populated.mounter.open_tree("work")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[tree]) as holder:
        os.close(tree)
        theirs = Path(f"/proc/{holder.pid}/fd/{tree}")
        with (theirs / "file").open("a") as file:
            with pytest.raises(FailedPrecondition, match="has a file in it open"):
                populated.commit("done", "work")
            file.write("more")
        (theirs / "file").write_text("again")
        populated.commit("done", "work")


def test_a_commit_that_fails_leaves_mounts_in_other_namespaces_writable(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    with run_in_namespace() as pid:
        with pytest.raises(AlreadyExists):
            populated.commit("base", "work")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateDirectory, "sync", failing_function(errno.EDQUOT))
            with pytest.raises(SnapdError):
                populated.commit("done", "work")
        assert write_inside(pid, here / "file") == ""


def test_commit_with_a_file_open_for_writing_in_another_namespace_is_refused(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    with run_in_namespace() as pid:
        command = ["nsenter", "--mount", "--target", str(pid), "sh", "-c", 'exec cat >> "$1"', "sh"]
        with subprocess.Popen([*command, here / "file"], stdin=subprocess.PIPE) as writer:
            wait_until_equal(Path(f"/proc/{writer.pid}/comm").read_text, "cat\n")
            says = rf"cat \(pid {writer.pid}\) has a file in it open"
            with pytest.raises(FailedPrecondition, match=says):
                populated.commit("done", "work")
            assert mounted_on(here)
            assert is_writable(here)
            writer.terminate()
    populated.commit("done", "work")


@pytest.mark.parametrize("kind", [whole_tree, part_of_tree, tree_through_alias])
def test_remove_of_a_snapshot_mounted_by_hand_raises_failed_precondition(
    populated: Snapshotter, places: Path, kind: object
) -> None:
    here = make_target(places)
    assert callable(kind)
    arguments = kind(populated, places)
    with ExitStack() as stack:
        if kind is tree_through_alias:
            stack.enter_context(
                mount_by_hand("--bind", populated.state_directory, places / "alias")
            )
        with mount_by_hand(*arguments, here):
            before = directories(populated)
            with pytest.raises(FailedPrecondition, match=f'"work": it is mounted.* "{here}" first'):
                populated.remove("work")
            assert directories(populated) == before
            populated.remove("lone")
    populated.remove("work")


def test_remove_with_a_file_mounted_by_hand_raises_failed_precondition(
    populated: Snapshotter, places: Path
) -> None:
    here = places / "file"
    here.touch()
    with (
        mount_by_hand("--bind", tree_of(populated) / "file", here),
        pytest.raises(FailedPrecondition, match="is mounted"),
    ):
        populated.remove("work")
    populated.remove("work")


def test_remove_with_a_mount_inside_the_tree_raises_failed_precondition(
    populated: Snapshotter,
) -> None:
    inside = tree_of(populated) / "deep" / "inside"
    inside.mkdir(parents=True)
    with mount_tmpfs(inside):
        with pytest.raises(FailedPrecondition, match='in it on "deep/inside"') as caught:
            populated.remove("work")
        assert str(populated.state_directory) not in str(caught.value)
    populated.remove("work")


def test_remove_before_unmount_raises_failed_precondition(
    populated: Snapshotter, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    populated.mounter.mount("look", str(here))
    populated.mounter.mount("work", str(there))
    for key, target in (("look", here), ("work", there)):
        with pytest.raises(FailedPrecondition, match=f'unmount "{target}" first'):
            populated.remove(key)
    with pytest.raises(FailedPrecondition, match="it has children"):
        populated.remove("base")
    populated.mounter.unmount(str(here))
    populated.remove("look")
    assert mount_targets(populated) == [str(there)]


def test_a_committed_snapshot_mounted_by_hand_cannot_be_removed(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)
    with mount_by_hand("--bind", tree_of(populated, "look"), here):
        for key in ("look", "work"):
            populated.remove(key)
        with pytest.raises(FailedPrecondition, match="is mounted"):
            populated.remove("base")
    populated.remove("base")


def test_commit_turns_mounts_read_only(populated: Snapshotter, places: Path) -> None:
    ours, theirs, other = (make_target(places, name) for name in ("ours", "theirs", "other"))
    populated.mounter.mount("work", str(ours))
    populated.mounter.mount("lone", str(other))
    with mount_by_hand("--bind", tree_of(populated), theirs), (ours / "file").open() as reading:
        assert is_writable(ours)
        assert is_writable(theirs)
        populated.commit("done", "work")
        assert not is_writable(ours)
        assert not is_writable(theirs)
        assert is_writable(other)
        assert reading.read() == "base"
        assert populated.mounter.list_mounts("done") == [
            Mounted(str(ours), "done", True, Lifetime.PERSISTENT, 0)
        ]
        state = populated.state_directory
        populated.close()
        with open_engine(state) as again:
            assert [mounted.read_only for mounted in again.mounter.list_mounts()] == [True, False]
            assert not is_writable(ours)


@contextmanager
def open_for_writing(path: Path) -> Iterator[None]:
    with path.open("a"):
        yield


@contextmanager
def map_for_writing(path: Path) -> Iterator[None]:
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    # The mapping has its own copy of the descriptor, and stays when the file is closed.
    try:
        yield
    finally:
        memory.close()


@pytest.mark.parametrize("use", [open_for_writing, map_for_writing])
@pytest.mark.parametrize("where", ["ours", "theirs"])
def test_commit_with_a_file_open_for_writing_raises_failed_precondition(
    populated: Snapshotter, places: Path, use: object, where: str
) -> None:
    assert callable(use)
    mounts = [make_target(places, name) for name in ("ours", "theirs")]
    populated.mounter.mount("work", str(mounts[0]))
    with mount_by_hand("--bind", tree_of(populated), mounts[1]):
        with use(places / where / "file"):
            with pytest.raises(FailedPrecondition) as caught:
                populated.commit("done", "work")
            assert f"(pid {os.getpid()}) has a file open for writing" in caught.value.message
            assert str(places / where) in caught.value.message
            assert populated.stat("work").kind is Kind.ACTIVE
            assert all(is_writable(mount) for mount in mounts)
            assert [mounted.read_only for mounted in populated.mounter.list_mounts()] == [False]
        populated.commit("done", "work")
        assert not any(is_writable(mount) for mount in mounts)


@pytest.mark.parametrize("how", ["seal", "sync", "cancel"])
def test_a_failed_commit_turns_the_mounts_writable_again(
    populated: Snapshotter, places: Path, how: str
) -> None:
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    job = Job()
    with pytest.MonkeyPatch.context() as patch:
        match how:
            case "seal":
                patch.setattr(trees.Crew, "seal", failing_function(errno.EIO))
            case "sync":
                patch.setattr(StateDirectory, "sync", failing_function(errno.ENOSPC))
            case "cancel":
                job = Job(lambda: job.cancel())
        with pytest.raises(SnapdError):
            populated.commit("done", "work", job=job)
    assert "work" in snapshot_names(populated)
    assert is_writable(here)
    if how != "sync":
        populated.commit("done", "work")
        assert not is_writable(here)


def test_mount_and_open_tree_during_commit_raise_failed_precondition(
    populated: Snapshotter, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    populated.mounter.mount("work", str(here))
    with ThreadPoolExecutor(1) as pool, hold_function(trees.Crew, "seal") as held:
        committing = pool.submit(populated.commit, "done", "work")
        held.wait_until_reached()
        assert not is_writable(here)
        for call in (
            lambda: populated.mounter.mount("work", str(there)),
            lambda: populated.mounter.open_tree("work"),
        ):
            with pytest.raises(FailedPrecondition, match="is being committed"):
                call()
        # Calls on other snapshots succeed, and do not wait.
        populated.mounter.mount("lone", str(there))
        held.release()
        committing.result(WAIT_TIMEOUT)
    assert mounts_below(places) == [str(here), str(there)]


def test_commit_with_a_covered_mount_raises_failed_precondition(
    populated: Snapshotter, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    populated.mounter.mount("work", str(there))
    populated.mounter.mount("work", str(here))
    with mount_tmpfs(here):
        with pytest.raises(FailedPrecondition, match=f'"{here}" is mounted over it'):
            populated.commit("done", "work")
        assert is_writable(there)
        assert "work" in snapshot_names(populated)
    populated.commit("done", "work")


def test_commit_leaves_mounts_inside_the_tree_writable(
    populated: Snapshotter, places: Path
) -> None:
    """Mounts inside a mount of the snapshot are not changed."""
    here = make_target(places)
    (tree_of(populated) / "inside").mkdir()
    populated.mounter.mount("work", str(here))
    with mount_tmpfs(here / "inside"):
        populated.commit("done", "work")
        assert not is_writable(here)
        assert is_writable(here / "inside")
        assert mounted_on(here / "inside")


def test_usage_commit_and_prepare_skip_mounts_inside_the_tree(populated: Snapshotter) -> None:
    before = populated.usage("work")
    inside = tree_of(populated) / "inside"
    inside.mkdir()
    with mount_tmpfs(inside):
        (inside / "elsewhere").touch()
        assert populated.usage("work").inodes == before.inodes + 1
        populated.commit("done", "work")
        copy = Path(populated.prepare("copy", "done").source)
        assert list((copy / "inside").iterdir()) == []


@contextmanager
def mount_overlay(on: Path, lower: str, upper: str = "") -> Iterator[None]:
    """Mount an overlay for the block."""
    options = f"lowerdir={lower}" + (f",upperdir={upper}/upper,workdir={upper}/work" * bool(upper))
    with mount_by_hand("-t", "overlay", "-o", options, "overlay", on):
        yield


def test_remove_is_refused_while_an_overlay_shows_the_tree(
    populated: Snapshotter, places: Path
) -> None:
    here, odd = make_target(places), make_target(places, "a:b,c \\ d")
    escaped = str(odd).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    layers = f"{escaped}:{populated.mounts('lone').source}"
    says = f'overlay on "{here}" shows it'
    with mount_overlay(here, layers), pytest.raises(FailedPrecondition, match=says):
        populated.remove("lone")
    populated.remove("lone")
