"""Random calls on the engine and on a model of the contract, side by side."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.model import Added, Change, Committed, Kind, Removed, Updated
from snapd_native.snapshotter import Snapshotter
from tests.support.sealing import unsealed

pytestmark = pytest.mark.usefixtures("no_workers")


Labels = dict[str, str]
Tree = dict[str, str]

NAMES = st.sampled_from(["a", "b", "c", "d/e", "d e", "ä", "Z", "../x"])
ANY_NAME = st.one_of(NAMES, NAMES, NAMES, NAMES, st.sampled_from(["", "\0", "x" * 4097]))
PARENT = st.one_of(st.just(""), NAMES, NAMES)
GOOD_LABELS = st.dictionaries(
    st.sampled_from(["k", "k.l", "k/l"]), st.sampled_from(["1", "2", ""]), max_size=3
)
LABELS = st.one_of(GOOD_LABELS, GOOD_LABELS, GOOD_LABELS, st.just({"": "1"}))
PATHS = st.lists(
    st.sampled_from(["labels", "labels.k", "labels.k.l", "labels.k/l", "kind"]), max_size=2
)
FILES = st.dictionaries(st.sampled_from(["x", "y", "z"]), st.text("ab", max_size=3), max_size=2)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as the contract describes it."""

    kind: Kind
    parent: str
    labels: Labels
    tree: Tree


@dataclass
class Model:
    """The contract in its simplest form: names and values."""

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def create(self, kind: Kind, key: str, parent: str, labels: Labels) -> None:
        _check(key, *([parent] if parent else []))
        _check_labels(labels)
        tree: Tree = {}
        if parent:
            self._check_parent(parent)
            tree = self.snapshots[parent].tree
        if key in self.snapshots:
            raise AlreadyExists
        self.snapshots[key] = Snapshot(kind, parent, _kept(labels), tree)
        self.changes.append(Added(key, kind, parent))

    def commit(self, name: str, key: str, labels: Labels, parent: str) -> None:
        _check(name, key, *([parent] if parent else []))
        _check_labels(labels)
        if name in self.snapshots:
            raise AlreadyExists
        old = self.get(key)
        if old.kind is not Kind.ACTIVE:
            raise FailedPrecondition
        if parent:
            if old.parent not in ("", parent):
                raise InvalidArgument
            self._check_parent(parent)
        del self.snapshots[key]
        parent = parent or old.parent
        self.snapshots[name] = Snapshot(Kind.COMMITTED, parent, _kept(labels), old.tree)
        self.changes.append(Committed(name, key))

    def update(self, name: str, labels: Labels, paths: list[str]) -> None:
        _check(name)
        _check_labels(labels)
        if "kind" in paths:
            raise InvalidArgument
        new = dict(self.get(name).labels)
        for path in paths or ["labels"]:
            if path == "labels":
                new = dict(labels)
            else:
                new[path.removeprefix("labels.")] = labels.get(path.removeprefix("labels."), "")
        self.snapshots[name] = replace(self.snapshots[name], labels=_kept(new))
        self.changes.append(Updated(name))

    def remove(self, key: str) -> None:
        self.get(key)
        if any(snapshot.parent == key for snapshot in self.snapshots.values()):
            raise FailedPrecondition
        del self.snapshots[key]
        self.changes.append(Removed(key))

    def check_mountable(self, key: str) -> None:
        if self.get(key).kind is Kind.COMMITTED:
            raise FailedPrecondition

    def write(self, key: str, files: Tree) -> None:
        old = self.snapshots[key]
        self.snapshots[key] = replace(old, tree=old.tree | files)

    def get(self, key: str) -> Snapshot:
        _check(key)
        if key not in self.snapshots:
            raise NotFound
        return self.snapshots[key]

    def list(
        self, chosen: Callable[[str, Snapshot], bool], after: str, limit: int
    ) -> list[tuple[str, Snapshot]]:
        found = sorted(self.snapshots.items(), key=lambda item: item[0].encode())
        wanted = [(name, snapshot) for name, snapshot in found if chosen(name, snapshot)]
        return [item for item in wanted if item[0].encode() > after.encode()][:limit]

    def _check_parent(self, parent: str) -> None:
        if parent not in self.snapshots:
            raise NotFound
        if self.snapshots[parent].kind is not Kind.COMMITTED:
            raise InvalidArgument


def _check(*names: str) -> None:
    if any(name in ("", "\0", "x" * 4097) for name in names):
        raise InvalidArgument


def _check_labels(labels: Labels) -> None:
    if "" in labels:
        raise InvalidArgument


def _kept(labels: Labels) -> Labels:
    return {key: value for key, value in labels.items() if value}


FILTERS: dict[tuple[str, ...], Callable[[str, Snapshot], bool]] = {
    (): lambda name, snapshot: True,
    ("name==a", 'name=="d e"'): lambda name, snapshot: name in ("a", "d e"),
    ("name~=^[a-d]",): lambda name, snapshot: name[0] in "abcd",
    ("kind==active",): lambda name, snapshot: snapshot.kind is Kind.ACTIVE,
    ("kind!=view,labels.k",): lambda name, snapshot: (
        snapshot.kind is not Kind.VIEW and "k" in snapshot.labels
    ),
    ("parent==a", "parent==b,labels.k!=1"): lambda name, snapshot: (
        snapshot.parent == "a" or (snapshot.parent == "b" and snapshot.labels.get("k") != "1")
    ),
    ('labels."k/l"==2', 'parent=="",labels.k.l~=1|2'): lambda name, snapshot: (
        snapshot.labels.get("k/l") == "2"
        or (not snapshot.parent and snapshot.labels.get("k.l") in ("1", "2"))
    ),
}


class Comparison(RuleBasedStateMachine):
    """A state machine that makes each call on the engine and on the model, and compares them."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="snapd-native-model", dir="/var/tmp"))
        self.model = Model()
        self.announced: list[Change] = []
        self.engine = Snapshotter(self.directory / "state", self.announced.append)

    def teardown(self) -> None:
        self.engine.close()
        shutil.rmtree(unsealed(self.directory))

    def call_both(self, call: Callable[[], object], expected: Callable[[], object]) -> bool:
        """Make the same call on the engine and on the model; return whether it succeeded."""
        results: list[type[SnapdError] | None] = []
        for side in (call, expected):
            try:
                side()
            except SnapdError as error:
                results.append(type(error))
            else:
                results.append(None)
        assert results[0] is results[1]
        return results[0] is None

    @rule(key=ANY_NAME, parent=PARENT, labels=LABELS)
    def prepare(self, key: str, parent: str, labels: Labels) -> None:
        self.call_both(
            lambda: self.engine.prepare(key, parent, labels),
            lambda: self.model.create(Kind.ACTIVE, key, parent, labels),
        )

    @rule(key=ANY_NAME, parent=PARENT, labels=LABELS)
    def view(self, key: str, parent: str, labels: Labels) -> None:
        self.call_both(
            lambda: self.engine.view(key, parent, labels),
            lambda: self.model.create(Kind.VIEW, key, parent, labels),
        )

    @rule(name=ANY_NAME, key=ANY_NAME, labels=LABELS, parent=st.one_of(st.just(""), PARENT))
    def commit(self, name: str, key: str, labels: Labels, parent: str) -> None:
        self.call_both(
            lambda: self.engine.commit(name, key, labels, parent),
            lambda: self.model.commit(name, key, labels, parent),
        )

    def of_kind(self, kind: Kind) -> list[str]:
        return sorted(name for name, made in self.model.snapshots.items() if made.kind is kind)

    @precondition(lambda self: self.of_kind(Kind.ACTIVE))
    @rule(data=st.data(), name=NAMES)
    def commit_an_active_one(self, data: st.DataObject, name: str) -> None:
        key = data.draw(st.sampled_from(self.of_kind(Kind.ACTIVE)))
        self.commit(name, key, {}, "")

    @precondition(lambda self: self.of_kind(Kind.COMMITTED))
    @rule(data=st.data(), key=NAMES)
    def prepare_from_a_committed_one(self, data: st.DataObject, key: str) -> None:
        self.prepare(key, data.draw(st.sampled_from(self.of_kind(Kind.COMMITTED))), {})

    @precondition(lambda self: self.of_kind(Kind.ACTIVE))
    @rule(data=st.data(), files=FILES)
    def write(self, data: st.DataObject, files: Tree) -> None:
        key = data.draw(st.sampled_from(self.of_kind(Kind.ACTIVE)))
        for name, content in files.items():
            (Path(self.engine.mounts(key).source) / name).write_text(content)
        self.model.write(key, files)

    @rule(name=ANY_NAME, labels=LABELS, paths=PATHS)
    def update(self, name: str, labels: Labels, paths: list[str]) -> None:
        self.call_both(
            lambda: self.engine.update(name, labels, paths),
            lambda: self.model.update(name, labels, paths),
        )

    @rule(key=ANY_NAME)
    def remove(self, key: str) -> None:
        self.call_both(lambda: self.engine.remove(key), lambda: self.model.remove(key))

    @rule(key=ANY_NAME)
    def mounts(self, key: str) -> None:
        if self.call_both(lambda: self.engine.mounts(key), lambda: self.model.check_mountable(key)):
            mount, made = self.engine.mounts(key), self.model.get(key)
            assert mount.type == "bind"
            assert mount.options == ("rbind", "ro" if made.kind is Kind.VIEW else "rw")
            assert mount.source.startswith(str(self.directory))
            found = {path.name: path.read_text() for path in Path(mount.source).iterdir()}
            assert found == made.tree

    @rule(key=ANY_NAME)
    def stat_and_usage(self, key: str) -> None:
        if self.call_both(lambda: self.engine.usage(key), lambda: self.model.get(key)):
            made, usage = self.model.get(key), self.engine.usage(key)
            assert usage.inodes == (0 if made.kind is Kind.VIEW else 1 + len(made.tree))
        self.call_both(lambda: self.engine.stat(key), lambda: self.model.get(key))

    @rule(
        filters=st.sampled_from(sorted(FILTERS)),
        after=st.one_of(st.just(""), NAMES),
        limit=st.sampled_from([1, 2, 3, 1000]),
    )
    def list(self, filters: tuple[str, ...], after: str, limit: int) -> None:
        page = self.engine.list(filters, after, limit)
        expected = self.model.list(FILTERS[filters], after, limit)
        assert [(i.name, i.kind, i.parent, i.labels) for i in page] == [
            (name, made.kind, made.parent, made.labels) for name, made in expected
        ]
        assert page == [self.engine.stat(info.name) for info in page]

    @rule()
    def cleanup(self) -> None:
        self.engine.upkeep.cleanup()
        self.check_directories()

    @rule()
    def restart(self) -> None:
        before = self.engine.list()
        self.engine.close()
        self.engine = Snapshotter(self.directory / "state", self.announced.append)
        assert self.engine.list() == before
        self.check_directories()

    def check_directories(self) -> None:
        owners = [
            name
            for name, made in self.model.snapshots.items()
            if made.kind is not Kind.VIEW or not made.parent
        ]
        assert len(os.listdir(self.directory / "state" / "snapshots")) == len(owners)

    @invariant()
    def announcements_are_equal(self) -> None:
        assert self.announced == self.model.changes


Comparison.TestCase.settings = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestComparison = Comparison.TestCase
