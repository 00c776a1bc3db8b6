"""A disk without a free inode: calls that create no file succeed, and others are undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from snapd_native.errors import ResourceExhausted, Unavailable
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import directories, open_engine, snapshot_names
from tests.support.file_systems import FileSystem, new_file_system
from tests.support.full_disk import (
    FEW_INODES,
    SMALL_SIZES,
    check_reads,
    check_refused,
    free_space,
    leave_as_killed,
    populate_large,
    use_all_inodes,
)
from tests.support.waiting import wait_until, wait_until_equal


@pytest.fixture(params=SMALL_SIZES)
def disk(request: pytest.FixtureRequest, loop_directory: Path) -> Iterator[FileSystem]:
    name = request.param
    with new_file_system(name, SMALL_SIZES[name], loop_directory, FEW_INODES[name]) as made:
        yield made


def test_a_call_refused_without_free_inodes_changes_nothing(
    disk: FileSystem, tmp_path: Path
) -> None:
    with open_engine(disk.root / "state") as engine:
        populate_large(engine)
        target = engine.mounter.mount("look", str(tmp_path))
        use_all_inodes(disk.root)
        calls: dict[str, Callable[[], object]] = {
            "copy": lambda: engine.prepare("copy", "base 1"),
            "empty": lambda: engine.prepare("empty"),
            "mount on a directory of its own": lambda: engine.mounter.mount("work"),
        }
        check_refused(engine, calls)
        engine.mounter.unmount(target)
        engine.view("view", "base 1")
        engine.update("base 1", {"a": "b"})
        engine.commit("done", "work")
        engine.mounter.mount("view", str(tmp_path))
        engine.mounter.unmount(target)
        use_all_inodes(disk.root)
        for key in ("view", "look", "done", "base 0"):
            engine.remove(key)
            engine.upkeep.cleanup()
        assert engine.upkeep.check() == []
        free_space(disk.root)
        engine.prepare("work", "base 1")
        for call in calls.values():
            call()
        for mounted_tree in engine.mounter.list_mounts():
            engine.mounter.unmount(mounted_tree.target)
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("killed", [False, True])
def test_start_without_inodes_is_refused_unless_deletions_free_some(
    disk: FileSystem, killed: bool
) -> None:
    """The start raises ResourceExhausted, unless it deletes directories and so frees inodes."""
    state = disk.root / "state"
    with open_engine(state) as engine:
        populate_large(engine)
    if killed:
        leave_as_killed(state)
    use_all_inodes(disk.root)
    for _ in range(0 if killed else 2):
        wait_until(lambda: is_refused(disk.root))
    if not killed:
        free_space(disk.root)
    with ExitStack() as stack:
        # xfs frees the inodes of deleted files in the background, perhaps only for a later start.
        # Even the start after a successful one may find none.
        engine = open_when_inodes_are_free(stack, state)
        check_reads(engine)
        # An incomplete standby clone is deleted in the background.
        wait_until_equal(lambda: len(directories(engine)), 5)
        assert ("last" in snapshot_names(engine)) is killed
        assert engine.upkeep.check() == []


def is_refused(root: Path) -> bool:
    """Use all inodes, and tell whether a start is refused for that.

    While xfs frees inodes in the background, it can succeed, or find a free inode when it looks for
    the reason of a failure.
    """
    use_all_inodes(root)
    try:
        with open_engine(root / "state"):
            return False
    except (ResourceExhausted, Unavailable) as error:
        return isinstance(error, ResourceExhausted) and "free" in error.message


def open_when_inodes_are_free(stack: ExitStack, state: Path) -> Snapshotter:
    """Open an engine that ``stack`` closes, as soon as there are inodes for its start."""
    engines: list[Snapshotter] = []

    def starts() -> bool:
        with suppress(ResourceExhausted, Unavailable):
            engines.append(stack.enter_context(open_engine(state)))
        return bool(engines)

    wait_until(starts)
    return engines[0]
