"""A disk without a free inode: calls that create no file succeed, and others are undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from snapd_native.errors import ResourceExhausted
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import directories, names, opened
from tests.support.file_systems import FileSystem, mounted
from tests.support.full_disk import (
    FEW_INODES,
    SIZES,
    check_reads,
    check_refused,
    fill,
    kill,
    make_room,
    use_up_inodes,
)
from tests.support.waiting import eventually


@pytest.fixture(params=SIZES)
def few(request: pytest.FixtureRequest, loop_directory: Path) -> Iterator[FileSystem]:
    name = request.param
    with mounted(name, SIZES[name], loop_directory, FEW_INODES[name]) as made:
        yield made


def test_a_call_refused_without_free_inodes_changes_nothing(
    few: FileSystem, tmp_path: Path
) -> None:
    with opened(few.root / "state") as engine:
        fill(engine)
        target = engine.mounter.mount("look", str(tmp_path))
        use_up_inodes(few.root)
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
        use_up_inodes(few.root)
        for key in ("view", "look", "done", "base 0"):
            engine.remove(key)
            engine.upkeep.cleanup()
        assert engine.upkeep.check() == []
        make_room(few.root)
        engine.prepare("work", "base 1")
        for call in calls.values():
            call()
        for mounted_tree in engine.mounter.list_mounts():
            engine.mounter.unmount(mounted_tree.target)
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("killed", [False, True])
def test_start_without_inodes_is_refused_unless_deletions_free_some(
    few: FileSystem, killed: bool
) -> None:
    """The start raises ResourceExhausted, unless it deletes directories and so frees inodes."""
    state = few.root / "state"
    with opened(state) as engine:
        fill(engine)
    if killed:
        kill(state)
    use_up_inodes(few.root)
    for _ in range(0 if killed else 2):
        with pytest.raises(ResourceExhausted, match="free"), opened(state):
            pass
    if not killed:
        make_room(few.root)
    with ExitStack() as stack:
        # xfs frees the inodes of deleted files in the background, perhaps only for a later start.
        # Even the start after a successful one may find none.
        engine = started(stack, state)
        check_reads(engine)
        assert len(directories(engine)) == 5
        assert ("last" in names(engine)) is killed
        assert engine.upkeep.check() == []


def started(stack: ExitStack, state: Path) -> Snapshotter:
    """Open an engine that ``stack`` closes, as soon as there are inodes for its start."""
    engines: list[Snapshotter] = []

    def starts() -> bool:
        with suppress(ResourceExhausted):
            engines.append(stack.enter_context(opened(state)))
        return bool(engines)

    eventually(starts)
    return engines[0]
