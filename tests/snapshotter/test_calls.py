"""Each call of Snapshotter, on ext4 and xfs."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from snapd_native.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from snapd_native.model import Added, Change, Committed, Kind, Mount, Removed, Updated, Usage
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import (
    directories,
    identity,
    names,
    opened,
    read,
    write,
)


def test_prepare_without_parent_makes_an_empty_directory(engine: Snapshotter) -> None:
    mount = engine.prepare("key")
    assert mount == Mount("bind", mount.source, ("rbind", "rw"))
    assert Path(mount.source).parent == engine.state_directory / "snapshots"
    assert Path(mount.source).name.isdigit()
    assert stat.S_IMODE(os.stat(mount.source).st_mode) == 0o755
    assert read(mount) == {}
    assert engine.mounts("key") == mount


def test_prepare_makes_a_private_copy_of_the_parent(full: Snapshotter) -> None:
    first, second = full.prepare("first", "base"), full.mounts("work")
    assert read(first) == read(second) == {"file": "base", "other": "more"}
    write(first, file="changed")
    (Path(first.source) / "other").unlink()
    assert read(second) == read(full.mounts("look")) == {"file": "base", "other": "more"}


def test_a_view_is_read_only_and_shares_the_directory_of_its_parent(full: Snapshotter) -> None:
    mount = full.mounts("look")
    assert mount.options == ("rbind", "ro")
    assert Path(mount.source).name == identity(full, "base")
    assert full.view("look too", "base") == mount
    empty = full.view("empty")
    assert empty.options == ("rbind", "ro")
    assert read(empty) == {}
    assert directories(full) == {identity(full, key) for key in ("base", "work", "lone", "empty")}


def test_commit_keeps_the_tree_under_the_new_name(full: Snapshotter) -> None:
    mount = full.mounts("work")
    write(mount, new="new", file="changed")
    before = full.stat("work")
    full.commit("done", "work", {"of": "done", "empty": ""})
    info = full.stat("done")
    assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"of": "done"})
    assert info.created == info.updated > before.created
    with pytest.raises(NotFound):
        full.stat("work")
    with pytest.raises(FailedPrecondition):
        full.mounts("done")
    expected = {"file": "changed", "other": "more", "new": "new"}
    assert read(full.view("v", "done")) == read(full.prepare("p", "done")) == expected
    assert full.view("w", "done").source == mount.source


def test_commit_without_labels_clears_the_labels(full: Snapshotter) -> None:
    full.commit("done", "work")
    assert full.stat("done").labels == {}


def test_commit_can_set_the_parent_of_a_snapshot_without_one(full: Snapshotter) -> None:
    write(full.mounts("lone"), own="own")
    full.commit("rebased", "lone", parent="base")
    assert full.stat("rebased").parent == "base"
    assert read(full.view("v", "rebased")) == {"own": "own"}
    for key in ("look", "work"):
        full.remove(key)
    with pytest.raises(FailedPrecondition, match="it has children"):
        full.remove("base")


def test_commit_accepts_the_parent_that_the_snapshot_has(full: Snapshotter) -> None:
    full.commit("done", "work", parent="base")
    assert full.stat("done").parent == "base"


@pytest.mark.parametrize(
    ("labels", "paths", "expected"),
    [
        ({"a": "1"}, [], {"a": "1"}),
        ({"a": "1"}, ["labels"], {"a": "1"}),
        ({}, [], {}),
        ({"a": "", "b": "2"}, ["labels"], {"b": "2"}),
        ({"of": "new", "x": "y"}, ["labels.of"], {"of": "new", "dotted.key/x": "old"}),
        ({"dotted.key/x": "new"}, ["labels.dotted.key/x"], {"of": "work", "dotted.key/x": "new"}),
        ({"": "x"}, ["labels.of"], None),
        ({}, ["labels.of"], {"dotted.key/x": "old"}),
        ({"of": ""}, ["labels.of"], {"dotted.key/x": "old"}),
        ({}, ["labels.absent"], {"of": "work", "dotted.key/x": "old"}),
        ({"a": "1", "b": "2"}, ["labels.a", "labels.b", "labels.of"],
         {"a": "1", "b": "2", "dotted.key/x": "old"}),
        ({"a": "1", "b": "2"}, ["labels.of", "labels"], {"a": "1", "b": "2"}),
        ({"a": "1"}, ["parent"], None),
        ({"a": "1"}, ["labels."], None),
        ({"a": "1"}, ["labelsx.a"], None),
        ({"a": "1"}, [""], None),
        ({"a": "1"}, ["labels", "kind"], None),
    ],
)  # fmt: skip
def test_update_changes_the_labels_that_the_field_paths_name(
    full: Snapshotter, labels: dict[str, str], paths: list[str], expected: dict[str, str] | None
) -> None:
    before = full.stat("work")
    if expected is None:
        with pytest.raises(InvalidArgument):
            full.update("work", labels, paths)
        assert full.stat("work") == before
        return
    after = full.update("work", labels, paths)
    assert after == full.stat("work")
    assert after.labels == expected
    assert (after.created, after.kind, after.parent) == (before.created, before.kind, before.parent)
    assert after.updated > before.updated


def test_update_sets_the_labels_of_every_kind_of_snapshot(full: Snapshotter) -> None:
    for name in ("base", "work", "look", "lone"):
        assert full.update(name, {"a": "b"}).labels == {"a": "b"}


def test_usage_agrees_with_du_and_is_zero_for_views(full: Snapshotter) -> None:
    tree = Path(full.mounts("work").source)
    (tree / "large").write_bytes(b"x" * 300_000)
    os.link(tree / "large", tree / "linked")
    with (tree / "hole").open("wb") as file:
        file.truncate(1 << 30)
    os.sync()
    expected = Usage(du(tree, "--block-size=1"), du(tree, "--inodes"))
    assert expected.inodes == 5
    assert full.usage("work") == expected
    full.commit("done", "work")
    (tree / "behind its back").write_bytes(b"x" * 300_000)
    assert full.usage("done") == expected
    assert full.usage("look") == Usage(0, 0)
    full.view("empty")
    assert full.usage("empty") == Usage(0, 0)


def du(tree: Path, what: str) -> int:
    command = ["du", "--summarize", what, str(tree)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout.split()[0])


def test_remove_frees_the_name_and_cleanup_deletes_the_directory(full: Snapshotter) -> None:
    with pytest.raises(FailedPrecondition, match='cannot remove "base": it has children'):
        full.remove("base")
    gone = {identity(full, "work"), identity(full, "base")}
    for name in ("work", "look", "base"):
        full.remove(name)
        with pytest.raises(NotFound):
            full.remove(name)
    assert names(full) == ["lone"]
    assert read(full.prepare("base")) == {}
    full.upkeep.cleanup()
    assert directories(full) == {identity(full, "lone"), identity(full, "base")}
    assert not directories(full) & gone


def test_list_raises_cancelled_as_soon_as_is_wanted_returns_false(full: Snapshotter) -> None:
    asked: list[None] = []

    def is_wanted() -> bool:
        asked.append(None)
        return len(asked) < 3

    with pytest.raises(Cancelled):
        full.list(is_wanted=is_wanted)
    assert len(asked) == 3


def test_list_is_sorted_and_can_be_filtered_and_paged(full: Snapshotter) -> None:
    assert names(full) == ["base", "lone", "look", "work"]
    assert [info.name for info in full.list(["parent==base"], after="look", limit=1)] == ["work"]
    for limit in (0, -1, 10001):
        with pytest.raises(InvalidArgument):
            full.list(limit=limit)
    with pytest.raises(InvalidArgument):
        full.list(["name="])
    with pytest.raises(InvalidArgument):
        full.list(after="x" * 4097)


def test_each_change_is_reported_once_and_in_order(state: Path) -> None:
    told: list[Change] = []
    with opened(state, told.append) as engine:
        engine.prepare("a")
        engine.commit("b", "a")
        engine.view("c", "b")
        engine.update("c", {"x": "y"})
        with pytest.raises(FailedPrecondition):
            engine.remove("b")
        engine.remove("c")
        engine.upkeep.cleanup()
    assert told == [
        Added("a", Kind.ACTIVE, ""),
        Committed("b", "a"),
        Added("c", Kind.VIEW, "b"),
        Updated("c"),
        Removed("c"),
    ]
