"""After a failure, a crash or a power cut each call is complete or undone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd_native import linux, trees
from snapd_native.errors import (
    DataLoss,
    FailedPrecondition,
    ResourceExhausted,
    SnapdError,
)
from snapd_native.metastore import Metastore
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests.support import PROJECT, torture_tree
from tests.support.engine import (
    POPULATED_NAMES,
    directories,
    failing_function,
    id_of,
    open_engine,
    read_files,
    run_until_reached_and_kill,
    snapshot_names,
)
from tests.support.file_systems import (
    is_free,
    long_on_xfs,
    new_file_system,
    on_ext4,
    unmount_when_free,
)
from tests.support.service import check_sentence
from tests.support.waiting import WAIT_TIMEOUT, wait_until

pytestmark = long_on_xfs

# The errors of open(2), read(2), write(2), copy_file_range(2), ioctl_ficlone(2), fallocate(2),
# link(2), mkdir(2), mknod(2), symlink(2), rename(2), unlink(2), rmdir(2), setxattr(2), chown(2) and
# utimensat(2), without those of a wrong call and of a tree that changes during the call.
DOCUMENTED = (
    *("EACCES", "EAGAIN", "EBUSY", "EDQUOT", "EEXIST", "EFBIG", "EIO", "EMFILE", "EMLINK"),
    *("ENAMETOOLONG", "ENFILE", "ENODEV", "ENOMEM", "ENOSPC", "ENOTEMPTY", "EOPNOTSUPP"),
    *("EOVERFLOW", "EPERM", "EPIPE", "EROFS", "ETXTBSY"),
)


@on_ext4
@pytest.mark.parametrize("name", DOCUMENTED)
def test_prepare_says_what_to_do_about_each_documented_system_error(
    populated: Snapshotter, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for owner, function in ((StateDirectory, "create"), (trees.Crew, "clone")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, function, failing_function(getattr(errno, name)))
            kinds = (FailedPrecondition, ResourceExhausted, DataLoss)
            with pytest.raises(kinds) as caught:
                populated.prepare("new", "base")
        check_sentence(caught.value.message, 'cannot prepare "new" from "base": ')
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EMFILE, ResourceExhausted),
        (errno.EIO, DataLoss),
        (errno.ESTALE, FailedPrecondition),
    ],
)
@pytest.mark.parametrize(
    ("owner", "function"),
    [
        (StateDirectory, "create"),
        (trees.Crew, "clone"),
        (StateDirectory, "complete"),
        (StateDirectory, "sync"),
        (trees.Crew, "seal"),
    ],
)
def test_a_failed_system_call_undoes_prepare_and_commit(
    populated: Snapshotter, owner: object, function: str, code: int, error: type[SnapdError]
) -> None:
    before = directories(populated), populated.list()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, failing_function(code))
        committing = function in ("seal", "sync")
        call = populated.commit if committing else populated.prepare
        with pytest.raises(error) as caught:
            call("new", "work" if committing else "base")
        # Wait for the background syncs, so that none of them fails later.
        populated._syncer.submit(lambda: None).result(WAIT_TIMEOUT)
    assert "/a/path" not in str(caught.value)
    assert (directories(populated), populated.list()) == before
    populated.prepare("new", "base")
    populated.commit("done", "new" if function == "sync" else "work")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_snapshot_active_at_a_failed_sync_can_never_be_committed(
    populated: Snapshotter, code: int
) -> None:
    """The kernel reports the error once, to the first Commit, and then drops the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateDirectory, "sync", failing_function(code))
        with pytest.raises(SnapdError):
            populated.commit("done", "work")
        populated._syncer.submit(lambda: None).result(WAIT_TIMEOUT)
    for key in ("work", "lone"):
        with pytest.raises(DataLoss, match="prepare it anew"):
            populated.commit("done", key)
        populated.remove(key)
    populated.prepare("work", "base")
    populated.commit("done", "work")
    assert snapshot_names(populated) == ["base", "done", "look"]


@pytest.mark.parametrize("function", ["publish", "publish_commit"])
def test_a_failed_metastore_write_undoes_the_call(populated: Snapshotter, function: str) -> None:
    before = directories(populated), populated.list()

    def failing(*_: object) -> None:
        raise ResourceExhausted("no room is left for the metadata")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metastore, function, failing)
        calls: list[Callable[[], object]] = [lambda: populated.commit("new", "work")]
        if function == "publish":
            calls = [
                lambda: populated.prepare("new", "base"),
                lambda: populated.view("new", "base"),
            ]
        for call in calls:
            with pytest.raises(ResourceExhausted):
                call()
    assert (directories(populated), populated.list()) == before
    populated.prepare("new", "base")
    populated.commit("done", "work")


@pytest.mark.parametrize("scarce", ["blocks", "inodes"])
def test_prepare_on_a_full_disk_is_undone(loop_directory: Path, scarce: str) -> None:
    with (
        new_file_system("ext4", 17 << 20, loop_directory) as disk,
        open_engine(disk.root / "state") as engine,
    ):
        tree = Path(engine.prepare("preparing").source)
        if scarce == "blocks":
            (tree / "large").write_bytes(os.urandom(5 << 20))
        for number in range(800 if scarce == "inodes" else 0):
            (tree / str(number)).touch()
        engine.commit("base", "preparing")
        engine.prepare("one", "base")
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match="try again"):
                engine.prepare("another", "base")
            assert snapshot_names(engine) == ["base", "one"]
            assert len(directories(engine)) == 2
        engine.remove("one")
        engine.upkeep.cleanup()
        copy = engine.prepare("another", "base")
        assert torture_tree.differences(tree, Path(copy.source)) == ""


CRASH = """
import os, sys
from pathlib import Path
from snapd_native import trees
from snapd_native.metastore import Metastore
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory

def wait_for_kill(*_, **__):
    print("reached", flush=True)
    sys.stdin.read()

def hold_after_copy(crew, source, target, step, *, reflink):
    real(crew, source, target, step, reflink=reflink)
    wait_for_kill()

engine = Snapshotter(Path(sys.argv[1]), lambda *_: None)
engine._syncer.submit(lambda: None).result()
real = trees.Crew.clone
if sys.argv[2] == "clone":
    trees.Crew.clone = hold_after_copy
else:
    owner = next(o for o in (StateDirectory, Metastore, Snapshotter) if hasattr(o, sys.argv[2]))
    setattr(owner, sys.argv[2], wait_for_kill)
eval(sys.argv[3])
engine._reaper._background.submit(lambda: None).result()
engine._syncer.submit(lambda: None).result()
print("not reached")
"""

PREPARE, COMMIT = "engine.prepare('new', 'base')", "engine.commit('done', 'work')"
EMPTY, VIEW, REMOVE = "engine.prepare('new')", "engine.view('new', 'base')", "engine.remove('work')"


@pytest.mark.parametrize(
    ("where", "call", "after"),
    [
        ("clone", PREPARE, POPULATED_NAMES),
        ("complete", PREPARE, POPULATED_NAMES),
        ("publish", PREPARE, POPULATED_NAMES),
        ("_mount", PREPARE, ["base", "lone", "look", "new", "work"]),
        ("sync", PREPARE, ["base", "lone", "look", "new", "work"]),
        ("settle", PREPARE, ["base", "lone", "look", "new", "work"]),
        ("complete", EMPTY, POPULATED_NAMES),
        ("publish", EMPTY, POPULATED_NAMES),
        ("publish", VIEW, POPULATED_NAMES),
        ("sync", COMMIT, POPULATED_NAMES),
        ("publish_commit", COMMIT, POPULATED_NAMES),
        ("release", COMMIT, ["base", "done", "lone", "look"]),
        ("remove", REMOVE, POPULATED_NAMES),
        ("retire", REMOVE, ["base", "lone", "look"]),
        ("delete", REMOVE, ["base", "lone", "look"]),
    ],
)
def test_after_a_crash_each_call_is_complete_or_undone(
    populated_state: Path, where: str, call: str, after: list[str]
) -> None:
    run_until_reached_and_kill(CRASH, populated_state, where, call)
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == after
        owners = {name for name in after if name != "look"}
        assert directories(engine) == {id_of(engine, name) for name in owners}
        for name in {"work", "new"} & set(after):
            assert read_files(engine.mounts(name)) == {"file": "base", "other": "more"}
        if "new" not in after:
            assert read_files(engine.prepare("new", "base")) == {"file": "base", "other": "more"}
        if "done" not in after:
            engine.prepare("done")


POWER_CUT = """
import fcntl, os, struct, sys
from pathlib import Path
from snapd_native.snapshotter import Snapshotter

root = Path(sys.argv[1])
engine = Snapshotter(root / "state", lambda *_: None)
tree = Path(engine.prepare("preparing").source)
for number in range(20):
    (tree / str(number)).write_bytes(os.urandom(100_000))
    (tree / f"directory {number}").mkdir()
    (tree / f"directory {number}" / "file").write_text(str(number))
content = b"".join((tree / str(number)).read_bytes() for number in range(20))
engine.prepare("gone")
engine.commit("base", "preparing", {"a": "b"})
engine.prepare("work", "base")
engine.prepare("empty")
engine.view("look", "base")
engine.update("look", {"a": "b"})
engine.remove("gone")
engine._syncer.submit(lambda: None).result()
engine._write_back.settle = lambda: None
engine.prepare("late", "base")
# FS_IOC_SHUTDOWN with FSOP_GOING_FLAGS_NOLOGFLUSH: what is not on disk by now is lost.
fd = os.open(root, os.O_RDONLY)
fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 2))
sys.stdout.buffer.write(content)
sys.stdout.buffer.flush()
os._exit(0)
"""


@pytest.mark.parametrize("reboot", [True, False])
@pytest.mark.parametrize("name", ["ext4", "xfs"])
def test_completed_calls_survive_a_power_cut(
    loop_directory: Path, name: str, reboot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Prepare that was not synced before the cut is lost, and leaves nothing."""
    with new_file_system(name, 512 << 20, loop_directory) as disk:
        command = [sys.executable, "-c", POWER_CUT, str(disk.root)]
        done = subprocess.run(command, check=True, capture_output=True, cwd=PROJECT)
        mount_again(disk.root)
        if reboot:
            monkeypatch.setattr(linux, "boot_id", lambda: "the next boot")
        with open_engine(disk.root / "state") as engine:
            assert snapshot_names(engine) == ["base", "empty", "look", "work"]
            assert engine.stat("look").labels == engine.stat("base").labels == {"a": "b"}
            assert read_files(engine.mounts("empty")) == {}
            for key in ("look", "work"):
                tree = Path(engine.mounts(key).source)
                content = b"".join((tree / str(number)).read_bytes() for number in range(20))
                assert content == done.stdout
                for number in range(20):
                    assert (tree / f"directory {number}" / "file").read_text() == str(number)
            owners = {id_of(engine, key) for key in ("base", "empty", "work")}
            assert directories(engine) == owners


def mount_again(root: Path) -> None:
    """Unmount a loop device's file system and mount it again, as after a reboot."""
    device = subprocess.run(
        ["findmnt", "--noheadings", "--output", "SOURCE", str(root)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # The kernel does not detach an open loop device with its last mount.
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        unmount_when_free(root)
        # Workers that have not ended yet hold clones of the mount.
        wait_until(lambda: is_free(device))
        subprocess.run(["mount", device, str(root)], check=True)
    finally:
        os.close(fd)
