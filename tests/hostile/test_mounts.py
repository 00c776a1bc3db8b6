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
from tests.support.engine import gated, identity
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import below, place, targets, writable
from tests.support.sample_trees import run
from tests.support.service import check_sentence
from tests.support.waiting import becomes

pytestmark = on_ext4

KEPT = "nothing of this is copied or deleted\n"


@pytest.fixture
def outside(scratch: Path) -> Path:
    """Make a directory outside the state that no call may change."""
    path = scratch / "outside"
    path.mkdir()
    (path / "secret").write_text(KEPT)
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


def into_itself(tree: Path, _: Path) -> None:
    run("mount", "--bind", str(tree), str(tree / "a"))
    run("mount", "--bind", str(tree), str(tree / "a" / "b"))


def into_itself_again_and_again(tree: Path, _: Path) -> None:
    for name in "abcabc":
        run("mount", "--rbind", str(tree), str(tree / name))


def the_state(tree: Path, _: Path) -> None:
    run("mount", "--bind", str(tree.parents[1]), str(tree / "a"))
    run("mount", "--bind", str(tree.parents[1] / "snapshots"), str(tree / "b"))


def everything(tree: Path, _: Path) -> None:
    run("mount", "--bind", "/", str(tree / "a"))
    run("mount", "--make-private", str(tree / "a"))
    run("mount", "--rbind", "/proc", str(tree / "b"))


def what_is_outside(tree: Path, outside: Path) -> None:
    run("mount", "--bind", str(outside), str(tree / "a"))
    run("mount", "--bind", str(outside / "secret"), str(tree / "file"))


LOOPS = [into_itself, into_itself_again_and_again, the_state, everything, what_is_outside]


@pytest.mark.parametrize("loop", LOOPS)
def test_mounts_inside_a_tree_are_not_measured_copied_or_deleted(
    engine: Snapshotter, tree: Path, outside: Path, loop: Callable[[Path, Path], None]
) -> None:
    usage = engine.usage("work")
    loop(tree, outside)
    assert len(below(tree)) >= 2
    assert engine.usage("work") == usage
    with pytest.raises(FailedPrecondition, match="mounted"):
        engine.remove("work")
    if loop is into_itself_again_and_again:
        # Some mounts are covered by others, and cannot be made read-only.
        with pytest.raises(FailedPrecondition, match="mounted"):
            engine.commit("done", "work", digest=True)
        unmount(tree)
    engine.commit("done", "work", digest=True)
    assert engine.usage("done") == usage
    engine.upkeep.verify("done")
    copy = Path(engine.prepare("copy", "done").source)
    assert engine.usage("copy").inodes == usage.inodes
    assert sorted(os.listdir(copy)) == ["a", "b", "c", "file"]
    assert [os.listdir(copy / name) for name in "abc"] == [["hidden"]] * 3
    engine.remove("copy")
    engine.upkeep.cleanup()
    if below(tree):
        with pytest.raises(FailedPrecondition, match="mounted"):
            engine.remove("done")
    unmount(tree)
    engine.remove("done")
    engine.upkeep.cleanup()
    assert (outside / "secret").read_text() == KEPT
    assert engine.upkeep.check() == []


@pytest.mark.parametrize("loop", LOOPS)
def test_cleanup_deletes_no_files_of_mounts_made_in_a_removed_tree(
    engine: Snapshotter, tree: Path, outside: Path, loop: Callable[[Path, Path], None]
) -> None:
    """The mounts are made after Remove and before the deletion of the directory."""
    engine.prepare("other")
    gone = tree.parent / f"rm-{identity(engine, 'work')}"
    with gated("delete") as gate:
        engine.remove("work")
        gate.wait_until_reached()
        loop(gone, outside)
        gate.open()
        with pytest.raises(FailedPrecondition, match="mounted in it"):
            engine.upkeep.cleanup()
    assert (outside / "secret").read_text() == KEPT
    assert engine.mounts("other")
    unmount(gone)
    engine.upkeep.cleanup()
    assert not gone.exists()
    assert engine.upkeep.check() == []
    assert (outside / "secret").read_text() == KEPT


@pytest.mark.parametrize("loop", LOOPS)
def test_a_tree_with_mount_loops_can_be_mounted_read_only(
    engine: Snapshotter,
    tree: Path,
    places: Path,
    outside: Path,
    loop: Callable[[Path, Path], None],
) -> None:
    here = str(place(places))
    loop(tree, outside)
    engine.mounter.mount("work", here, read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        (places / "here" / "a" / "new").touch()
    os.close(engine.mounter.open_tree("work"))
    engine.mounter.unmount(here, lazy=True)
    assert below(places) == []
    unmount(tree)
    engine.remove("work")
    engine.upkeep.cleanup()


def unmount(tree: Path) -> None:
    """Unmount all mounts inside a tree."""
    for target in reversed(below(tree)):
        run("umount", "--lazy", target)
    assert below(tree) == []


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
    full: Snapshotter,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    call: Callable[[Snapshotter, str], object],
) -> None:
    """A mount point cannot be renamed, but the directory above it can."""
    before, after = places / "before", places / "after"
    before.mkdir()
    here = place(before)
    full.mounter.mount("work", str(here))
    real = getattr(mounts, step)

    def moving(*arguments: object, **options: object) -> None:
        one, other = (before, after) if before.exists() else (after, before)
        one.rename(other)
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mounts, step, moving)
        with pytest.raises(FailedPrecondition, match="is being moved, try again") as caught:
            call(full, str(here))
    check_sentence(caught.value.message, str(here))
    (moved,) = places.glob("*/here")
    assert targets(full) == [str(moved)]
    assert writable(moved)
    call(full, str(moved))


def test_commit_makes_a_mount_that_moves_once_read_only(
    full: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = places / "before", places / "after"
    before.mkdir()
    full.mounter.mount("work", str(place(before)))
    real = mounts.make_read_only

    def moving(*arguments: Any) -> None:  # noqa: ANN401 - whatever it takes
        if before.exists():
            before.rename(after)
        real(*arguments)

    monkeypatch.setattr(mounts, "make_read_only", moving)
    full.commit("done", "work")
    assert not writable(after / "here")


def test_a_failed_commit_turns_a_moved_mount_writable_again(
    full: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = places / "before", places / "after"
    before.mkdir()
    full.mounter.mount("work", str(place(before)))

    def moving(*_: object) -> None:
        assert not writable(before / "here")
        before.rename(after)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(trees.Crew, "measure", moving)
        with pytest.raises(DataLoss):
            full.commit("done", "work")
    assert writable(after / "here")


def test_a_moved_mount_of_a_leaving_client_is_unmounted(
    full: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = places / "before", places / "after"
    before.mkdir()
    here = place(before)
    full.mounter.mount("look", str(here), owner="a client")
    real = mounts.detach

    def moving(entry: mounts.Entry, *, lazy: bool = False) -> None:
        if before.exists():
            before.rename(after)
        real(entry, lazy=lazy)

    monkeypatch.setattr(mounts, "detach", moving)
    full.mounter.release("a client")
    becomes(lambda: below(places), [])
