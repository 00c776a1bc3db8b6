"""The contract at the engine's level, on real ext4 and xfs."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.metastore import Metastore
from snapd_native.model import Added, Change, Committed, Kind, Mount, Removed, Updated, Usage
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests import torture
from tests.filesystems import mounted

PROJECT = Path(__file__).parents[1]

WAIT = 60
"""Seconds after which a test that waits has failed."""


def ignore(_: Change) -> None:
    """Take no notice of changes."""


@contextmanager
def opened(state: Path, announce: Callable[[Change], None] = ignore) -> Iterator[Snapshotter]:
    with closing(Snapshotter(state, announce)) as made:
        yield made


@pytest.fixture
def state(scratch: Path) -> Path:
    return scratch / "state"


@pytest.fixture
def engine(state: Path) -> Iterator[Snapshotter]:
    with opened(state) as made:
        yield made


def fill(engine: Snapshotter) -> None:
    """Make `base`, which is committed, `work` and `look` of it, and `lone` of nothing."""
    write(engine.prepare("preparing"), file="base", other="more")
    engine.commit("base", "preparing", {"of": "base"})
    engine.prepare("work", "base", {"of": "work", "dotted.key/x": "old"})
    engine.view("look", "base")
    engine.prepare("lone")


@pytest.fixture
def full(engine: Snapshotter) -> Snapshotter:
    fill(engine)
    return engine


@pytest.fixture
def left(state: Path) -> Path:
    """Leave a filled state directory that no engine has open."""
    with opened(state) as engine:
        fill(engine)
    return state


def write(mount: Mount, **files: str) -> None:
    for name, content in files.items():
        (Path(mount.source) / name).write_text(content)


def read(mount: Mount) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(mount.source).iterdir()}


def names(engine: Snapshotter) -> list[str]:
    return [info.name for info in engine.list()]


def directories(engine: Snapshotter) -> set[str]:
    return set(os.listdir(engine.state_directory / "snapshots"))


def identity(engine: Snapshotter, key: str) -> str:
    return str(engine._store.get(key).id)


class Gate:
    """Holds up a function on entry until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(WAIT)

    def open(self) -> None:
        self.opened.set()


@contextmanager
def gated(name: str) -> Iterator[Gate]:
    """Let the next calls of a function of `trees`, or a method of its crew, wait."""
    owner = trees.Crew if hasattr(trees.Crew, name) else trees
    gate, real = Gate(), getattr(owner, name)

    def wait(*arguments: object, **options: object) -> object:
        gate.reached.set()
        assert gate.opened.wait(WAIT)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wait)
        try:
            yield gate
        finally:
            gate.open()


# What each call means.


def test_prepare_empty(engine: Snapshotter) -> None:
    mount = engine.prepare("key")
    assert mount == Mount("bind", mount.source, ("rbind", "rw"))
    assert Path(mount.source).parent == engine.state_directory / "snapshots"
    assert Path(mount.source).name.isdigit()
    assert stat.S_IMODE(os.stat(mount.source).st_mode) == 0o755
    assert read(mount) == {}
    assert engine.mounts("key") == mount


def test_prepare_is_a_private_copy(full: Snapshotter) -> None:
    first, second = full.prepare("first", "base"), full.mounts("work")
    assert read(first) == read(second) == {"file": "base", "other": "more"}
    write(first, file="changed")
    (Path(first.source) / "other").unlink()
    assert read(second) == read(full.mounts("look")) == {"file": "base", "other": "more"}


def test_views(full: Snapshotter) -> None:
    mount = full.mounts("look")
    assert mount.options == ("rbind", "ro")
    assert Path(mount.source).name == identity(full, "base")
    assert full.view("look too", "base") == mount
    empty = full.view("empty")
    assert empty.options == ("rbind", "ro")
    assert read(empty) == {}
    assert directories(full) == {identity(full, key) for key in ("base", "work", "lone", "empty")}


def test_a_committed_tree_is_complete(full: Snapshotter) -> None:
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


def test_labels_are_replaced_by_commit(full: Snapshotter) -> None:
    full.commit("done", "work")
    assert full.stat("done").labels == {}


def test_rebase(full: Snapshotter) -> None:
    write(full.mounts("lone"), own="own")
    full.commit("rebased", "lone", parent="base")
    assert full.stat("rebased").parent == "base"
    assert read(full.view("v", "rebased")) == {"own": "own"}
    for key in ("look", "work"):
        full.remove(key)
    with pytest.raises(FailedPrecondition, match="it has children"):
        full.remove("base")


def test_commit_with_the_parent_it_has(full: Snapshotter) -> None:
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
def test_update(
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


def test_any_kind_can_be_updated(full: Snapshotter) -> None:
    for name in ("base", "work", "look", "lone"):
        assert full.update(name, {"a": "b"}).labels == {"a": "b"}


def test_usage(full: Snapshotter) -> None:
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


def test_remove(full: Snapshotter) -> None:
    with pytest.raises(FailedPrecondition, match='cannot remove "base": it has children'):
        full.remove("base")
    gone = {identity(full, "work"), identity(full, "base")}
    for name in ("work", "look", "base"):
        full.remove(name)
        with pytest.raises(NotFound):
            full.remove(name)
    assert names(full) == ["lone"]
    assert read(full.prepare("base")) == {}
    full.cleanup()
    assert directories(full) == {identity(full, "lone"), identity(full, "base")}
    assert not directories(full) & gone


def test_list(full: Snapshotter) -> None:
    assert names(full) == ["base", "lone", "look", "work"]
    assert [info.name for info in full.list(["parent==base"], after="look", limit=1)] == ["work"]
    for limit in (0, -1, 10001):
        with pytest.raises(InvalidArgument):
            full.list(limit=limit)
    with pytest.raises(InvalidArgument):
        full.list(["name="])
    with pytest.raises(InvalidArgument):
        full.list(after="x" * 4097)


def test_changes_are_told(state: Path) -> None:
    told: list[Change] = []
    with opened(state, told.append) as engine:
        engine.prepare("a")
        engine.commit("b", "a")
        engine.view("c", "b")
        engine.update("c", {"x": "y"})
        with pytest.raises(FailedPrecondition):
            engine.remove("b")
        engine.remove("c")
        engine.cleanup()
    assert told == [
        Added("a", Kind.ACTIVE, ""),
        Committed("b", "a"),
        Added("c", Kind.VIEW, "b"),
        Updated("c"),
        Removed("c"),
    ]


# Which error wins.

TOO_LONG = "x" * 4097


@pytest.mark.parametrize("kind", ["prepare", "view"])
@pytest.mark.parametrize(
    ("key", "parent", "labels", "error", "about"),
    [
        ("", "nothing", {}, InvalidArgument, "the key is empty"),
        (TOO_LONG, "nothing", {}, InvalidArgument, "the key"),
        ("work", TOO_LONG, {}, InvalidArgument, "the parent"),
        ("work", "nothing", {"": "x"}, InvalidArgument, "a label"),
        ("work", "nothing", {}, NotFound, "no parent"),
        ("work", "lone", {}, InvalidArgument, "an active snapshot"),
        ("work", "look", {}, InvalidArgument, "a view"),
        ("work", "base", {}, AlreadyExists, '"work"'),
        ("base", "base", {}, AlreadyExists, "a committed snapshot"),
        ("look", "", {}, AlreadyExists, "a view"),
        ("new", "new", {}, NotFound, "no parent"),
    ],
)
def test_order_of_checks_of_prepare_and_view(
    full: Snapshotter,
    kind: str,
    key: str,
    parent: str,
    labels: dict[str, str],
    error: type[SnapdError],
    about: str,
) -> None:
    before = full.list(), directories(full)
    with pytest.raises(error, match=about):
        getattr(full, kind)(key, parent, labels)
    assert (full.list(), directories(full)) == before


@pytest.mark.parametrize(
    ("name", "key", "parent", "labels", "error", "about"),
    [
        ("", "nothing", "nothing", {}, InvalidArgument, "the name is empty"),
        ("work", "", "nothing", {}, InvalidArgument, "the key is empty"),
        ("work", "nothing", TOO_LONG, {}, InvalidArgument, "the parent"),
        ("work", "nothing", "nothing", {"": "x"}, InvalidArgument, "a label"),
        ("work", "nothing", "nothing", {}, AlreadyExists, "the name"),
        ("base", "look", "nothing", {}, AlreadyExists, "the name"),
        ("work", "work", "", {}, AlreadyExists, "the name"),
        ("new", "nothing", "nothing", {}, NotFound, '"nothing"'),
        ("new", "look", "nothing", {}, FailedPrecondition, "a view, not active"),
        ("new", "base", "nothing", {}, FailedPrecondition, "a committed snapshot, not active"),
        ("new", "work", "nothing", {}, InvalidArgument, "another|prepared from"),
        ("new", "lone", "nothing", {}, NotFound, "no parent"),
        ("new", "lone", "look", {}, InvalidArgument, "a view, not committed"),
        ("new", "lone", "lone", {}, InvalidArgument, "not committed"),
    ],
)
def test_order_of_checks_of_commit(
    full: Snapshotter,
    name: str,
    key: str,
    parent: str,
    labels: dict[str, str],
    error: type[SnapdError],
    about: str,
) -> None:
    before = full.list(), directories(full)
    with pytest.raises(error, match=about):
        full.commit(name, key, labels, parent)
    assert (full.list(), directories(full)) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda engine, key: engine.mounts(key),
        lambda engine, key: engine.stat(key),
        lambda engine, key: engine.update(key, {}),
        lambda engine, key: engine.usage(key),
        lambda engine, key: engine.remove(key),
    ],
    ids=["mounts", "stat", "update", "usage", "remove"],
)
def test_calls_that_name_nothing(
    full: Snapshotter, call: Callable[[Snapshotter, str], object]
) -> None:
    with pytest.raises(NotFound, match='"nothing"'):
        call(full, "nothing")
    for key in ("", TOO_LONG, "\ud800", "a\0b"):
        with pytest.raises(InvalidArgument):
            call(full, key)


@pytest.mark.parametrize(
    "name",
    [
        *("x" * 4096, "ä" * 2048, "😀" * 1024, "../../etc", "..", ".", "/", "a/b:c d", " ", "\n"),
        *("\x01", "\x7f", "\u202ename", "\ufeff", "\uffff", "'; DROP TABLE snapshots; --", "%s"),
        *("snapshots/1", "1", "new-1", "rm-1", "\N{LATIN SMALL LETTER E WITH ACUTE}", "e\u0301"),
    ],
    ids=lambda name: ascii(name[:12]),
)
def test_any_text_can_be_a_name(engine: Snapshotter, name: str) -> None:
    source = Path(engine.prepare(name).source)
    assert source.parent == engine.state_directory / "snapshots"
    write(engine.mounts(name), file="here")
    assert engine.stat(name).name == name
    engine.update(name, {"a": "b"})
    assert names(engine) == [name]
    engine.remove(name)
    engine.prepare("other")
    engine.commit(name, "other")
    assert read(engine.prepare("child", name)) == {}
    assert engine.stat("child").parent == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 4097, "x" + "ä" * 2048, "😀" * 1024 + "x", "\ud800", "a\udfff", "\0", "a\0"],
    ids=lambda name: ascii(name[:12]),
)
def test_what_cannot_be_a_name(engine: Snapshotter, name: str) -> None:
    engine.prepare("key")
    for call in (
        lambda: engine.prepare(name),
        lambda: engine.view(name),
        lambda: engine.commit(name, "key"),
        lambda: engine.commit("name", name),
        *([lambda: engine.prepare("new", name)] if name else []),
    ):
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert "\0" not in str(caught.value)
        str(caught.value).encode()
    assert names(engine) == ["key"]
    assert len(directories(engine)) == 1


MOST = {f"{number:03}": "x" * 4093 for number in range(256)}
"""Labels of a MiB in all, each of 4096 bytes."""


@pytest.mark.parametrize(
    ("labels", "valid"),
    [
        ({"k": "x" * 4095}, True),
        ({"k" * 4095: "x"}, True),
        ({"k" * 4096: ""}, True),
        ({"ä": "ä" * 2047}, True),
        ({"": ""}, False),
        ({"k": "x" * 4096}, False),
        ({"k" * 4097: ""}, False),
        ({"kk": "ä" * 2047 + "x"}, False),
        ({"k": "\ud800"}, False),
        ({"\ud800": "x"}, False),
        (MOST, True),
        (MOST | {"k": "x"}, False),
    ],
    ids=[
        *("4096 bytes", "long key", "no value", "multi-byte", "no key", "4097 bytes"),
        *("longer key", "longer multi-byte", "surrogate", "surrogate key", "1 MiB", "over 1 MiB"),
    ],
)
def test_labels(engine: Snapshotter, labels: dict[str, str], valid: bool) -> None:
    stored = {key: value for key, value in labels.items() if value}
    engine.prepare("key")
    for call, name in (
        (lambda: engine.prepare("new", labels=labels), "new"),
        (lambda: engine.view("view", labels=labels), "view"),
        (lambda: engine.update("key", labels), "key"),
        (lambda: engine.commit("name", "key", labels), "name"),
    ):
        if valid:
            call()
            assert engine.stat(name).labels == stored
        else:
            with pytest.raises(InvalidArgument):
                call()
            assert names(engine) == ["key"]
            assert engine.stat("key").labels == {}


def test_updates_cannot_add_up_to_too_many_labels(engine: Snapshotter) -> None:
    engine.prepare("key", labels=MOST)
    with pytest.raises(InvalidArgument):
        engine.update("key", {"k": "x"}, ["labels.k"])
    assert engine.stat("key").labels == MOST
    assert "000" not in engine.update("key", {}, ["labels.000"]).labels
    assert engine.update("key", {"k": "x"}, ["labels.k"]).labels["k"] == "x"


# While a call is running.


def test_while_a_prepare_is_running(full: Snapshotter) -> None:
    for key in ("work", "look"):
        full.remove(key)
    with ThreadPoolExecutor(2) as pool, gated("clone") as gate:
        running = pool.submit(full.prepare, "new", "base")
        gate.wait_until_reached()
        for call in (full.stat, full.mounts, full.usage, full.remove):
            with pytest.raises(NotFound):
                call("new")
        with pytest.raises(NotFound):
            full.update("new", {})
        with pytest.raises(NotFound):
            full.commit("done", "new")
        assert names(full) == ["base", "lone"]
        for call in (full.prepare, full.view, lambda name: full.commit(name, "lone")):
            with pytest.raises(AlreadyExists):
                call("new")
        with pytest.raises(FailedPrecondition, match="it has children"):
            full.remove("base")
        pool.submit(call_everything, full).result(WAIT)
        full.cleanup()
        gate.open()
        mount = running.result(WAIT)
    assert read(mount) == {"file": "base", "other": "more"}
    assert full.mounts("new") == mount


def call_everything(engine: Snapshotter) -> None:
    """Use each call that copies nothing."""
    write(engine.prepare("an empty one"), file="x")
    engine.view("another view", "base")
    engine.update("base", {"a": "b"})
    engine.usage("base")
    assert engine.usage("an empty one").inodes == 2
    assert "an empty one" in names(engine)
    engine.commit("a committed one", "an empty one")
    engine.mounts("another view")
    for key in ("another view", "a committed one"):
        engine.remove(key)
    engine.check_health()


def test_while_a_commit_is_running(full: Snapshotter) -> None:
    for key in ("work", "look"):
        full.remove(key)
    with ThreadPoolExecutor(2) as pool, gated("measure") as gate:
        running = pool.submit(full.commit, "new", "lone", {"of": "new"}, "base")
        gate.wait_until_reached()
        for name in ("other", "new"):
            with pytest.raises((FailedPrecondition, AlreadyExists)):
                full.commit(name, "lone")
        with pytest.raises(FailedPrecondition, match="it is being committed"):
            full.remove("lone")
        with pytest.raises(FailedPrecondition, match="it has children"):
            full.remove("base")
        with pytest.raises(NotFound):
            full.stat("new")
        with pytest.raises(NotFound):
            full.view("v", "new")
        for call in (full.prepare, full.view):
            with pytest.raises(AlreadyExists):
                call("new")
        assert full.stat("lone").kind is Kind.ACTIVE
        assert full.mounts("lone").options == ("rbind", "rw")
        assert full.update("lone", {"x": "y"}).labels == {"x": "y"}
        assert names(full) == ["base", "lone"]
        pool.submit(full.prepare, "copy", "base").result(WAIT)
        full.cleanup()
        gate.open()
        running.result(WAIT)
    info = full.stat("new")
    assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"of": "new"})
    assert names(full) == ["base", "copy", "new"]


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("clone", lambda engine: engine.prepare("new", "base")),
        ("measure", lambda engine: engine.commit("new", "work")),
        ("measure", lambda engine: engine.usage("work")),
    ],
    ids=["prepare", "commit", "usage"],
)
def test_stopping_undoes_what_is_running(
    left: Path, what: str, call: Callable[[Snapshotter], object]
) -> None:
    with opened(left) as engine:
        before = directories(engine), engine.list()
        with ThreadPoolExecutor(1) as pool, gated(what) as gate:
            running = pool.submit(call, engine)
            gate.wait_until_reached()
            engine.stop()
            gate.open()
            with pytest.raises(Unavailable):
                running.result(WAIT)
        assert (directories(engine), engine.list()) == before
    with opened(left) as engine:
        assert (directories(engine), engine.list()) == before
        call(engine)


@pytest.mark.parametrize("parent", ["", "base"])
def test_one_of_eight_wins_a_key(full: Snapshotter, parent: str) -> None:
    start = threading.Barrier(8)

    def prepare(number: int) -> str:
        start.wait(WAIT)
        try:
            write(full.prepare("new", parent), winner=str(number))
        except AlreadyExists:
            return "lost"
        return str(number)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(prepare, range(8)))
    assert Counter(results)["lost"] == 7
    assert read(full.mounts("new"))["winner"] in results
    assert len(directories(full)) == 4


def test_eight_threads_of_everything(full: Snapshotter) -> None:
    keys = [f"key {number}" for number in range(6)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            key, other = chance.choice(keys), chance.choice([*keys, "base"])
            calls: list[Callable[[], object]] = [
                partial(full.prepare, key, other),
                partial(full.prepare, key),
                partial(full.view, key, other),
                partial(full.commit, key, other),
                partial(full.mounts, key),
                partial(full.usage, key),
                partial(full.update, key, {"a": "b"}),
                partial(full.remove, key),
                partial(full.remove, key),
                partial(full.list, ["kind==active"]),
                full.cleanup,
            ]
            with suppress(NotFound, AlreadyExists, FailedPrecondition, InvalidArgument):
                chance.choice(calls)()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    full.cleanup()
    infos = full.list()
    owners = {info.name for info in infos if info.kind is not Kind.VIEW or not info.parent}
    assert directories(full) == {identity(full, name) for name in owners}
    assert all(info.parent in ("", *(other.name for other in infos)) for info in infos)
    assert full._store.reserved() == set()


# Failures undo everything.


def fail(code: int) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "/a/path/of/the/service")

    return failing


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
        (StateDirectory, "bring_to_life"),
        (StateDirectory, "sync"),
        (trees.Crew, "measure"),
    ],
)
def test_a_failing_system_call_undoes_everything(
    full: Snapshotter, owner: object, function: str, code: int, error: type[SnapdError]
) -> None:
    before = directories(full), full.list()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, fail(code))
        call = full.commit if function == "measure" else full.prepare
        arguments = ("new", "work") if function == "measure" else ("new", "base")
        with pytest.raises(error) as caught:
            call(*arguments)
        if function == "sync":
            with pytest.raises(error):
                full.commit("new", "work")
    assert "/a/path" not in str(caught.value)
    assert (directories(full), full.list()) == before
    full.prepare("new", "base")
    full.commit("done", "work")


@pytest.mark.parametrize("function", ["publish", "publish_commit"])
def test_a_failing_metastore_undoes_everything(full: Snapshotter, function: str) -> None:
    before = directories(full), full.list()

    def failing(*_: object) -> None:
        raise ResourceExhausted("no room is left for the metadata")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metastore, function, failing)
        calls: list[Callable[[], object]] = [lambda: full.commit("new", "work")]
        if function == "publish":
            calls = [lambda: full.prepare("new", "base"), lambda: full.view("new", "base")]
        for call in calls:
            with pytest.raises(ResourceExhausted):
                call()
    assert (directories(full), full.list()) == before
    full.prepare("new", "base")
    full.commit("done", "work")


@pytest.mark.parametrize("scarce", ["blocks", "inodes"])
def test_a_full_disk_undoes_everything(loop_directory: Path, scarce: str) -> None:
    with (
        mounted("ext4", 16 << 20, loop_directory) as disk,
        opened(disk.root / "state") as engine,
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
            assert names(engine) == ["base", "one"]
            assert len(directories(engine)) == 2
        engine.remove("one")
        engine.cleanup()
        copy = engine.prepare("another", "base")
        assert torture.differences(tree, Path(copy.source)) == ""


# Crashes.

CRASH = """
import os, sys
from pathlib import Path
from snapd_native import trees
from snapd_native.metastore import Metastore
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory

def stand(*_, **__):
    print("there", flush=True)
    sys.stdin.read()

def halfway(crew, source, target, step, *, reflink):
    real(crew, source, target, step, reflink=reflink)
    stand()

engine = Snapshotter(Path(sys.argv[1]), lambda _: None)
real = trees.Crew.clone
if sys.argv[2] == "clone":
    trees.Crew.clone = halfway
else:
    owner = next(o for o in (StateDirectory, Metastore, Snapshotter) if hasattr(o, sys.argv[2]))
    setattr(owner, sys.argv[2], stand)
eval(sys.argv[3])
engine._reaper.submit(lambda: None).result()
print("not there")
"""

PREPARE, COMMIT = "engine.prepare('new', 'base')", "engine.commit('done', 'work')"
EMPTY, VIEW, REMOVE = "engine.prepare('new')", "engine.view('new', 'base')", "engine.remove('work')"
BEFORE = ["base", "lone", "look", "work"]


@pytest.mark.parametrize(
    ("where", "call", "after"),
    [
        ("clone", PREPARE, BEFORE),
        ("bring_to_life", PREPARE, BEFORE),
        ("sync", PREPARE, BEFORE),
        ("publish", PREPARE, BEFORE),
        ("_mount", PREPARE, ["base", "lone", "look", "new", "work"]),
        ("bring_to_life", EMPTY, BEFORE),
        ("publish", EMPTY, BEFORE),
        ("publish", VIEW, BEFORE),
        ("sync", COMMIT, BEFORE),
        ("publish_commit", COMMIT, BEFORE),
        ("release", COMMIT, ["base", "done", "lone", "look"]),
        ("remove", REMOVE, BEFORE),
        ("retire", REMOVE, ["base", "lone", "look"]),
        ("delete", REMOVE, ["base", "lone", "look"]),
    ],
)
def test_a_crash_leaves_nothing(left: Path, where: str, call: str, after: list[str]) -> None:
    command = [sys.executable, "-c", CRASH, str(left), where, call]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=PROJECT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "there\n"
        finally:
            process.kill()
        assert process.wait(WAIT) == -signal.SIGKILL
    with opened(left) as engine:
        assert names(engine) == after
        owners = {name for name in after if name != "look"}
        assert directories(engine) == {identity(engine, name) for name in owners}
        for name in {"work", "new"} & set(after):
            assert read(engine.mounts(name)) == {"file": "base", "other": "more"}
        if "new" not in after:
            assert read(engine.prepare("new", "base")) == {"file": "base", "other": "more"}
        if "done" not in after:
            engine.prepare("done")


POWER_CUT = """
import fcntl, os, struct, sys
from pathlib import Path
from snapd_native.snapshotter import Snapshotter

root = Path(sys.argv[1])
engine = Snapshotter(root / "state", lambda _: None)
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
# FS_IOC_SHUTDOWN with FSOP_GOING_FLAGS_NOLOGFLUSH: what is not on disk by now is lost.
fd = os.open(root, os.O_RDONLY)
fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 2))
sys.stdout.buffer.write(content)
sys.stdout.buffer.flush()
os._exit(0)
"""


@pytest.mark.parametrize("name", ["ext4", "xfs"])
def test_what_returned_survives_a_power_cut(loop_directory: Path, name: str) -> None:
    with mounted(name, 512 << 20, loop_directory) as disk:
        command = [sys.executable, "-c", POWER_CUT, str(disk.root)]
        done = subprocess.run(command, check=True, capture_output=True, cwd=PROJECT)
        mount_again(disk.root)
        with opened(disk.root / "state") as engine:
            assert names(engine) == ["base", "empty", "look", "work"]
            assert engine.stat("look").labels == engine.stat("base").labels == {"a": "b"}
            assert read(engine.mounts("empty")) == {}
            for key in ("look", "work"):
                tree = Path(engine.mounts(key).source)
                content = b"".join((tree / str(number)).read_bytes() for number in range(20))
                assert content == done.stdout
                for number in range(20):
                    assert (tree / f"directory {number}" / "file").read_text() == str(number)
            owners = {identity(engine, key) for key in ("base", "empty", "work")}
            assert directories(engine) == owners


def mount_again(root: Path) -> None:
    """Unmount a loop device's file system and mount it anew, as after a reboot."""
    device = subprocess.run(
        ["findmnt", "--noheadings", "--output", "SOURCE", str(root)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # An open device is not detached when its last mount goes.
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        subprocess.run(["umount", str(root)], check=True)
        subprocess.run(["mount", device, str(root)], check=True)
    finally:
        os.close(fd)


# The state directory.


def test_orphans_are_deleted_and_nothing_else(left: Path) -> None:
    own = set(os.listdir(left / "snapshots"))
    foreign = {"lost+found", "017", "0", "new-", "new-x", "rm-1x", "17 ", "old-17", "x", "-17"}

    def litter() -> None:
        for name in {"17", "new-18", "rm-19", "20", "rm-21"} | foreign:
            (left / "snapshots" / name / "deep").mkdir(parents=True, exist_ok=True)
            (left / "snapshots" / name / "deep" / "file").touch()

    with opened(left) as engine:
        litter()
        engine.cleanup()
        assert directories(engine) == own | foreign
        litter()
    with opened(left) as again:
        assert directories(again) == own | foreign
        assert names(again) == BEFORE
        assert Path(again.prepare("new").source).name not in {"17", "18", "19", "20", "21"}


def test_ids_are_never_given_again(state: Path) -> None:
    seen: list[str] = []
    for _ in range(3):
        with opened(state) as engine:
            for _ in range(3):
                seen.append(Path(engine.prepare("key").source).name)
                engine.remove("key")
    assert len(set(seen)) == 9


def test_an_orphan_that_stays_keeps_its_id(left: Path) -> None:
    last = max(int(name) for name in os.listdir(left / "snapshots"))
    orphan = left / "snapshots" / f"new-{last + 1}"
    (orphan / "inside").mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(left), str(orphan / "inside")], check=True)
    try:
        with opened(left) as engine:
            assert orphan.name in directories(engine)
            assert Path(engine.prepare("new").source).name == str(last + 2)
            assert engine.list(["name==base"])
    finally:
        subprocess.run(["umount", str(orphan / "inside")], check=True)
    with opened(left) as engine:
        assert orphan.name not in directories(engine)


@pytest.mark.parametrize("size", [None, 0])
def test_a_lost_database_costs_no_data(left: Path, size: int | None) -> None:
    before = sorted(os.listdir(left / "snapshots"))
    for path in left.glob("metadata.db*"):
        path.rename(left.parent / path.name)
    if size is not None:
        (left / "metadata.db").touch()
    with pytest.raises(DataLoss, match="restore it"):
        Snapshotter(left, ignore)
    assert sorted(os.listdir(left / "snapshots")) == before
    for path in left.parent.glob("metadata.db*"):
        path.rename(left / path.name)
    with opened(left) as engine:
        assert names(engine) == BEFORE


def test_a_file_is_no_orphan_of_ours(left: Path) -> None:
    file = left / "snapshots" / "99"
    file.write_text("somebody's")
    with opened(left) as engine:
        engine.cleanup()
        assert file.read_text() == "somebody's"
    file.unlink()


def test_a_state_directory_has_one_service(left: Path) -> None:
    for _ in range(2):
        with opened(left) as engine:
            with pytest.raises(Unavailable, match="in use"):
                Snapshotter(left, ignore)
            assert names(engine) == BEFORE


@pytest.mark.parametrize("before", [None, 0o755, 0o777])
def test_the_state_directory_is_private(state: Path, before: int | None) -> None:
    if before is not None:
        (state / "snapshots").mkdir(parents=True)
        for path in (state, state / "snapshots"):
            path.chmod(before)
    with opened(state):
        for path in (state, state / "snapshots"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "metadata.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("which", [".", "snapshots"])
@pytest.mark.parametrize("wrong", ["owner", "file", "link to a file"])
def test_a_wrong_state_directory_is_refused(state: Path, which: str, wrong: str) -> None:
    path = state / which
    if wrong == "owner":
        path.mkdir(parents=True)
        os.chown(path, 1000, 1000)
    else:
        path.parent.mkdir(exist_ok=True)
        (path.parent / "file").touch()
        path.symlink_to("file") if wrong != "file" else (path.parent / "file").rename(path)
    with pytest.raises(FailedPrecondition):
        Snapshotter(state, ignore)
    assert not (state / "metadata.db").exists()
    if wrong == "owner":
        os.chown(path, 0, 0)
        with opened(state) as engine:
            assert names(engine) == []


def test_a_damaged_database_is_data_loss(left: Path) -> None:
    own = set(os.listdir(left / "snapshots"))
    content = (left / "metadata.db").read_bytes()
    (left / "metadata.db").write_bytes(b"garbage!" * 4096)
    with pytest.raises(DataLoss):
        Snapshotter(left, ignore)
    (left / "metadata.db").write_bytes(content)
    with opened(left) as again:
        assert names(again) == BEFORE
        assert directories(again) == own


@pytest.mark.parametrize("instead", ["nothing", "file", "link"])
def test_a_lost_tree_is_data_loss(full: Snapshotter, instead: str) -> None:
    for name in ("base", "lone"):
        path = full.state_directory / "snapshots" / identity(full, name)
        path.rename(full.state_directory / name)
        if instead == "file":
            path.touch()
        elif instead == "link":
            path.symlink_to(full.state_directory / name)
    before = directories(full), full.list()
    for call in (
        lambda: full.mounts("look"),
        lambda: full.mounts("lone"),
        lambda: full.usage("lone"),
        lambda: full.prepare("new", "base"),
        lambda: full.view("new", "base"),
        lambda: full.commit("new", "lone"),
    ):
        with pytest.raises(DataLoss) as caught:
            call()
        assert str(full.state_directory) not in str(caught.value)
    assert (directories(full), full.list()) == before
    assert full.usage("base").inodes == 3


def test_what_is_mounted_in_a_tree_is_not_deleted(full: Snapshotter) -> None:
    inside = Path(full.mounts("lone").source) / "mounted"
    inside.mkdir()
    subprocess.run(["mount", "--bind", full.mounts("work").source, str(inside)], check=True)
    try:
        full.remove("lone")
        with pytest.raises(FailedPrecondition, match="mounted"):
            full.cleanup()
    finally:
        points = Path("/proc/self/mountinfo").read_text().splitlines()
        under = [line.split()[4] for line in points if str(full.state_directory) in line.split()[4]]
        for point in under:
            subprocess.run(["umount", point], check=True)
    full.cleanup()
    assert read(full.mounts("work")) == {"file": "base", "other": "more"}
    assert directories(full) == {identity(full, "base"), identity(full, "work")}


# All together.


def test_no_file_stays_open(full: Snapshotter) -> None:
    def mixed(number: int) -> None:
        key = f"key {number}"
        calls: Mapping[str, Callable[[], object]] = {
            "prepared": lambda: full.prepare(key, "base"),
            "taken": lambda: full.prepare(key, "base"),
            "no parent": lambda: full.prepare(key, "nothing"),
            "no filter": lambda: full.list(["name="]),
            "paged": lambda: full.list(["kind==active"], limit=1),
            "slow": lambda: full.list(["name~=["]),
            "committed": lambda: full.commit(f"done {number}", key),
            "no mounts": lambda: full.mounts(f"done {number}"),
            "viewed": lambda: full.view(key, f"done {number}"),
            "children": lambda: full.remove(f"done {number}"),
            "removed": lambda: full.remove(key),
            "also removed": lambda: full.remove(f"done {number}"),
            "measured": lambda: full.usage("work"),
        }
        for call in calls.values():
            with suppress(SnapdError):
                call()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateDirectory, "sync", fail(errno.EIO))
            with pytest.raises(DataLoss):
                full.prepare(key, "base")

    def count() -> int:
        full.cleanup()
        return len(os.listdir("/proc/self/fd"))

    mixed(0)
    before = count()
    for number in range(1, 16):
        mixed(number)
    assert count() == before
    assert names(full) == BEFORE


def test_the_torture_tree(engine: Snapshotter) -> None:
    tree = Path(engine.prepare("preparing").source)
    torture.build(tree)
    engine.commit("base", "preparing")
    copy = Path(engine.prepare("work", "base").source)
    assert torture.differences(tree, copy) == ""
    engine.commit("again", "work")
    second = Path(engine.prepare("second", "again").source)
    assert torture.differences(tree, second) == ""
    assert engine.usage("second").inodes == engine.usage("base").inodes
    for name in ("second", "again", "base"):
        engine.remove(name)
    engine.cleanup()
    assert directories(engine) == set()
