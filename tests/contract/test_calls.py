"""Each call of the contract over D-Bus, on ext4 and xfs."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import InvalidArgument, NotFound
from snapd_native.model import Info, Kind, Mount, Usage
from tests.support import torture_tree
from tests.support.file_systems import FileSystem, on_ext4
from tests.support.sealing import unsealed
from tests.support.service import (
    Service,
    call_method,
    commit_snapshot,
    expect_error,
    run_with_client,
    short_id,
)

LABELS = {"app": "web", "containerd.io/snapshot.ref": "x", "ümläut/😀": "wörth=1, 2"}

ODD_NAMES = (
    "a/b",
    "../../etc/passwd",
    "/absolute",
    ".",
    "..",
    " spaces ",
    "new-1",
    "-rf",
    "%00",
    "\\0",
    "\x01\x1b[31m\x7f",
    "two\nlines",
    "\u0645\u0631\u062d\u0628\u0627 \u202eabc",
    "😀👩‍👩‍👧",
    "e\u0301",
    "\U0010fffd\uffff",
    "k" * 4096,
    "é" * 2048,
)
"""Unusual texts that are valid names."""


def now() -> int:
    return time.time_ns() // 1000


def names(infos: list[Info]) -> list[str]:
    return [info.name for info in infos]


def test_prepare_makes_an_empty_directory(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    before = now()
    mount = shared_client.prepare("key", labels=LABELS)
    root = Path(mount.source)
    assert mount == Mount("bind", mount.source, ("rbind", "rw"))
    assert root.parent == shared_service.state / "snapshots"
    assert root.name.isdecimal()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert (root.stat().st_uid, root.stat().st_gid) == (0, 0)
    assert list(root.iterdir()) == []
    info = shared_client.stat("key")
    assert info == Info("key", Kind.ACTIVE, "", info.created, info.created, LABELS)
    assert before <= info.created <= now()
    assert shared_client.mounts("key") == mount
    assert shared_client.usage("key").inodes == 1


def test_a_view_without_parent_has_its_own_empty_directory(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    mount = shared_client.view("key", labels=LABELS)
    assert mount.options == ("rbind", "ro")
    assert shared_service.directories() == [Path(mount.source).name]
    assert shared_client.stat("key").kind is Kind.VIEW
    assert shared_client.stat("key").labels == LABELS
    assert shared_client.usage("key") == Usage(0, 0)


def test_the_mount_of_a_view_is_the_directory_of_its_parent(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    root = commit_snapshot(shared_client, "base", files={"file": "text"})
    before = shared_service.directories()
    mount = shared_client.view("key", "base")
    assert mount == Mount("bind", str(root), ("rbind", "ro"))
    assert shared_client.mounts("key") == mount
    assert shared_service.directories() == before
    assert shared_client.stat("key").parent == "base"
    assert shared_client.usage("key") == Usage(0, 0)
    shared_client.remove("key")
    shared_client.cleanup()
    assert shared_service.directories() == before


def test_commit_view_and_prepare_keep_every_kind_of_file(
    filesystem: FileSystem, shared_service: Service, shared_client: BlockingClient, scratch: Path
) -> None:
    """Data written through the source of a mount is in all snapshots made from it."""
    original = scratch / "original"
    torture_tree.build(original)
    written = shared_client.prepare("written")
    os.rmdir(written.source)
    torture_tree.build(Path(written.source))
    assert torture_tree.differences(original, Path(written.source)) == ""
    shared_client.commit("base", "written")
    assert torture_tree.differences(original, Path(shared_client.view("seen", "base").source)) == ""
    copy = Path(shared_client.prepare("copy", "base").source)
    assert copy != Path(written.source)
    # The copy has read preallocated blocks. After that, ext4 shows them as data.
    assert torture_tree.differences(Path(written.source), copy) == ""
    (copy / "types" / "regular").write_text("changed")
    shared_client.commit("second", "copy")
    assert (Path(written.source) / "types" / "regular").read_text() == "regular\n"
    assert shared_client.service().reflink == filesystem.reflink
    assert shared_client.stat("second").parent == "base"


def test_commit_turns_the_active_snapshot_into_a_committed_one(
    shared_client: BlockingClient,
) -> None:
    mount = shared_client.prepare("key", labels={"app": "old", "kept": "no"})
    (Path(mount.source) / "file").write_bytes(bytes(100_000))
    os.link(Path(mount.source) / "file", Path(mount.source) / "link")
    active, usage = shared_client.stat("key"), shared_client.usage("key")
    shared_client.commit("name", "key", {"app": "new"})
    info = shared_client.stat("name")
    assert info == Info("name", Kind.COMMITTED, "", info.created, info.created, {"app": "new"})
    assert info.created > active.created
    assert shared_client.usage("name").inodes == usage.inodes == 2
    assert shared_client.usage("name").size >= 100_000
    with expect_error(NotFound, '"key"'):
        shared_client.stat("key")
    assert shared_client.view("seen", "name").source == mount.source


def test_commit_without_labels_drops_the_labels_of_the_key(shared_client: BlockingClient) -> None:
    shared_client.prepare("key", labels={"app": "old"})
    shared_client.commit("name", "key")
    assert shared_client.stat("name").labels == {}


def test_usage_of_a_committed_snapshot_is_the_recorded_one(shared_client: BlockingClient) -> None:
    root = commit_snapshot(shared_client, "base", files={"file": "text"})
    recorded = shared_client.usage("base")
    (unsealed(root) / "another").write_text("written where nobody may write")
    assert shared_client.usage("base") == recorded


def test_commit_sets_the_parent_of_a_snapshot_prepared_with_none(
    shared_client: BlockingClient,
) -> None:
    commit_snapshot(shared_client, "base")
    commit_snapshot(shared_client, "other")
    shared_client.prepare("orphan")
    shared_client.commit("adopted", "orphan", parent="base")
    assert shared_client.stat("adopted").parent == "base"
    shared_client.prepare("child", "base")
    with expect_error(InvalidArgument, '"child"', '"other"', '"base"'):
        shared_client.commit("name", "child", parent="other")
    assert shared_client.stat("child").parent == "base"
    shared_client.commit("name", "child", parent="base")
    assert shared_client.stat("name").parent == "base"


@pytest.mark.parametrize(
    ("labels", "paths", "after"),
    [
        ({"b": "2", "c": "3"}, [], {"b": "2", "c": "3"}),
        ({"b": "2", "c": "3"}, ["labels"], {"b": "2", "c": "3"}),
        ({}, [], {}),
        ({"a": ""}, ["labels"], {}),
        ({"b": "2", "c": "3"}, ["labels.c"], {"a": "1", "b": "1", "c": "3"}),
        ({"b": "2"}, ["labels.b", "labels.a"], {"b": "2"}),
        ({"a": ""}, ["labels.a"], {"b": "1"}),
        ({"a": "2"}, ["labels.none"], {"a": "1", "b": "1"}),
        ({"x.y/z.": "dots"}, ["labels.x.y/z."], {"a": "1", "b": "1", "x.y/z.": "dots"}),
        ({"labels": "l"}, ["labels.labels"], {"a": "1", "b": "1", "labels": "l"}),
        ({"a": "2", "b": "2"}, ["labels.a", "labels"], {"a": "2", "b": "2"}),
        ({"ü": "😀"}, ["labels.ü"], {"a": "1", "b": "1", "ü": "😀"}),
    ],
)
def test_update_sets_the_labels_that_the_field_paths_name(
    shared_client: BlockingClient, labels: dict[str, str], paths: list[str], after: dict[str, str]
) -> None:
    shared_client.prepare("key", labels={"a": "1", "b": "1"})
    before = shared_client.stat("key")
    answered = shared_client.update("key", labels, paths)
    assert answered == shared_client.stat("key")
    assert answered.labels == after
    assert answered.created == before.created
    assert answered.updated > before.updated


@pytest.mark.parametrize(
    "path", ["", "label", "name", "parent", "kind", "labels.", "Labels.a", "labelsx", "labels/a"]
)
def test_update_with_another_field_path_raises_invalid_argument(
    shared_client: BlockingClient, path: str
) -> None:
    shared_client.prepare("key", labels={"a": "1"})
    before = shared_client.stat("key")
    with expect_error(InvalidArgument, f'"{path}"'):
        shared_client.update("key", {"a": "2"}, ["labels.a", path])
    assert shared_client.stat("key") == before


@pytest.mark.parametrize("kind", list(Kind))
def test_update_sets_the_labels_of_every_kind_of_snapshot(
    shared_client: BlockingClient, kind: Kind
) -> None:
    make: dict[Kind, Callable[[], object]] = {
        Kind.VIEW: lambda: shared_client.view("key"),
        Kind.ACTIVE: lambda: shared_client.prepare("key"),
        Kind.COMMITTED: lambda: commit_snapshot(shared_client, "key"),
    }
    make[kind]()
    assert shared_client.update("key", LABELS).labels == LABELS
    assert shared_client.stat("key").kind is kind


def test_labels_of_1_mib_are_accepted_and_more_are_refused(shared_client: BlockingClient) -> None:
    labels = {f"{number:04}": "v" * 4092 for number in range(256)}
    shared_client.prepare("key", labels=labels)
    assert shared_client.stat("key").labels == labels
    with expect_error(InvalidArgument, str(1 << 20)):
        shared_client.update("key", {"one": "more"}, ["labels.one"])
    assert shared_client.stat("key").labels == labels


@pytest.mark.parametrize("name", ODD_NAMES, ids=short_id)
def test_every_call_accepts_odd_names(
    shared_service: Service, shared_client: BlockingClient, name: str
) -> None:
    outside = {path: path.stat() for path in (Path("/etc/passwd"), shared_service.state.parent)}
    mount = shared_client.prepare(name)
    assert Path(mount.source).parent == shared_service.state / "snapshots"
    shared_client.commit("in between", name)
    shared_client.prepare("key", "in between")
    shared_client.commit(name, "key")
    assert shared_client.view("view", name).source == shared_client.mounts("view").source
    assert names(shared_client.list([], "", 1)) == sorted(["in between", name, "view"])[:1]
    assert shared_client.stat(name).name == name
    assert shared_client.stat("view").parent == name
    assert shared_client.update(name, {"label": "set"}).name == name
    assert shared_client.usage(name).inodes == 1
    assert names(shared_client.list(["labels.label==set"])) == [name]
    shared_client.remove("view")
    shared_client.remove(name)
    assert {path: path.stat() for path in outside} == outside


def test_names_that_differ_in_bytes_are_different_names(shared_client: BlockingClient) -> None:
    commit_snapshot(shared_client, "e\u0301")
    shared_client.prepare("é")
    shared_client.view("É")
    assert set(names(shared_client.list())) == {"e\u0301", "é", "É"}


def test_remove_frees_the_name_at_once(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    first = shared_client.prepare("key").source
    (Path(first) / "file").write_text("text")
    shared_client.remove("key")
    second = shared_client.prepare("key").source
    assert second != first
    assert list(Path(second).iterdir()) == []
    shared_client.cleanup()
    assert shared_service.directories() == [Path(second).name]


def test_cleanup_deletes_orphaned_directories_and_keeps_foreign_ones(
    shared_service: Service, shared_client: BlockingClient
) -> None:
    kept = commit_snapshot(shared_client, "base", files={"file": "text"})
    shared_client.view("view", "base")
    for orphan in ("999999", "new-999998", "rm-999997"):
        (shared_service.state / "snapshots" / orphan / "deep" / "er").mkdir(parents=True)
    strange = shared_service.state / "snapshots" / "not ours"
    strange.mkdir()
    shared_client.cleanup()
    assert shared_service.directories() == [kept.name, f"{kept.name}/file", "not ours"]
    strange.rmdir()


def test_an_id_is_never_reused(shared_client: BlockingClient) -> None:
    given = []
    for _ in range(3):
        given.append(int(Path(shared_client.prepare("key").source).name))
        shared_client.remove("key")
    assert all(a < b for a, b in pairwise(given))


def test_list_is_in_byte_order_of_names(shared_client: BlockingClient) -> None:
    for name in ("b", "a", "Z", "ä", "a/b", "😀", "\uffff", "aa", " "):
        shared_client.view(name)
    listed = names(shared_client.list())
    assert listed == sorted(listed, key=str.encode)
    assert len(listed) == 9


def test_list_returns_the_page_that_after_and_limit_select(shared_client: BlockingClient) -> None:
    for number in range(7):
        shared_client.view(f"{number}", labels={"odd": str(number % 2)})
    assert names(shared_client.list(limit=3)) == ["0", "1", "2"]
    assert names(shared_client.list(after="2", limit=3)) == ["3", "4", "5"]
    assert names(shared_client.list(after="5", limit=3)) == ["6"]
    assert shared_client.list(after="6") == []
    assert names(shared_client.list(after="2½", limit=1)) == ["3"], "a name that is not there"
    assert names(shared_client.list(["labels.odd==1"], "1", 2)) == ["3", "5"]
    assert len(shared_client.list(limit=10_000)) == 7
    assert len(shared_client.list(limit=7)) == 7
    for limit in (0, 10_001, (1 << 32) - 1):
        with expect_error(InvalidArgument, str(limit), "10000"):
            shared_client.list(limit=limit)


@on_ext4
def test_list_returns_1000_snapshots_by_default(client: BlockingClient) -> None:
    commit_snapshot(client, "base")

    async def scenario(client: Client) -> None:
        for start in range(0, 1000, 100):
            some = range(start, start + 100)
            await asyncio.gather(*(client.view(f"{number:04}", "base") for number in some))

    run_with_client(scenario)
    assert names(client.list()) == [f"{number:04}" for number in range(1000)]
    assert names(client.list(after="0999")) == ["base"]
    assert names(list(client.walk()))[999:] == ["0999", "base"]
    (infos,) = call_method("List", "asa{sv}", [], {"after": Variant("s", "")})
    assert len(infos) == 1000


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ([], "abcd"),
        ([""], "abcd"),
        (["name==a"], "a"),
        (['name=="a"'], "a"),
        (["name!=a"], "bcd"),
        (["name~=[ab]"], "ab"),
        (["name~=/^(b|d)$/"], "bd"),
        (["kind==committed"], "a"),
        (["kind==active"], "bc"),
        (["kind==view", "name==b"], "bd"),
        (["parent==a"], "bd"),
        (["parent==a,kind==view"], "d"),
        (['parent==""'], "ac"),
        (["labels.app"], "bc"),
        (["labels.app==web"], "b"),
        (["labels.app!=web"], "acd"),
        (['labels."k.with/dots"'], "c"),
        (['labels."k.with/dots"==v'], "c"),
        (["labels.none"], ""),
        (["nonsense"], ""),
        (["name==a", "name==d"], "ad"),
        (["name==a,name==d"], ""),
    ],
)
def test_list_returns_the_snapshots_that_match_a_filter(
    shared_client: BlockingClient, filters: list[str], found: str
) -> None:
    commit_snapshot(shared_client, "a")
    shared_client.prepare("b", "a", {"app": "web"})
    shared_client.prepare("c", labels={"app": "db", "k.with/dots": "v"})
    shared_client.view("d", "a")
    assert names(shared_client.list(filters)) == list(found)


@pytest.mark.parametrize(
    "text",
    ["==", "name=", "name=a", "name==", 'name=="', "name==a,", ",", "name~=(", "name~=(?=a)"],
)
def test_list_with_a_bad_filter_raises_invalid_argument(
    shared_client: BlockingClient, text: str
) -> None:
    with expect_error(InvalidArgument, "the filter"):
        shared_client.list(["name==a", text])


def test_list_with_a_slow_regular_expression_raises_invalid_argument(
    shared_client: BlockingClient,
) -> None:
    shared_client.view("a" * 4000 + "!")
    with expect_error(InvalidArgument, "takes too long"):
        shared_client.list(["name~=/^(a|a|aa)+$/"])
