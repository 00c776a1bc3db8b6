"""Standby clones after crashes, removals and errors, and at shutdown."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.model import STANDBY_LABEL
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.standby import Standby
from tests.support.engine import (
    directories,
    fail,
    gated,
    identity,
    ignore,
    kill_where_it_stands,
    names,
    opened,
    read,
    write,
)
from tests.support.file_systems import long_on_xfs
from tests.support.standby_clones import (
    await_standby,
    based,
    clones,
    frozen,
    idle_worker,
    label,
    making,
)
from tests.support.waiting import WAIT, becomes, eventually

pytestmark = long_on_xfs

CRASH = """
import sys
from pathlib import Path
from snapd_native import trees
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory

engine = Snapshotter(Path(sys.argv[1]), lambda *_: None)
owner = trees.Crew if sys.argv[2] == "clone" else StateDirectory
real, calls = getattr(owner, sys.argv[2]), []

def stand(*_):
    print("there", flush=True)
    sys.stdin.read()

def second(*arguments, **options):
    calls.append(None)
    if len(calls) == 2 and sys.argv[2] == "clone":
        # What the worker has done by then, and goes on with, is the beginning of a tree.
        crew, source, target, _ = arguments
        return real(crew, source, target, stand, **options)
    if len(calls) == 2:
        stand()
    return real(*arguments, **options)

setattr(owner, sys.argv[2], second)
engine.update("base", {"snapd-native.standby": "2"})
sys.stdin.read()
"""


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """Yield the log records; fail the test if the service logs a warning."""
    caplog.set_level(logging.WARNING, "snapd_native")
    yield caplog.records
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def committed_wide(engine: Snapshotter, files: int = 3000) -> None:
    """Commit `base` with a tree that takes some time to copy."""
    root = Path(engine.prepare("preparing").source)
    for number in range(files):
        if number % 100 == 0:
            directory = root / str(number)
            directory.mkdir()
        os.mknod(directory / str(number))
    engine.commit("base", "preparing")


@contextmanager
def making_frozen(engine: Snapshotter) -> Iterator[None]:
    """Begin the second clone of `base`, and stop its worker during the block."""
    label(engine, 1)
    await_standby(engine, 1)
    with frozen(engine):
        label(engine, 2)
        eventually(lambda: len(making(engine)) == 1)
        yield


@pytest.mark.parametrize("where", ["create_standby", "clone", "complete_standby"])
def test_a_crash_while_a_clone_is_made_loses_only_that_clone(state: Path, where: str) -> None:
    with opened(state) as engine:
        committed_wide(engine)
        inodes = engine.usage("base").inodes
    kill_where_it_stands(CRASH, state, where)
    standing = [name for name in os.listdir(state / "snapshots") if name.startswith("ready-")]
    assert len(standing) == 1
    kept = (state / "snapshots" / standing[0]).stat().st_ino
    incomplete = {name for name in os.listdir(state / "snapshots") if "making-" in name}
    assert len(incomplete) == (where != "create_standby")
    with opened(state) as engine:
        assert engine.standby("base")[0] >= 1
        assert Path(engine.prepare("work", "base").source).stat().st_ino == kept
        await_standby(engine, 2)
        assert making(engine) == set()
        assert not incomplete & directories(engine)
        assert names(engine) == ["base", "work"]
        for key in ("second", "third"):
            engine.prepare(key, "base")
            assert engine.usage(key).inodes == inodes


@pytest.mark.usefixtures("warnings")
@pytest.mark.parametrize("how", ["remove", "update", "zero"])
def test_a_clone_no_longer_wanted_is_dropped_without_a_warning(state: Path, how: str) -> None:
    with opened(state) as engine:
        based(engine, None)
        with making_frozen(engine):
            match how:
                case "remove":
                    engine.remove("base")
                case "update":
                    engine.update("base", {})
                case "zero":
                    label(engine, 0)
            left = set() if how == "remove" else {identity(engine, "base")}
            becomes(lambda: directories(engine), left)


@pytest.mark.usefixtures("warnings")
def test_a_parent_removed_before_its_clone_is_made_causes_no_warning(state: Path) -> None:
    with opened(state) as engine:
        based(engine, None)
        with gated("clone") as gate:
            label(engine, 2)
            gate.wait_until_reached()
            engine.remove("base")
            engine.upkeep.cleanup()
        becomes(lambda: directories(engine), set())
        based(engine, 2)


@pytest.mark.usefixtures("warnings")
def test_lowering_the_label_while_a_clone_is_made_gives_the_new_number(state: Path) -> None:
    with opened(state) as engine:
        based(engine, None)
        with making_frozen(engine):
            label(engine, 1)
        await_standby(engine, 1)


@pytest.mark.usefixtures("warnings")
def test_close_does_not_wait_for_an_unfinished_clone(state: Path) -> None:
    engine = Snapshotter(state, ignore)
    with ExitStack() as stack:
        stack.callback(engine.close)
        based(engine, None)
        with making_frozen(engine):
            # If it waited for the clone, it would never return.
            stack.close()
    with opened(state) as engine:
        assert len(clones(engine)) >= 1
        await_standby(engine, 2)
        assert read(engine.prepare("work", "base")) == {"file": "base"}


@pytest.mark.filterwarnings("error")
def test_close_does_not_wait_for_deletions_begun_at_start(state: Path) -> None:
    with opened(state) as engine:
        based(engine, None)
        id_ = identity(engine, "base")
    doomed = f"making-{id_}-9"
    for number in range(5):
        (state / "snapshots" / doomed / str(number)).mkdir(parents=True)
    begun, real = threading.Event(), Standby._check_closing

    def check(standby: Standby, *counts: int) -> None:
        """Make the deletion wait at its next report until the service stops."""
        begun.set()
        eventually(lambda: standby._closing)
        real(standby, *counts)

    complaints: list[threading.ExceptHookArgs] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", complaints.append)
        patch.setattr(Standby, "_check_closing", check)
        for _ in range(2):
            begun.clear()
            with opened(state) as engine:
                assert begun.wait(WAIT)
            assert doomed in os.listdir(state / "snapshots")
    assert complaints == []
    with opened(state) as engine:
        becomes(lambda: directories(engine), {id_})


def test_an_undeletable_incomplete_clone_does_not_block_other_clones(state: Path) -> None:
    with opened(state) as engine:
        based(engine, 1)
        inside = state / "snapshots" / f"making-{identity(engine, 'base')}-9" / "inside"
    inside.mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(state), str(inside)], check=True)
    try:
        with opened(state) as engine:
            engine.prepare("work", "base")
            becomes(lambda: engine.standby("base"), (1, 1))
    finally:
        subprocess.run(["umount", str(inside)], check=True)
    with opened(state) as engine:
        await_standby(engine, 1)
        assert not inside.exists()


def test_a_parent_with_a_lost_tree_does_not_block_clones_of_others(state: Path) -> None:
    with opened(state) as engine:
        based(engine, None)
        write(engine.prepare("preparing"), file="other")
        engine.commit("other", "preparing")
        lost = state / "snapshots" / identity(engine, "base")
        lost.rename(state / "lost")
        label(engine, 1)
        label(engine, 1, "other")
        becomes(lambda: engine.standby("other"), (1, 1))
        assert engine.standby("base") == (0, 1)
        becomes(lambda: making(engine), set())
        (state / "lost").rename(lost)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ECHILD])
def test_a_failed_clone_is_not_retried_at_once(
    state: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    real, steps = Standby._take_a_step, list[bool]()

    def step(standby: Standby) -> bool:
        steps.append(real(standby))
        return steps[-1]

    with opened(state) as engine:
        based(engine, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trees.Crew, "clone", fail(code))
            patch.setattr(Standby, "_take_a_step", step)
            label(engine, 2)
            # The thread stops after a failed try. It makes a second try if it has seen the label
            # before Update wakes it.
            becomes(lambda: steps[-2:], [True, False])
            assert all("standby" in record.getMessage() for record in caplog.records)
            assert caplog.records
            becomes(lambda: directories(engine), {identity(engine, "base")})
            assert engine.standby("base") == (0, 2)
        label(engine, 2)
        await_standby(engine, 2)


def test_a_killed_standby_worker_is_replaced(state: Path) -> None:
    with opened(state) as engine:
        based(engine, None)
        label(engine, 1)
        await_standby(engine, 1)
        pid = idle_worker(engine)
        with making_frozen(engine):
            os.kill(pid, signal.SIGKILL)
            becomes(lambda: making(engine), set())
        label(engine, 2)
        await_standby(engine, 2)


def test_prepare_copies_when_a_clone_was_deleted_by_hand(state: Path) -> None:
    with opened(state) as engine:
        based(engine, 1)
        (name,) = clones(engine)
        with frozen(engine):
            (state / "snapshots" / name).rename(state / "lost")
            assert read(engine.prepare("work", "base")) == {"file": "base"}
        await_standby(engine, 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_prepare_that_fails_after_taking_a_clone_is_undone(state: Path, code: int) -> None:
    with opened(state) as engine:
        based(engine, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine._store), "publish", fail(code))
            with pytest.raises(OSError, match=os.strerror(code)):
                engine.prepare("work", "base")
        await_standby(engine, 1)
        assert names(engine) == ["base"]
        assert directories(engine) == {identity(engine, "base")} | clones(engine)
        engine.prepare("work", "base")


def test_an_invalid_label_of_an_older_version_is_ignored(state: Path) -> None:
    """Older versions gave the label no meaning, so it can have any value."""
    with opened(state) as engine:
        based(engine, 1)
        write(engine.prepare("preparing"), file="old")
        engine.commit("old", "preparing")
        engine._store.update("old", lambda _: {STANDBY_LABEL: "many"})
    with opened(state) as engine:
        engine.prepare("work", "base")
        await_standby(engine, 1)
        assert engine.standby("old") == (0, 0)
        engine.update("old", {})
