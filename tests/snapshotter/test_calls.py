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
    id_of,
    open_engine,
    read_files,
    snapshot_names,
    write_files,
)
from tests.support.sealing import unsealed


def test_prepare_without_parent_makes_an_empty_directory(engine: Snapshotter) -> None:
    mount = engine.prepare("key")
    assert mount == Mount("bind", mount.source, ("rbind", "rw"))
    assert Path(mount.source).parent == engine.state_directory / "snapshots"
    assert Path(mount.source).name.isdigit()
    assert stat.S_IMODE(os.stat(mount.source).st_mode) == 0o755
    assert read_files(mount) == {}
    assert engine.mounts("key") == mount


def test_prepare_makes_a_private_copy_of_the_parent(populated: Snapshotter) -> None:
    first, second = populated.prepare("first", "base"), populated.mounts("work")
    assert read_files(first) == read_files(second) == {"file": "base", "other": "more"}
    write_files(first, file="changed")
    (Path(first.source) / "other").unlink()
    assert (
        read_files(second)
        == read_files(populated.mounts("look"))
        == {"file": "base", "other": "more"}
    )


def test_a_view_is_read_only_and_shares_the_directory_of_its_parent(populated: Snapshotter) -> None:
    mount = populated.mounts("look")
    assert mount.options == ("rbind", "ro")
    assert Path(mount.source).name == id_of(populated, "base")
    assert populated.view("look too", "base") == mount
    empty = populated.view("empty")
    assert empty.options == ("rbind", "ro")
    assert read_files(empty) == {}
    assert directories(populated) == {
        id_of(populated, key) for key in ("base", "work", "lone", "empty")
    }


def test_commit_keeps_the_tree_under_the_new_name(populated: Snapshotter) -> None:
    mount = populated.mounts("work")
    write_files(mount, new="new", file="changed")
    before = populated.stat("work")
    populated.commit("done", "work", {"of": "done", "empty": ""})
    info = populated.stat("done")
    assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"of": "done"})
    assert info.created == info.updated > before.created
    with pytest.raises(NotFound):
        populated.stat("work")
    with pytest.raises(FailedPrecondition):
        populated.mounts("done")
    expected = {"file": "changed", "other": "more", "new": "new"}
    assert (
        read_files(populated.view("v", "done"))
        == read_files(populated.prepare("p", "done"))
        == expected
    )
    assert populated.view("w", "done").source == mount.source


def test_commit_without_labels_clears_the_labels(populated: Snapshotter) -> None:
    populated.commit("done", "work")
    assert populated.stat("done").labels == {}


def test_commit_can_set_the_parent_of_a_snapshot_without_one(populated: Snapshotter) -> None:
    write_files(populated.mounts("lone"), own="own")
    populated.commit("rebased", "lone", parent="base")
    assert populated.stat("rebased").parent == "base"
    assert read_files(populated.view("v", "rebased")) == {"own": "own"}
    for key in ("look", "work"):
        populated.remove(key)
    with pytest.raises(FailedPrecondition, match="it has children"):
        populated.remove("base")


def test_commit_accepts_the_parent_that_the_snapshot_has(populated: Snapshotter) -> None:
    populated.commit("done", "work", parent="base")
    assert populated.stat("done").parent == "base"


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
    populated: Snapshotter,
    labels: dict[str, str],
    paths: list[str],
    expected: dict[str, str] | None,
) -> None:
    before = populated.stat("work")
    if expected is None:
        with pytest.raises(InvalidArgument):
            populated.update("work", labels, paths)
        assert populated.stat("work") == before
        return
    after = populated.update("work", labels, paths)
    assert after == populated.stat("work")
    assert after.labels == expected
    assert (after.created, after.kind, after.parent) == (before.created, before.kind, before.parent)
    assert after.updated > before.updated


def test_update_sets_the_labels_of_every_kind_of_snapshot(populated: Snapshotter) -> None:
    for name in ("base", "work", "look", "lone"):
        assert populated.update(name, {"a": "b"}).labels == {"a": "b"}


def test_usage_agrees_with_du_and_is_zero_for_views(populated: Snapshotter) -> None:
    tree = Path(populated.mounts("work").source)
    (tree / "large").write_bytes(b"x" * 300_000)
    os.link(tree / "large", tree / "linked")
    with (tree / "hole").open("wb") as file:
        file.truncate(1 << 30)
    os.sync()
    expected = Usage(du(tree, "--block-size=1"), du(tree, "--inodes"))
    assert expected.inodes == 5
    assert populated.usage("work") == expected
    populated.commit("done", "work")
    (unsealed(tree) / "behind its back").write_bytes(b"x" * 300_000)
    assert populated.usage("done") == expected
    assert populated.usage("look") == Usage(0, 0)
    populated.view("empty")
    assert populated.usage("empty") == Usage(0, 0)


def du(tree: Path, what: str) -> int:
    command = ["du", "--summarize", what, str(tree)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout.split()[0])


def test_remove_frees_the_name_and_cleanup_deletes_the_directory(populated: Snapshotter) -> None:
    with pytest.raises(FailedPrecondition, match='cannot remove "base": it has children'):
        populated.remove("base")
    gone = {id_of(populated, "work"), id_of(populated, "base")}
    for name in ("work", "look", "base"):
        populated.remove(name)
        with pytest.raises(NotFound):
            populated.remove(name)
    assert snapshot_names(populated) == ["lone"]
    assert read_files(populated.prepare("base")) == {}
    populated.upkeep.cleanup()
    assert directories(populated) == {id_of(populated, "lone"), id_of(populated, "base")}
    assert not directories(populated) & gone


def test_list_raises_cancelled_when_is_wanted_returns_false(populated: Snapshotter) -> None:
    asked: list[None] = []

    def is_wanted() -> bool:
        asked.append(None)
        return len(asked) < 3

    with pytest.raises(Cancelled):
        populated.list(is_wanted=is_wanted)
    assert len(asked) == 3


def test_list_is_sorted_and_can_be_filtered_and_paged(populated: Snapshotter) -> None:
    assert snapshot_names(populated) == ["base", "lone", "look", "work"]
    assert [info.name for info in populated.list(["parent==base"], after="look", limit=1)] == [
        "work"
    ]
    for limit in (0, -1, 10001):
        with pytest.raises(InvalidArgument):
            populated.list(limit=limit)
    with pytest.raises(InvalidArgument):
        populated.list(["name="])
    with pytest.raises(InvalidArgument):
        populated.list(after="x" * 4097)


def test_each_change_is_reported_once_and_in_order(state: Path) -> None:
    announced: list[Change] = []
    with open_engine(state, announced.append) as engine:
        engine.prepare("a")
        engine.commit("b", "a")
        engine.view("c", "b")
        engine.update("c", {"x": "y"})
        with pytest.raises(FailedPrecondition):
            engine.remove("b")
        engine.remove("c")
        engine.upkeep.cleanup()
    assert announced == [
        Added("a", Kind.ACTIVE, ""),
        Committed("b", "a"),
        Added("c", Kind.VIEW, "b"),
        Updated("c"),
        Removed("c"),
    ]
