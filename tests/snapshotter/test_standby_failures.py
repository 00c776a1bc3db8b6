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
    commit_many_files,
    directories,
    failing_function,
    id_of,
    ignore_change,
    open_engine,
    read_files,
    run_until_reached_and_kill,
    snapshot_names,
    write_files,
)
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_function
from tests.support.sealing import unsealed
from tests.support.standby_clones import (
    commit_base,
    complete_clones,
    hold_standby_worker,
    incomplete_clones,
    request_clones,
    standby_worker_pid,
    wait_for_clones,
)
from tests.support.waiting import WAIT_TIMEOUT, wait_until, wait_until_equal

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

def wait_for_kill(*_):
    print("reached", flush=True)
    sys.stdin.read()

def hold_second_call(*arguments, **options):
    calls.append(None)
    if len(calls) == 2 and sys.argv[2] == "clone":
        # At its first report, the worker has copied only the beginning of the tree.
        crew, source, target, _ = arguments
        return real(crew, source, target, wait_for_kill, **options)
    if len(calls) == 2:
        wait_for_kill()
    return real(*arguments, **options)

setattr(owner, sys.argv[2], hold_second_call)
engine.update("base", {"snapd-native.standby": "2"})
sys.stdin.read()
"""


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """Yield the log records; fail the test if the service logs a warning."""
    caplog.set_level(logging.WARNING, "snapd_native")
    yield caplog.records
    assert [record.getMessage() for record in caplog.get_records("call")] == []


@contextmanager
def hold_second_clone(engine: Snapshotter) -> Iterator[None]:
    """Begin the second clone of `base`, and stop its worker during the block."""
    request_clones(engine, 1)
    wait_for_clones(engine, 1)
    with hold_standby_worker(engine):
        request_clones(engine, 2)
        wait_until(lambda: len(incomplete_clones(engine)) == 1)
        yield


@pytest.mark.parametrize("where", ["create_standby", "clone", "complete_standby"])
def test_a_crash_while_a_clone_is_made_loses_only_that_clone(state: Path, where: str) -> None:
    with open_engine(state) as engine:
        commit_many_files(engine, "base", 3000)
        inodes = engine.usage("base").inodes
    run_until_reached_and_kill(CRASH, state, where)
    standing = [name for name in os.listdir(state / "snapshots") if name.startswith("ready-")]
    assert len(standing) == 1
    kept = (state / "snapshots" / standing[0]).stat().st_ino
    incomplete = {name for name in os.listdir(state / "snapshots") if "making-" in name}
    assert len(incomplete) == (where != "create_standby")
    with open_engine(state) as engine:
        assert engine.standby("base")[0] >= 1
        assert Path(engine.prepare("work", "base").source).stat().st_ino == kept
        wait_for_clones(engine, 2)
        assert incomplete_clones(engine) == set()
        assert not incomplete & directories(engine)
        assert snapshot_names(engine) == ["base", "work"]
        for key in ("second", "third"):
            engine.prepare(key, "base")
            assert engine.usage(key).inodes == inodes


@pytest.mark.usefixtures("warnings")
@pytest.mark.parametrize("how", ["remove", "update", "zero"])
def test_a_clone_no_longer_wanted_is_dropped_without_a_warning(state: Path, how: str) -> None:
    with open_engine(state) as engine:
        commit_base(engine, None)
        with hold_second_clone(engine):
            match how:
                case "remove":
                    engine.remove("base")
                case "update":
                    engine.update("base", {})
                case "zero":
                    request_clones(engine, 0)
            left = set() if how == "remove" else {id_of(engine, "base")}
            wait_until_equal(lambda: directories(engine), left)


@pytest.mark.usefixtures("warnings")
def test_a_parent_removed_before_its_clone_is_made_causes_no_warning(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, None)
        with hold_function(trees.Crew, "clone") as held:
            request_clones(engine, 2)
            held.wait_until_reached()
            engine.remove("base")
            engine.upkeep.cleanup()
        wait_until_equal(lambda: directories(engine), set())
        commit_base(engine, 2)


@pytest.mark.usefixtures("warnings")
def test_a_label_lowered_while_a_clone_is_made_leaves_the_new_number_of_clones(
    state: Path,
) -> None:
    with open_engine(state) as engine:
        commit_base(engine, None)
        with hold_second_clone(engine):
            request_clones(engine, 1)
        wait_for_clones(engine, 1)


@pytest.mark.usefixtures("warnings")
def test_close_does_not_wait_for_an_unfinished_clone(state: Path) -> None:
    engine = Snapshotter(state, ignore_change)
    with ExitStack() as stack:
        stack.callback(engine.close)
        commit_base(engine, None)
        with hold_second_clone(engine):
            # If it waited for the clone, it would never return.
            stack.close()
    with open_engine(state) as engine:
        assert len(complete_clones(engine)) >= 1
        wait_for_clones(engine, 2)
        assert read_files(engine.prepare("work", "base")) == {"file": "base"}


@pytest.mark.filterwarnings("error")
def test_close_does_not_wait_for_deletions_begun_at_start(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, None)
        id_ = id_of(engine, "base")
    doomed = f"making-{id_}-9"
    for number in range(5):
        (state / "snapshots" / doomed / str(number)).mkdir(parents=True)
    begun, real = threading.Event(), Standby._check_closing

    def check(standby: Standby, *counts: int) -> None:
        """Make the deletion wait at its next report until the service stops."""
        begun.set()
        wait_until(lambda: standby._closing)
        real(standby, *counts)

    complaints: list[threading.ExceptHookArgs] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", complaints.append)
        patch.setattr(Standby, "_check_closing", check)
        for _ in range(2):
            begun.clear()
            with open_engine(state) as engine:
                assert begun.wait(WAIT_TIMEOUT)
            assert doomed in os.listdir(state / "snapshots")
    assert complaints == []
    with open_engine(state) as engine:
        wait_until_equal(lambda: directories(engine), {id_})


def test_an_undeletable_incomplete_clone_does_not_block_other_clones(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, 1)
        inside = state / "snapshots" / f"making-{id_of(engine, 'base')}-9" / "inside"
    inside.mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(state), str(inside)], check=True)
    try:
        with open_engine(state) as engine:
            engine.prepare("work", "base")
            wait_until_equal(lambda: engine.standby("base"), (1, 1))
    finally:
        subprocess.run(["umount", str(inside)], check=True)
    with open_engine(state) as engine:
        wait_for_clones(engine, 1)
        assert not inside.exists()


def test_a_parent_with_a_lost_tree_does_not_block_clones_of_others(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, None)
        write_files(engine.prepare("preparing"), file="other")
        engine.commit("other", "preparing")
        lost = state / "snapshots" / id_of(engine, "base")
        unsealed(lost).rename(state / "lost")
        request_clones(engine, 1)
        request_clones(engine, 1, "other")
        wait_until_equal(lambda: engine.standby("other"), (1, 1))
        assert engine.standby("base") == (0, 1)
        wait_until_equal(lambda: incomplete_clones(engine), set())
        (state / "lost").rename(lost)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ECHILD])
def test_a_failed_clone_is_not_retried_at_once(
    state: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    real, steps = Standby._take_a_step, list[bool]()

    def step(standby: Standby) -> bool:
        steps.append(real(standby))
        return steps[-1]

    with open_engine(state) as engine:
        commit_base(engine, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trees.Crew, "clone", failing_function(code))
            patch.setattr(Standby, "_take_a_step", step)
            request_clones(engine, 2)
            # The thread stops after a failed try. It makes a second try if it has seen the label
            # before Update wakes it.
            wait_until_equal(lambda: steps[-2:], [True, False])
            assert all("standby" in record.getMessage() for record in caplog.records)
            assert caplog.records
            wait_until_equal(lambda: directories(engine), {id_of(engine, "base")})
            assert engine.standby("base") == (0, 2)
        request_clones(engine, 2)
        wait_for_clones(engine, 2)


def test_a_killed_standby_worker_is_replaced(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, None)
        request_clones(engine, 1)
        wait_for_clones(engine, 1)
        pid = standby_worker_pid(engine)
        with hold_second_clone(engine):
            os.kill(pid, signal.SIGKILL)
            wait_until_equal(lambda: incomplete_clones(engine), set())
        request_clones(engine, 2)
        wait_for_clones(engine, 2)


def test_prepare_copies_when_a_clone_was_deleted_by_hand(state: Path) -> None:
    with open_engine(state) as engine:
        commit_base(engine, 1)
        (name,) = complete_clones(engine)
        with hold_standby_worker(engine):
            (state / "snapshots" / name).rename(state / "lost")
            assert read_files(engine.prepare("work", "base")) == {"file": "base"}
        wait_for_clones(engine, 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_prepare_that_fails_after_taking_a_clone_is_undone(state: Path, code: int) -> None:
    with open_engine(state) as engine:
        commit_base(engine, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine._store), "publish", failing_function(code))
            with pytest.raises(OSError, match=os.strerror(code)):
                engine.prepare("work", "base")
        wait_for_clones(engine, 1)
        assert snapshot_names(engine) == ["base"]
        assert directories(engine) == {id_of(engine, "base")} | complete_clones(engine)
        engine.prepare("work", "base")


def test_an_invalid_label_of_an_older_version_is_ignored(state: Path) -> None:
    """Older versions gave the label no meaning, so it can have any value."""
    with open_engine(state) as engine:
        commit_base(engine, 1)
        write_files(engine.prepare("preparing"), file="old")
        engine.commit("old", "preparing")
        engine._store.update("old", lambda _: {STANDBY_LABEL: "many"})
    with open_engine(state) as engine:
        engine.prepare("work", "base")
        wait_for_clones(engine, 1)
        assert engine.standby("old") == (0, 0)
        engine.update("old", {})
