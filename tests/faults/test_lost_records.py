"""Trees are kept when the database has lost their records."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.errors import FailedPrecondition
from snapd_native.model import Kind, Trouble
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import (
    POPULATED_NAMES,
    directories,
    id_of,
    open_engine,
    read_files,
    snapshot_names,
    write_files,
)
from tests.support.holding import hold_function
from tests.support.kernel_mounts import make_target
from tests.support.sealing import copy_state, unsealed


def trouble_kinds(engine: Snapshotter) -> set[Trouble]:
    return {finding.kind for finding in engine.upkeep.check()}


def commit_file(engine: Snapshotter, name: str) -> str:
    """Commit a snapshot with a file, and return the name of its directory."""
    write_files(engine.prepare(f"{name} in the making"), file=name)
    engine.commit(name, f"{name} in the making")
    return id_of(engine, name)


def test_trees_newer_than_a_restored_database_are_kept(
    populated_state: Path, tmp_path: Path
) -> None:
    database = populated_state / "metadata.db"
    shutil.copy2(database, tmp_path / "old")
    with open_engine(populated_state) as engine:
        new = commit_file(engine, "new")
        engine.prepare("newer", "new")
        engine.remove("lone")
    shutil.copy2(database, tmp_path / "new")
    shutil.copy2(tmp_path / "old", database)
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == POPULATED_NAMES
        assert f"found-{new}" in directories(engine)
        assert trouble_kinds(engine) == {Trouble.DATABASE, Trouble.ORPHAN, Trouble.TREE}
        engine.upkeep.cleanup()
        engine.upkeep.repair()
        # The id is not reused.
        another = commit_file(engine, "another")
        assert int(another) > int(new)
    with open_engine(populated_state) as engine:
        assert f"found-{new}" in directories(engine)
    for name in os.listdir(populated_state / "snapshots"):
        if name == another:
            shutil.rmtree(unsealed(populated_state / "snapshots" / name))
    shutil.copy2(tmp_path / "new", database)
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == ["base", "look", "new", "newer", "work"]
        assert read_files(engine.mounts("newer")) == {"file": "new"}
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_trees_whose_records_were_in_a_lost_wal_are_kept(
    populated_state: Path, tmp_path: Path, how: str
) -> None:
    """The daemon was killed before a checkpoint, so only the WAL had the records."""
    copy = populated_state.with_name("copy")
    with open_engine(populated_state) as engine:
        new = commit_file(engine, "new")
        copy_state(populated_state, copy)
    wal = copy / "metadata.db-wal"
    if how == "gone":
        wal.unlink()
    else:
        # Keep the header and three frames, each with one page.
        os.truncate(wal, 32 + 3 * (24 + 4096))
    with open_engine(copy) as engine:
        assert snapshot_names(engine) == POPULATED_NAMES
        assert (copy / "snapshots" / f"found-{new}" / "file").read_text() == "new"
        assert Trouble.DATABASE in trouble_kinds(engine)


def copy_state_of_killed_daemon(state: Path, killed: Path) -> str:
    """Commit `new`, update `base` until the WAL restarts, and copy the state as a kill leaves it.

    Return the name of the directory of `new`.
    """
    with open_engine(state) as engine:
        new = commit_file(engine, "new")
        for number in range(100):
            engine.update("base", {"number": str(number)})
        copy_state(state, killed)
    return new


def test_trees_are_kept_when_a_database_is_restored_beside_a_newer_wal(
    populated_state: Path, tmp_path: Path
) -> None:
    """A backup replaces the database of a killed daemon, and the WAL of the daemon stays.

    SQLite copies the pages of the WAL into the database. They have the last changes, and lack
    earlier ones.
    """
    with open_engine(populated_state) as engine:
        for number in range(10):
            # With this many, the new record and the changed record are on different pages.
            engine.view(f"view {number}", "base", {"long": "x" * 1000})
        before = snapshot_names(engine)
    shutil.copy2(populated_state / "metadata.db", tmp_path / "old")
    copy = populated_state.with_name("copy")
    new = copy_state_of_killed_daemon(populated_state, copy)
    shutil.copyfile(tmp_path / "old", copy / "metadata.db")
    with open_engine(copy) as engine:
        assert engine.stat("base").labels == {"number": "99"}
        assert snapshot_names(engine) == before
        assert (copy / "snapshots" / f"found-{new}" / "file").read_text() == "new"
        assert trouble_kinds(engine) == {Trouble.DATABASE, Trouble.ORPHAN}


def test_the_next_start_replays_the_wal_of_a_killed_daemon(
    populated_state: Path, tmp_path: Path
) -> None:
    copy = populated_state.with_name("copy")
    new = copy_state_of_killed_daemon(populated_state, copy)
    for _ in range(2):
        with open_engine(copy) as engine:
            assert snapshot_names(engine) == sorted([*POPULATED_NAMES, "new"])
            assert new in directories(engine)
            assert engine.upkeep.check() == []


def test_trees_whose_records_were_deleted_are_kept(populated_state: Path) -> None:
    with open_engine(populated_state) as engine:
        lone = id_of(engine, "lone")
    with closing(sqlite3.connect(populated_state / "metadata.db")) as db, db:
        db.execute("DELETE FROM snapshots WHERE name = 'lone'")
        db.execute("UPDATE sqlite_sequence SET seq = 1")
    with open_engine(populated_state) as engine:
        assert f"found-{lone}" in directories(engine)
        (populated_state / "snapshots" / "99").mkdir()
        engine.upkeep.cleanup()
        assert {f"found-{lone}", "found-99"} <= directories(engine)
        assert Trouble.ORPHAN in trouble_kinds(engine)


def test_repair_does_not_touch_a_running_commit(populated: Snapshotter, places: Path) -> None:
    target = make_target(places)
    populated.mounter.mount("work", str(target))
    (populated.state_directory / "snapshots" / "17").mkdir()
    with hold_function(trees.Crew, "seal") as held:
        thread = threading.Thread(target=populated.commit, args=["done", "work"])
        thread.start()
        held.wait_until_reached()
        assert [finding.kind for finding in populated.upkeep.repair()] == [Trouble.ORPHAN]
        with pytest.raises(OSError, match="Read-only"):
            (target / "file").write_text("too late")
        held.release()
        thread.join()
    assert populated.stat("done").kind is Kind.COMMITTED
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").write_text("too late")
    populated.mounter.unmount(str(target))
    with pytest.raises(FailedPrecondition):
        populated.mounts("done")
