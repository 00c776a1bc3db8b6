"""Trees are kept when the database has lost their records."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest

from snapd_native.errors import FailedPrecondition
from snapd_native.model import Kind, Trouble
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import BEFORE, directories, gated, identity, names, opened, read, write
from tests.support.kernel_mounts import place


def troubles(engine: Snapshotter) -> set[Trouble]:
    return {finding.kind for finding in engine.upkeep.check()}


def commit(engine: Snapshotter, name: str) -> str:
    """Commit a snapshot with a file, and return the name of its directory."""
    write(engine.prepare(f"{name} in the making"), file=name)
    engine.commit(name, f"{name} in the making")
    return identity(engine, name)


def test_trees_newer_than_a_restored_database_are_kept(left: Path, tmp_path: Path) -> None:
    database = left / "metadata.db"
    shutil.copy2(database, tmp_path / "old")
    with opened(left) as engine:
        new = commit(engine, "new")
        engine.prepare("newer", "new")
        engine.remove("lone")
    shutil.copy2(database, tmp_path / "new")
    shutil.copy2(tmp_path / "old", database)
    with opened(left) as engine:
        assert names(engine) == BEFORE
        assert f"found-{new}" in directories(engine)
        assert troubles(engine) == {Trouble.DATABASE, Trouble.ORPHAN, Trouble.TREE}
        engine.upkeep.cleanup()
        engine.upkeep.repair()
        # The id is not reused.
        another = commit(engine, "another")
        assert int(another) > int(new)
    with opened(left) as engine:
        assert f"found-{new}" in directories(engine)
    for name in os.listdir(left / "snapshots"):
        if name == another:
            shutil.rmtree(left / "snapshots" / name)
    shutil.copy2(tmp_path / "new", database)
    with opened(left) as engine:
        assert names(engine) == ["base", "look", "new", "newer", "work"]
        assert read(engine.mounts("newer")) == {"file": "new"}
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_trees_whose_records_were_in_a_lost_wal_are_kept(
    left: Path, tmp_path: Path, how: str
) -> None:
    """The daemon was killed before a checkpoint, so only the WAL had the records."""
    copy = tmp_path / "state"
    with opened(left) as engine:
        new = commit(engine, "new")
        subprocess.run(["cp", "-a", left, copy], check=True)
    wal = copy / "metadata.db-wal"
    if how == "gone":
        wal.unlink()
    else:
        # Keep the header and three frames, each with one page.
        os.truncate(wal, 32 + 3 * (24 + 4096))
    with opened(copy) as engine:
        assert names(engine) == BEFORE
        assert (copy / "snapshots" / f"found-{new}" / "file").read_text() == "new"
        assert Trouble.DATABASE in troubles(engine)


def updated_and_killed(state: Path, killed: Path) -> str:
    """Commit `new`, update `base` until the WAL restarts, and copy the state as a kill leaves it.

    Return the name of the directory of `new`.
    """
    with opened(state) as engine:
        new = commit(engine, "new")
        for number in range(100):
            engine.update("base", {"number": str(number)})
        subprocess.run(["cp", "-a", state, killed], check=True)
    return new


def test_trees_are_kept_when_a_database_is_restored_beside_a_newer_wal(
    left: Path, tmp_path: Path
) -> None:
    """A backup replaces the database of a killed daemon, and the WAL of the daemon stays.

    SQLite copies the pages of the WAL into the database. They have the last changes, and lack
    earlier ones.
    """
    with opened(left) as engine:
        for number in range(10):
            # So many that the new record and the changed record are on different pages.
            engine.view(f"view {number}", "base", {"long": "x" * 1000})
        before = names(engine)
    shutil.copy2(left / "metadata.db", tmp_path / "old")
    copy = tmp_path / "state"
    new = updated_and_killed(left, copy)
    shutil.copyfile(tmp_path / "old", copy / "metadata.db")
    with opened(copy) as engine:
        assert engine.stat("base").labels == {"number": "99"}
        assert names(engine) == before
        assert (copy / "snapshots" / f"found-{new}" / "file").read_text() == "new"
        assert troubles(engine) == {Trouble.DATABASE, Trouble.ORPHAN}


def test_the_next_start_replays_the_wal_of_a_killed_daemon(left: Path, tmp_path: Path) -> None:
    copy = tmp_path / "state"
    new = updated_and_killed(left, copy)
    for _ in range(2):
        with opened(copy) as engine:
            assert names(engine) == sorted([*BEFORE, "new"])
            assert new in directories(engine)
            assert engine.upkeep.check() == []


def test_trees_whose_records_were_deleted_are_kept(left: Path) -> None:
    with opened(left) as engine:
        lone = identity(engine, "lone")
    with closing(sqlite3.connect(left / "metadata.db")) as db, db:
        db.execute("DELETE FROM snapshots WHERE name = 'lone'")
        db.execute("UPDATE sqlite_sequence SET seq = 1")
    with opened(left) as engine:
        assert f"found-{lone}" in directories(engine)
        (left / "snapshots" / "99").mkdir()
        engine.upkeep.cleanup()
        assert {f"found-{lone}", "found-99"} <= directories(engine)
        assert Trouble.ORPHAN in troubles(engine)


def test_repair_does_not_touch_a_running_commit(full: Snapshotter, places: Path) -> None:
    target = place(places)
    full.mounter.mount("work", str(target))
    (full.state_directory / "snapshots" / "17").mkdir()
    with gated("measure") as gate:
        thread = threading.Thread(target=full.commit, args=["done", "work"])
        thread.start()
        gate.wait_until_reached()
        assert [finding.kind for finding in full.upkeep.repair()] == [Trouble.ORPHAN]
        with pytest.raises(OSError, match="Read-only"):
            (target / "file").write_text("too late")
        gate.open()
        thread.join()
    assert full.stat("done").kind is Kind.COMMITTED
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").write_text("too late")
    full.mounter.unmount(str(target))
    with pytest.raises(FailedPrecondition):
        full.mounts("done")
