"""Mount loops inside of trees, mounts of the state or the root, and mounts that are moved."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapd_native import mounts, trees
from snapd_native.errors import DataLoss, FailedPrecondition
from snapd_native.snapshotter import Snapshotter
from tests.support.commands import run_command
from tests.support.engine import id_of
from tests.support.file_systems import on_ext4
from tests.support.holding import hold_function
from tests.support.kernel_mounts import is_writable, make_target, mount_targets, mounts_below
from tests.support.service import check_sentence
from tests.support.waiting import wait_until_equal

pytestmark = on_ext4

UNTOUCHED = "nothing of this is copied or deleted\n"


@pytest.fixture
def outside(scratch: Path) -> Path:
    """Make a directory outside the state that no call may change."""
    path = scratch / "outside"
    path.mkdir()
    (path / "secret").write_text(UNTOUCHED)
    return path


@pytest.fixture
def tree(engine: Snapshotter, places: Path) -> Path:
    """Make the active snapshot `work`: a file and three directories."""
    assert places.is_dir()
    root = Path(engine.prepare("work").source)
    (root / "file").write_text("file\n")
    for name in "abc":
        (root / name).mkdir()
        (root / name / "hidden").write_text("hidden\n")
    return root


def mount_tree_in_itself(tree: Path, _: Path) -> None:
    run_command("mount", "--bind", str(tree), str(tree / "a"))
    run_command("mount", "--bind", str(tree), str(tree / "a" / "b"))


def mount_tree_in_itself_repeatedly(tree: Path, _: Path) -> None:
    for name in "abcabc":
        run_command("mount", "--rbind", str(tree), str(tree / name))


def mount_state(tree: Path, _: Path) -> None:
    run_command("mount", "--bind", str(tree.parents[1]), str(tree / "a"))
    run_command("mount", "--bind", str(tree.parents[1] / "snapshots"), str(tree / "b"))


def mount_root_and_proc(tree: Path, _: Path) -> None:
    run_command("mount", "--bind", "/", str(tree / "a"))
    run_command("mount", "--make-private", str(tree / "a"))
    run_command("mount", "--rbind", "/proc", str(tree / "b"))


def mount_outside(tree: Path, outside: Path) -> None:
    run_command("mount", "--bind", str(outside), str(tree / "a"))
    run_command("mount", "--bind", str(outside / "secret"), str(tree / "file"))


MOUNT_LOOPS = [
    mount_tree_in_itself,
    mount_tree_in_itself_repeatedly,
    mount_state,
    mount_root_and_proc,
    mount_outside,
]


@pytest.mark.parametrize("loop", MOUNT_LOOPS)
def test_mounts_inside_a_tree_are_not_measured_copied_or_deleted(
    engine: Snapshotter, tree: Path, outside: Path, loop: Callable[[Path, Path], None]
) -> None:
    usage = engine.usage("work")
    loop(tree, outside)
    assert len(mounts_below(tree)) >= 2
    assert engine.usage("work") == usage
    with pytest.raises(FailedPrecondition, match="mounted"):
        engine.remove("work")
    if loop is mount_tree_in_itself_repeatedly:
        # Some mounts are covered by others, and cannot be made read-only.
        with pytest.raises(FailedPrecondition, match="mounted"):
            engine.commit("done", "work", digest=True)
        unmount_below(tree)
    engine.commit("done", "work", digest=True)
    assert engine.usage("done") == usage
    engine.upkeep.verify("done")
    copy = Path(engine.prepare("copy", "done").source)
    assert engine.usage("copy").inodes == usage.inodes
    assert sorted(os.listdir(copy)) == ["a", "b", "c", "file"]
    assert [os.listdir(copy / name) for name in "abc"] == [["hidden"]] * 3
    engine.remove("copy")
    engine.upkeep.cleanup()
    if mounts_below(tree):
        with pytest.raises(FailedPrecondition, match="mounted"):
            engine.remove("done")
    unmount_below(tree)
    engine.remove("done")
    engine.upkeep.cleanup()
    assert (outside / "secret").read_text() == UNTOUCHED
    assert engine.upkeep.check() == []


@pytest.mark.parametrize("loop", MOUNT_LOOPS)
def test_cleanup_deletes_no_files_of_mounts_made_in_a_removed_tree(
    engine: Snapshotter, tree: Path, outside: Path, loop: Callable[[Path, Path], None]
) -> None:
    """The mounts are made after Remove and before the deletion of the directory."""
    engine.prepare("other")
    gone = tree.parent / f"rm-{id_of(engine, 'work')}"
    with hold_function(trees, "delete") as held:
        engine.remove("work")
        held.wait_until_reached()
        loop(gone, outside)
        held.release()
        with pytest.raises(FailedPrecondition, match="mounted in it"):
            engine.upkeep.cleanup()
    assert (outside / "secret").read_text() == UNTOUCHED
    assert engine.mounts("other")
    unmount_below(gone)
    engine.upkeep.cleanup()
    assert not gone.exists()
    assert engine.upkeep.check() == []
    assert (outside / "secret").read_text() == UNTOUCHED


@pytest.mark.parametrize("loop", MOUNT_LOOPS)
def test_a_tree_with_mount_loops_can_be_mounted_read_only(
    engine: Snapshotter,
    tree: Path,
    places: Path,
    outside: Path,
    loop: Callable[[Path, Path], None],
) -> None:
    here = str(make_target(places))
    loop(tree, outside)
    engine.mounter.mount("work", here, read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        (places / "here" / "a" / "new").touch()
    os.close(engine.mounter.open_tree("work"))
    engine.mounter.unmount(here, lazy=True)
    assert mounts_below(places) == []
    unmount_below(tree)
    engine.remove("work")
    engine.upkeep.cleanup()


def unmount_below(tree: Path) -> None:
    """Unmount all mounts inside a tree."""
    for target in reversed(mounts_below(tree)):
        run_command("umount", "--lazy", target)
    assert mounts_below(tree) == []


@pytest.mark.parametrize(
    ("step", "call"),
    [
        pytest.param("detach", lambda e, here: e.mounter.unmount(here), id="unmount"),
        pytest.param("detach", lambda e, here: e.mounter.unmount(here, lazy=True), id="lazily"),
        pytest.param(
            *("make_read_only", lambda e, here: e.mounter.unmount(here, lazy=True)), id="read-only"
        ),
        pytest.param("make_read_only", lambda e, _: e.commit("done", "work"), id="commit"),
    ],
)
def test_unmount_and_commit_of_a_moving_mount_raise_failed_precondition(
    populated: Snapshotter,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    call: Callable[[Snapshotter, str], object],
) -> None:
    """A mount point cannot be renamed, but the directory above it can."""
    before, after = places / "before", places / "after"
    before.mkdir()
    here = make_target(before)
    populated.mounter.mount("work", str(here))
    real = getattr(mounts, step)

    def moving(*arguments: object, **options: object) -> None:
        one, other = (before, after) if before.exists() else (after, before)
        one.rename(other)
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mounts, step, moving)
        with pytest.raises(FailedPrecondition, match="is being moved, try again") as caught:
            call(populated, str(here))
    check_sentence(caught.value.message, str(here))
    (moved,) = places.glob("*/here")
    assert mount_targets(populated) == [str(moved)]
    assert is_writable(moved)
    call(populated, str(moved))


def test_commit_makes_a_mount_read_only_although_it_moves_once(
    populated: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = places / "before", places / "after"
    before.mkdir()
    populated.mounter.mount("work", str(make_target(before)))
    real = mounts.make_read_only

    def moving(*arguments: Any) -> None:  # noqa: ANN401 - whatever it takes
        if before.exists():
            before.rename(after)
        real(*arguments)

    monkeypatch.setattr(mounts, "make_read_only", moving)
    populated.commit("done", "work")
    assert not is_writable(after / "here")


def test_a_failed_commit_turns_a_moved_mount_writable_again(
    populated: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = places / "before", places / "after"
    before.mkdir()
    populated.mounter.mount("work", str(make_target(before)))

    def moving(*_: object) -> None:
        assert not is_writable(before / "here")
        before.rename(after)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(trees.Crew, "seal", moving)
        with pytest.raises(DataLoss):
            populated.commit("done", "work")
    assert is_writable(after / "here")


def test_a_moved_mount_of_a_leaving_client_is_unmounted(
    populated: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = places / "before", places / "after"
    before.mkdir()
    here = make_target(before)
    populated.mounter.mount("look", str(here), owner="a client")
    real = mounts.detach

    def moving(entry: mounts.Entry, *, lazy: bool = False) -> None:
        if before.exists():
            before.rename(after)
        real(entry, lazy=lazy)

    monkeypatch.setattr(mounts, "detach", moving)
    populated.mounter.release("a client")
    wait_until_equal(lambda: mounts_below(places), [])
