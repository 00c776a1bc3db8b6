"""Which error each call of Snapshotter raises; a failed call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import (
    directories,
    read_files,
    snapshot_names,
    write_files,
)
from tests.support.file_systems import long_on_xfs

pytestmark = long_on_xfs

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
def test_prepare_and_view_check_their_arguments_in_order(
    populated: Snapshotter,
    kind: str,
    key: str,
    parent: str,
    labels: dict[str, str],
    error: type[SnapdError],
    about: str,
) -> None:
    before = populated.list(), directories(populated)
    with pytest.raises(error, match=about):
        getattr(populated, kind)(key, parent, labels)
    assert (populated.list(), directories(populated)) == before


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
def test_commit_checks_its_arguments_in_order(
    populated: Snapshotter,
    name: str,
    key: str,
    parent: str,
    labels: dict[str, str],
    error: type[SnapdError],
    about: str,
) -> None:
    before = populated.list(), directories(populated)
    with pytest.raises(error, match=about):
        populated.commit(name, key, labels, parent)
    assert (populated.list(), directories(populated)) == before


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
def test_an_unknown_key_raises_not_found_and_a_bad_one_invalid_argument(
    populated: Snapshotter, call: Callable[[Snapshotter, str], object]
) -> None:
    with pytest.raises(NotFound, match='"nothing"'):
        call(populated, "nothing")
    for key in ("", TOO_LONG, "\ud800", "a\0b"):
        with pytest.raises(InvalidArgument):
            call(populated, key)


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
    write_files(engine.mounts(name), file="here")
    assert engine.stat(name).name == name
    engine.update(name, {"a": "b"})
    assert snapshot_names(engine) == [name]
    engine.remove(name)
    engine.prepare("other")
    engine.commit(name, "other")
    assert read_files(engine.prepare("child", name)) == {}
    assert engine.stat("child").parent == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 4097, "x" + "ä" * 2048, "😀" * 1024 + "x", "\ud800", "a\udfff", "\0", "a\0"],
    ids=lambda name: ascii(name[:12]),
)
def test_a_bad_name_raises_invalid_argument(engine: Snapshotter, name: str) -> None:
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
    assert snapshot_names(engine) == ["key"]
    assert len(directories(engine)) == 1


MAX_LABELS = {f"{number:03}": "x" * 4093 for number in range(256)}
"""Labels of 4096 bytes each, and of 1 MiB in all."""


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
        (MAX_LABELS, True),
        (MAX_LABELS | {"k": "x"}, False),
    ],
    ids=[
        *("4096 bytes", "long key", "no value", "multi-byte", "no key", "4097 bytes"),
        *("longer key", "longer multi-byte", "surrogate", "surrogate key", "1 MiB", "over 1 MiB"),
    ],
)
def test_labels_are_accepted_up_to_their_limits(
    engine: Snapshotter, labels: dict[str, str], valid: bool
) -> None:
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
            assert snapshot_names(engine) == ["key"]
            assert engine.stat("key").labels == {}


def test_update_cannot_exceed_the_limit_of_all_labels_together(engine: Snapshotter) -> None:
    engine.prepare("key", labels=MAX_LABELS)
    with pytest.raises(InvalidArgument):
        engine.update("key", {"k": "x"}, ["labels.k"])
    assert engine.stat("key").labels == MAX_LABELS
    assert "000" not in engine.update("key", {}, ["labels.000"]).labels
    assert engine.update("key", {"k": "x"}, ["labels.k"]).labels["k"] == "x"
