"""Damaged databases: what still works, what check reports, and what repair fixes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    SnapdError,
)
from snapd_native.jobs import Job
from snapd_native.metastore import store
from snapd_native.model import Finding, Trouble
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.reaping import Reaper
from tests.support.engine import (
    POPULATED_NAMES,
    ignore_change,
    open_engine,
    snapshot_names,
    state_of,
)
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_function
from tests.support.kernel_mounts import make_target
from tests.support.sealing import unsealed
from tests.support.service import commit_snapshot, run_daemon
from tests.support.waiting import WAIT_TIMEOUT

pytestmark = [long_on_xfs, pytest.mark.usefixtures("no_workers")]


def damage(state: Path, *statements: str) -> None:
    """Execute statements on the database without its CHECK constraints and triggers."""
    with closing(sqlite3.connect(state / "metadata.db", isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        triggers = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
        kept = triggers.fetchall()
        for name, _ in kept:
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)
        for _, sql in kept:
            db.execute(sql)


def kinds_and_keys(found: Sequence[Finding]) -> set[tuple[Trouble, str]]:
    return {(finding.kind, finding.key) for finding in found}


DAMAGED_COLUMNS = {
    "labels that are not JSON": """labels = '{"of'""",
    "labels that are a list": "labels = '[]'",
    "a label that is a number": """labels = '{"of": 1}'""",
    "a label with a NUL": r"""labels = '{"of": "a\u0000b"}'""",
    "a label with half a character": r"""labels = '{"of": "\ud800"}'""",
    "labels that are not UTF-8": "labels = CAST(x'7b22ff227d' AS TEXT)",
    "an unknown kind": "kind = 'cnmmitted'",
    "a negative time": "created = -1",
    "a missing usage": "size = NULL",
}


@pytest.mark.parametrize("how", DAMAGED_COLUMNS)
def test_a_damaged_record_does_not_affect_other_snapshots(populated_state: Path, how: str) -> None:
    with open_engine(populated_state) as engine:
        engine.prepare("preparing")
        engine.commit("done", "preparing", {"snapd-native.standby": "0"})
    damage(populated_state, f"UPDATE snapshots SET {DAMAGED_COLUMNS[how]} WHERE name = 'done'")  # noqa: S608
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == POPULATED_NAMES
        for call in (
            lambda: engine.stat("done"),
            lambda: engine.update("done", {}),
            lambda: engine.prepare("new", "done"),
            lambda: engine.upkeep.verify("done"),
        ):
            with pytest.raises(DataLoss, match='the record of "done" is damaged'):
                call()
        with pytest.raises(AlreadyExists):
            engine.prepare("done")
        before = engine.upkeep.check()
        assert (Trouble.DATABASE, "done") in kinds_and_keys(before)
        assert {key for _, key in kinds_and_keys(before)} <= {"done", ""}
        assert engine.upkeep.repair() == []
        assert engine.upkeep.check() == before
        engine.prepare("new", "base")
        engine.commit("other", "work")
        engine.remove("done")
        assert engine.upkeep.check() == []


@pytest.mark.parametrize("name", ["'lo' || char(0) || 'ne'", "CAST(x'6cff' AS TEXT)", "''"])
def test_a_record_with_a_bad_name_does_not_affect_other_snapshots(
    populated_state: Path, name: str
) -> None:
    trees = sorted(os.listdir(populated_state / "snapshots"))
    damage(populated_state, f"UPDATE snapshots SET name = {name} WHERE name = 'lone'")  # noqa: S608
    with open_engine(populated_state) as engine:
        rest = [key for key in POPULATED_NAMES if key != "lone"]
        assert snapshot_names(engine) == rest
        found = engine.upkeep.check()
        assert kinds_and_keys(found) == {(Trouble.DATABASE, "")}
        assert engine.upkeep.repair() == []
        assert all(finding.what.isprintable() for finding in found)
        engine.prepare("lone", "base")
    assert set(os.listdir(populated_state / "snapshots")) >= set(trees)


def test_a_child_of_an_unreadable_parent_is_unlisted_and_can_be_removed(
    populated_state: Path,
) -> None:
    damage(populated_state, "UPDATE snapshots SET name = CAST(x'ff' AS TEXT) WHERE name = 'base'")
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == ["lone"]
        assert kinds_and_keys(engine.upkeep.check()) == {
            (Trouble.DATABASE, key) for key in ("", "look", "work")
        }
        engine.remove("look")
        assert "work" not in snapshot_names(engine)


INSERT_LEDGER_LINE = (
    "INSERT INTO mounts (snapshot, target, read_only, lifetime, uid, owner, boot, mount) VALUES"
)


@pytest.mark.parametrize(
    "values", ["'/x', 0, 'forever', 0", "'/x', 7, 'persistent', 0", "'/x', 0, 'persistent', -1"]
)
def test_check_reports_a_bad_ledger_line_until_its_snapshot_is_removed(
    populated_state: Path, values: str
) -> None:
    work = "(SELECT id FROM snapshots WHERE name = 'work')"
    damage(populated_state, f"{INSERT_LEDGER_LINE} ({work}, {values}, '', 'b', 1)")
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == POPULATED_NAMES
        assert engine.mounter.list_mounts() == []
        found = engine.upkeep.check()
        assert (Trouble.DATABASE, "work") in kinds_and_keys(found)
        assert engine.upkeep.repair() == []
        engine.remove("work")
        assert engine.upkeep.check() == []


def test_repair_deletes_a_ledger_line_without_a_snapshot(populated_state: Path) -> None:
    damage(populated_state, f"{INSERT_LEDGER_LINE} (99, '/x', 0, 'persistent', 0, '', 'b', 1)")
    with open_engine(populated_state) as engine:
        found = engine.upkeep.check()
        assert kinds_and_keys(found) == {(Trouble.DATABASE, "")}
        assert all("call Repair" in f.what or "foreign key" in f.what for f in found)
        assert [f for f in engine.upkeep.repair() if "/x" in f.what]
        assert engine.upkeep.check() == []


def test_damaged_records_raise_data_loss_over_the_bus(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with run_daemon(on_bus, state), BlockingClient() as client:
        commit_snapshot(client, "base")
        client.prepare("work", "base")
        client.prepare("other")
    damage(state, r"""UPDATE snapshots SET labels = '{"a": "\u0000"}' WHERE name = 'work'""")
    damage(state, "UPDATE snapshots SET name = 'a' || char(0) WHERE name = 'other'")
    with run_daemon(on_bus, state), BlockingClient() as client:
        assert [info.name for info in client.walk()] == ["base"]
        with pytest.raises(DataLoss):
            client.stat("work")
        assert kinds_and_keys(client.check()) == {
            (Trouble.DATABASE, "work"),
            (Trouble.DATABASE, ""),
        }
        assert client.repair() == []
        client.remove("work")


def set_header_byte(offset: int, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([value]))

    return change


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


UNUSABLE_DATABASES: dict[str, tuple[type[SnapdError], Callable[[Path], object]]] = {
    "no version": (DataLoss, set_header_byte(63, 0)),
    "the first version": (DataLoss, set_header_byte(63, 1)),
    "the version before mounts": (DataLoss, set_header_byte(63, 2)),
    "a newer version": (DataLoss, set_header_byte(60, 1)),
    "a format that may not be written": (DataLoss, set_header_byte(18, 6)),
    "a missing table": (DataLoss, lambda path: damage(path.parent, "DROP TABLE mounts")),
    "one page": (DataLoss, lambda path: os.truncate(path, 4096)),
    "another database": (
        DataLoss,
        replace_by(
            lambda path: sqlite3.connect(path).execute("CREATE TABLE x (x)").connection.close()
        ),
    ),
    "a directory": (FailedPrecondition, replace_by(Path.mkdir)),
    "a pipe": (FailedPrecondition, replace_by(os.mkfifo)),
    "a link": (FailedPrecondition, replace_by(lambda path: path.symlink_to("elsewhere"))),
}


@pytest.mark.parametrize("how", UNUSABLE_DATABASES)
def test_start_with_an_unusable_database_raises_and_keeps_all_trees(
    populated_state: Path, how: str
) -> None:
    before = sorted(os.listdir(populated_state / "snapshots"))
    error, change = UNUSABLE_DATABASES[how]
    change(populated_state / "metadata.db")
    for _ in range(2):
        with pytest.raises(error, match=r"metadata\.db .*(backup|newer version)"):
            Snapshotter(populated_state, ignore_change)
    assert sorted(os.listdir(populated_state / "snapshots")) == before


def replace_by_copy(path: Path) -> None:
    copy = Path(shutil.copy(path, path.with_name("copy")))
    copy.rename(path)


MOVED_DATABASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a missing database": ("metadata.db", Path.unlink),
    "a copy": ("metadata.db", replace_by_copy),
    "a missing WAL": ("metadata.db-wal", Path.unlink),
}


@pytest.mark.parametrize("how", MOVED_DATABASES)
def test_changing_calls_raise_data_loss_when_the_database_was_moved(
    populated: Snapshotter, how: str
) -> None:
    name, move = MOVED_DATABASES[how]
    move(populated.state_directory / name)
    before = state_of(populated)
    for call in (
        lambda: populated.prepare("new", "base"),
        lambda: populated.view("new", "base"),
        lambda: populated.commit("new", "work"),
        lambda: populated.update("base", {}),
        lambda: populated.remove("lone"),
        lambda: populated.mounter.mount("work"),
    ):
        with pytest.raises(DataLoss, match="moved or replaced"):
            call()
    assert state_of(populated) == before
    assert snapshot_names(populated) == POPULATED_NAMES
    (finding,) = populated.upkeep.check()
    assert finding.kind is Trouble.DATABASE
    assert "moved or replaced" in finding.what
    assert populated.upkeep.repair() == []


def test_check_reports_an_index_that_repair_cannot_rebuild(populated_state: Path) -> None:
    path = populated_state / "metadata.db"
    content = path.read_bytes()
    assert content.count(b"loneactive") == 1
    path.write_bytes(content.replace(b"loneactive", b"workactive"))
    with open_engine(populated_state) as engine:
        found = engine.upkeep.check()
        assert (Trouble.DATABASE, "work") in kinds_and_keys(found)
        assert all("backup" in finding.what for finding in found)
        assert engine.upkeep.repair() == []
        assert engine.upkeep.check() == found


def test_an_id_is_not_reused_when_the_id_counter_is_lost(populated_state: Path) -> None:
    damage(populated_state, "UPDATE sqlite_sequence SET seq = 1")
    with open_engine(populated_state) as engine:
        shutil.rmtree(engine.prepare("lost").source)
    damage(populated_state, "UPDATE sqlite_sequence SET seq = 1")
    with open_engine(populated_state) as engine:
        engine.prepare("new")
        damage(populated_state, "UPDATE snapshots SET id = id + 10 WHERE name = 'lost'")
        assert engine.upkeep.repair() != []
        for number in range(12):
            engine.prepare(f"next {number}")


@pytest.mark.parametrize("how", ["DELETE FROM snapshots", "UPDATE snapshots SET kind = 'active'"])
def test_commit_with_a_lost_parent_raises_data_loss(populated_state: Path, how: str) -> None:
    damage(populated_state, f"{how} WHERE name = 'base'")
    with open_engine(populated_state) as engine:
        before = state_of(engine)
        with pytest.raises(DataLoss, match='the parent of "work"'):
            engine.commit("done", "work")
        assert state_of(engine) == before


def test_repair_of_a_wrong_index_key_keeps_the_ledger_lines(populated_state: Path) -> None:
    """The wrong key does not make Repair delete the line of its snapshot."""
    with open_engine(populated_state) as engine:
        last = engine._store.get("lone").id
    path = populated_state / "metadata.db"
    content = path.read_bytes()
    # An entry in the index of names consists of the key, and of the id as a byte.
    key, other = b"lone" + bytes([last]), b"lone" + bytes([last + 2])
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, other))
    damage(populated_state, f"{INSERT_LEDGER_LINE} ({last}, '/x', 0, 'persistent', 0, '', 'b', 1)")
    with open_engine(populated_state) as engine:
        found = engine.upkeep.check()
        assert [finding for finding in found if "index" in finding.what]
        assert not [finding for finding in found if "ancestor" in finding.what]
        assert engine.upkeep.repair() != []
        assert [line.target for line in engine._store.ledger.lines()] == ["/x"]
        assert not [f for f in engine.upkeep.check() if f.kind is Trouble.DATABASE]


def test_check_reports_no_cycle_below_a_lost_parent(populated_state: Path) -> None:
    with open_engine(populated_state) as engine:
        engine.commit("done", "work")
        engine.prepare("next", "done")
    damage(populated_state, "DELETE FROM snapshots WHERE name = 'base'")
    with open_engine(populated_state) as engine:
        found = [finding.what for finding in engine.upkeep.check()]
    assert found
    assert not [what for what in found if "ancestor" in what]


@pytest.mark.parametrize("what", ["TRIGGER only_labels_change", "INDEX children", "INDEX standbys"])
def test_repair_recreates_missing_triggers_and_indexes(populated_state: Path, what: str) -> None:
    with closing(sqlite3.connect(populated_state / "metadata.db", isolation_level=None)) as db:
        db.execute(f"DROP {what}")
    with open_engine(populated_state) as engine:
        (finding,) = engine.upkeep.check()
        assert finding.kind is Trouble.DATABASE
        assert "call Repair" in finding.what
        assert engine.upkeep.repair() == [finding]
        assert engine.upkeep.check() == []


def test_check_asks_for_a_backup_when_an_index_page_is_lost(populated_state: Path) -> None:
    with closing(sqlite3.connect(populated_state / "metadata.db")) as db:
        (page,) = db.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'children'"
        ).fetchone()
    set_header_byte((page - 1) * 4096, 0xFF)(populated_state / "metadata.db")
    with open_engine(populated_state) as engine:
        found = engine.upkeep.check()
        assert found
        assert all("backup" in finding.what for finding in found)
        assert engine.upkeep.repair() == []


def test_repair_does_not_block_on_a_fifo_in_place_of_a_file(populated: Snapshotter) -> None:
    path = populated.state_directory / "metadata.db.changes"
    path.rename(populated.state_directory / "kept")
    os.mkfifo(path, 0o644)
    found = populated.upkeep.check()
    assert [finding.kind for finding in found] == [Trouble.MODE]
    assert populated.upkeep.repair() == []
    path.unlink()
    (populated.state_directory / "kept").rename(path)


def test_check_and_repair_accept_a_snapshots_directory_behind_a_symlink(
    populated_state: Path,
) -> None:
    (populated_state / "snapshots").rename(populated_state / "elsewhere")
    (populated_state / "snapshots").symlink_to("elsewhere")
    with open_engine(populated_state) as engine:
        assert engine.upkeep.check() == []
        (populated_state / "elsewhere").chmod(0o755)
        (finding,) = engine.upkeep.check()
        assert finding.kind is Trouble.MODE
        assert engine.upkeep.repair() == [finding]
        assert (populated_state / "elsewhere").stat().st_mode & 0o777 == 0o700


def test_the_file_system_of_the_snapshots_is_shown(populated_state: Path, tmp_path: Path) -> None:
    """The directory of the snapshots can be a link to another file system."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    try:
        subprocess.run(["rm", "-r", unsealed(populated_state / "snapshots")], check=True)
        (populated_state / "metadata.db").unlink()
        (tmp_path / "snapshots").mkdir(mode=0o700)
        (populated_state / "snapshots").symlink_to(tmp_path / "snapshots")
        with open_engine(populated_state) as engine:
            assert engine.filesystem_type == "tmpfs"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_repair_cannot_be_cancelled_once_it_has_changed_something(
    populated: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    (populated.state_directory / "metadata.db").chmod(0o644)
    job = Job()
    real = populated._state.close_to_others

    def late() -> None:
        real()
        assert not job.cancel()

    monkeypatch.setattr(populated._state, "close_to_others", late)
    assert len(populated.upkeep.repair(job)) == 1
    (populated.state_directory / "metadata.db").chmod(0o644)
    early = Job()
    assert early.cancel()
    with pytest.raises(Cancelled):
        populated.upkeep.repair(early)
    assert len(populated.upkeep.check()) == 1
    job = Job()
    populated.upkeep.check(job)
    assert not job.cancel()


def test_repair_returns_its_changes_although_another_step_fails(
    populated: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise DataLoss("it is damaged")

    (populated.state_directory / "metadata.db").chmod(0o644)
    monkeypatch.setattr(Reaper, "finish", failing)
    monkeypatch.setattr(populated.mounter, "repair", failing)
    assert [finding.kind for finding in populated.upkeep.repair()] == [Trouble.MODE]


def test_repair_does_not_turn_a_read_only_mount_writable(
    populated: Snapshotter, places: Path
) -> None:
    target = make_target(places)
    populated.mounter.mount("work", str(target))
    subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
    (populated.state_directory / "metadata.db").chmod(0o644)
    assert len(populated.upkeep.repair()) == 1
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").touch()
    populated.mounter.unmount(str(target))


def test_calls_do_not_wait_while_repair_searches_the_database(populated: Snapshotter) -> None:
    with ThreadPoolExecutor(1) as pool, hold_function(store, "broken_rules") as search:
        repairing = pool.submit(populated._store.repair)
        search.wait_until_reached()
        populated.view("new", "base")
        search.release()
        repairing.result(WAIT_TIMEOUT)


def test_a_label_with_a_nul_raises_invalid_argument(populated: Snapshotter) -> None:
    for labels in ({"a\0": "b"}, {"a": "b\0"}):
        with pytest.raises(InvalidArgument, match="NUL"):
            populated.prepare("new", labels=labels)
