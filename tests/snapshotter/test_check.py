"""Check reports damage and changes nothing; Repair fixes what it can."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.client import BlockingClient
from snapd_native.errors import Cancelled, DataLoss, FailedPrecondition
from snapd_native.jobs import Job
from snapd_native.metastore import Record
from snapd_native.model import Finding, Trouble
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.mounter import Mounter
from snapd_native.snapshotter.reaping import Reaper
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.trees import Report
from tests.support.engine import open_engine, populate, state_of
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_function
from tests.support.kernel_mounts import make_target
from tests.support.service import Service, commit_snapshot
from tests.support.waiting import WAIT_TIMEOUT, wait_until

pytestmark = long_on_xfs


def only_finding(found: list[Finding]) -> tuple[Trouble, str, str]:
    (finding,) = found
    return finding.kind, finding.key, finding.what


def test_check_of_a_healthy_store_in_use_reports_nothing(
    populated: Snapshotter, places: Path
) -> None:
    populated.mounter.mount("work")
    populated.mounter.mount("look", str(make_target(places)))
    populated.remove("lone")
    populated.upkeep.cleanup()
    populated.update("base", {"of": "base", "snapd-native.standby": "1"})
    wait_until(lambda: populated.standby("base")[0] == 1)
    before = state_of(populated)
    assert populated.upkeep.check() == []
    assert state_of(populated) == before
    for target in populated.mounter.list_mounts():
        populated.mounter.unmount(target.target)


def test_check_reports_a_lost_tree(populated: Snapshotter) -> None:
    os.rename(populated.prepare("lost").source, populated.state_directory / "elsewhere")
    kind, key, what = only_finding([*populated.upkeep.check()])
    assert (kind, key) == (Trouble.TREE, "lost")
    assert "restore it from a backup" in what


@pytest.mark.parametrize("name", ["17", "new-18"])
def test_check_reports_an_orphaned_directory(populated: Snapshotter, name: str) -> None:
    (populated.state_directory / "snapshots" / name).mkdir()
    kind, key, what = only_finding([*populated.upkeep.check()])
    assert (kind, key) == (Trouble.ORPHAN, "")
    assert what.startswith(f"{name} ")
    populated.upkeep.cleanup()
    assert populated.upkeep.check() == []


def test_check_reports_garbage_that_cannot_be_deleted(populated: Snapshotter, places: Path) -> None:
    garbage = populated.state_directory / "snapshots" / "rm-19"
    (garbage / "on").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", garbage / "on"], check=True)
    try:
        kind, key, what = only_finding([*populated.upkeep.check()])
    finally:
        subprocess.run(["umount", garbage / "on"], check=True)
    assert (kind, key) == (Trouble.LEFTOVER, "")
    assert "rm-19" in what


@pytest.mark.parametrize("name", ["mine", "17", "ready-1-x"])
def test_check_reports_foreign_files(populated: Snapshotter, name: str) -> None:
    (populated.state_directory / "snapshots" / name).touch()
    kind, key, what = only_finding([*populated.upkeep.check()])
    assert (kind, key) == (Trouble.FOREIGN, "")
    assert f'"{name}"' in what


@pytest.mark.parametrize("name", [".", "snapshots", "metadata.db", "metadata.db-wal"])
def test_check_reports_files_that_other_users_can_access(populated: Snapshotter, name: str) -> None:
    path = populated.state_directory / name
    path.chmod(path.stat().st_mode | 0o004)
    kind, key, what = only_finding([*populated.upkeep.check()])
    assert (kind, key) == (Trouble.MODE, "")
    assert str(path) in what


def test_check_reports_a_mount_missing_from_the_ledger(
    populated: Snapshotter, places: Path
) -> None:
    target = populated.mounter.mount("work")
    populated._store.ledger.forget([line.id for line in populated._store.ledger.lines()])
    kind, key, what = only_finding([*populated.upkeep.check()])
    subprocess.run(["umount", target], check=True)
    assert (kind, key) == (Trouble.MOUNT, "")
    assert target in what
    assert populated.upkeep.check() == []


def mounted_in_another_boot(state: Path, places: Path) -> Path:
    """Leave a record of another boot for a mount of `work`, and return its deleted target."""
    target = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("work", str(target))
    subprocess.run(["umount", target], check=True)
    target.rmdir()
    with closing(sqlite3.connect(state / "metadata.db")) as db, db:
        db.execute("UPDATE mounts SET boot = 'another'")
    return target


def test_check_reports_a_mount_of_an_earlier_boot_that_is_not_restored(
    state: Path, places: Path
) -> None:
    target = mounted_in_another_boot(state, places)
    with open_engine(state) as engine:
        kind, key, what = only_finding([*engine.upkeep.check()])
        assert (kind, key) == (Trouble.MOUNT, "work")
        assert str(target) in what
        engine.mounter.unmount(str(target))
        assert engine.upkeep.check() == []


def test_check_reports_a_writable_mount_of_a_view(populated: Snapshotter, places: Path) -> None:
    target = str(make_target(places))
    populated.mounter.mount("look", target)
    subprocess.run(["mount", "-o", "remount,bind,rw", target], check=True)
    kind, key, what = only_finding([*populated.upkeep.check()])
    assert (kind, key) == (Trouble.MOUNT, "look")
    assert "writable" in what
    populated.mounter.unmount(target)


def test_repair_fixes_all_but_foreign_files_and_lost_trees(
    populated: Snapshotter, places: Path
) -> None:
    snapshots = populated.state_directory / "snapshots"
    for name in ("17", "new-18", "rm-19"):
        (snapshots / name / "directory").mkdir(parents=True)
    (snapshots / "mine").touch()
    (populated.state_directory / "metadata.db").chmod(0o644)
    os.chown(snapshots, 7, 7)
    target = str(make_target(places))
    populated.mounter.mount("look", target)
    subprocess.run(["mount", "-o", "remount,bind,rw", target], check=True)
    os.rename(populated.mounts("lone").source, populated.state_directory / "elsewhere")
    before = populated.list()
    found = {finding.kind for finding in populated.upkeep.check()}
    mended = populated.upkeep.repair()
    left = populated.upkeep.check()
    assert {finding.kind for finding in left} == {Trouble.FOREIGN, Trouble.TREE}
    assert {f.kind for f in mended} == found - {Trouble.FOREIGN, Trouble.TREE}
    assert populated.upkeep.repair() == []
    assert populated.upkeep.check() == left
    assert populated.list() == before
    assert (populated.state_directory / "elsewhere").is_dir()
    with pytest.raises(DataLoss):
        populated.mounts("lone")
    populated.remove("lone")
    populated.prepare("again", "base")
    populated.mounter.unmount(target)


def test_repair_restores_a_missing_mount(state: Path, places: Path) -> None:
    target = mounted_in_another_boot(state, places)
    with open_engine(state) as engine:
        assert engine.upkeep.repair() == []
        target.mkdir()
        (finding,) = engine.upkeep.repair()
        assert finding.key == "work"
        assert engine.upkeep.check() == []
        assert [mounted.target for mounted in engine.mounter.list_mounts()] == [str(target)]
        engine.mounter.unmount(str(target))


def test_repair_rebuilds_the_indexes_of_the_database(populated_state: Path) -> None:
    with closing(sqlite3.connect(populated_state / "metadata.db", isolation_level=None)) as db:
        # Make an index that lacks entries of its table, as a lost write does.
        query = "SELECT sql FROM sqlite_schema WHERE name = 'children'"
        (index,) = db.execute(query).fetchone()
        db.execute("DROP INDEX children")
        db.execute(index.replace("parent IS NOT NULL", "parent = 0"))
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'children'", (index,))
        db.execute("UPDATE sqlite_sequence SET seq = 1")
    with open_engine(populated_state) as engine:
        before = engine.list()
        assert {finding.kind for finding in engine.upkeep.check()} == {Trouble.DATABASE}
        assert engine.upkeep.repair() != []
        assert engine.upkeep.check() == []
        assert engine.list() == before
        with pytest.raises(FailedPrecondition, match="children"):
            engine.remove("base")


def test_repair_of_a_healthy_store_changes_nothing(populated: Snapshotter) -> None:
    before = state_of(populated)
    assert populated.upkeep.repair() == []
    assert state_of(populated) == before


BROKEN_ROWS = {
    "a missing parent": (
        "its parent is not there",
        "DELETE FROM snapshots WHERE name = 'base'",
    ),
    "a parent that is not committed": (
        "its parent is not there, or not committed",
        """
        UPDATE snapshots SET parent = (SELECT id FROM snapshots WHERE name = 'lone')
        WHERE name = 'look'
        """,
    ),
    "an id that would be reused": ("its id may be", "UPDATE sqlite_sequence SET seq = 1"),
    "an ancestor of itself": (
        "its own ancestor",
        """
        UPDATE snapshots SET kind = 'committed', size = 0, inodes = 0 WHERE name = 'work';
        UPDATE snapshots SET parent = (SELECT id FROM snapshots WHERE name = 'work')
        WHERE name = 'base'
        """,
    ),
}


@pytest.mark.parametrize("how", BROKEN_ROWS)
def test_check_reports_rows_that_break_the_rules_of_the_database(
    populated_state: Path, how: str
) -> None:
    with closing(sqlite3.connect(populated_state / "metadata.db")) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            db.execute(f"DROP TRIGGER {trigger}")
        says, statements = BROKEN_ROWS[how]
        db.executescript(statements)
    with open_engine(populated_state) as engine:
        found = engine.upkeep.check()
    assert any(f.kind is Trouble.DATABASE and f.key and says in f.what for f in found)


def test_check_reports_damaged_database_pages(populated_state: Path) -> None:
    path = populated_state / "metadata.db"
    with open_engine(populated_state) as engine:
        with path.open("r+b") as file:
            # Damage the leaves of the tables and indexes, not the pages that refer to them.
            for page in range(2, path.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xff" * 512)
        found = engine.upkeep.check()
        assert {finding.kind for finding in found} == {Trouble.DATABASE}
        assert all("backup" in finding.what for finding in found)
        assert all(finding.what.isprintable() for finding in found)


def test_remove_does_not_wait_for_a_check_that_lists_directories(populated: Snapshotter) -> None:
    with ThreadPoolExecutor(1) as pool, hold_function(Reaper, "orphans") as listing:
        checking = pool.submit(populated.upkeep.check)
        listing.wait_until_reached()
        populated.remove("lone")
        listing.release()
        assert checking.result(WAIT_TIMEOUT) == []


def test_check_during_concurrent_calls_reports_nothing(populated: Snapshotter) -> None:
    ended = threading.Event()
    failed: list[BaseException] = []

    def busy(number: int) -> None:
        try:
            while not ended.is_set():
                populated.prepare(f"a{number}", "base")
                populated.commit(f"b{number}", f"a{number}")
                populated.view(f"c{number}")
                populated.remove(f"b{number}")
                populated.remove(f"c{number}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=busy, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert populated.upkeep.check() == []
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_check_waits_for_running_deletions(populated: Snapshotter) -> None:
    done: list[object] = []
    with hold_function(trees, "delete") as held:
        populated.remove("lone")
        held.wait_until_reached()
        thread = threading.Thread(target=lambda: done.append(populated.upkeep.check()))
        thread.start()
        for _ in range(10):
            assert populated.stat("base").name == "base"
        assert done == []
        held.release()
        thread.join()
    assert done == [[]]


def test_check_during_a_removal_reports_nothing(
    populated: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check runs after Remove renames the directory, and before the reaper knows the new name."""
    asks, waits = threading.Event(), threading.Event()
    unmounted, catch_up, retire = Mounter.unmounted, Reaper.catch_up, StateDirectory.retire
    found: list[Sequence[Finding]] = []
    checking = threading.Thread(target=lambda: found.append(populated.upkeep.check()))

    def ask(mounter: Mounter) -> AbstractContextManager[Callable[[Record], None]]:
        if threading.current_thread() is checking:
            asks.set()
        return unmounted(mounter)

    def wait(reaper: Reaper, report: Report) -> None:
        waits.set()
        catch_up(reaper, report)

    def retire_slowly(state: StateDirectory, id_: int) -> str | None:
        name = retire(state, id_)
        checking.start()
        assert asks.wait(WAIT_TIMEOUT)
        waits.clear()
        return name

    monkeypatch.setattr(Mounter, "unmounted", ask)
    monkeypatch.setattr(Reaper, "catch_up", wait)
    monkeypatch.setattr(StateDirectory, "retire", retire_slowly)
    with hold_function(trees, "delete") as held:
        populated.remove("lone")
        wait_until(lambda: waits.is_set() or not checking.is_alive())
        held.release()
        checking.join()
    assert found == [[]]


def test_check_can_be_cancelled(populated: Snapshotter) -> None:
    job = Job()
    with hold_function(trees, "delete") as held:
        populated.remove("lone")
        held.wait_until_reached()
        assert job.cancel()
        with pytest.raises(Cancelled):
            populated.upkeep.check(job)
        held.release()


def test_check_over_the_bus_returns_the_findings(service: Service, client: BlockingClient) -> None:
    commit_snapshot(client, "base")
    assert client.check() == []
    assert service.call("Check", "a{sv}", "0").stdout == "a(sss) 0\n"
    (service.state / "snapshots" / "17").mkdir()
    assert only_finding([*client.check()])[0] is Trouble.ORPHAN
    outcome = service.call("Check", "a{sv}", "1", "repair", "b", "true")
    assert "repair" in outcome.stderr
    client.cleanup()
