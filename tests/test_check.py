"""Check: finds what is wrong, says nothing of what is merely going on, and changes nothing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from snapd_native.client import BlockingClient
from snapd_native.errors import Cancelled, DataLoss, FailedPrecondition
from snapd_native.jobs import Job
from snapd_native.metastore import Record
from snapd_native.model import Finding, Trouble
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.mounting import Mounter
from snapd_native.snapshotter.reaping import Reaper
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.trees import Report
from tests.engines import WAIT, fill, gated, opened, state_of
from tests.mounting import place
from tests.service import Service, committed
from tests.waiting import eventually


def only(found: list[Finding]) -> tuple[Trouble, str, str]:
    (finding,) = found
    return finding.kind, finding.key, finding.what


def test_nothing_is_wrong_with_what_is_in_use(full: Snapshotter, places: Path) -> None:
    full.mounter.mount("work")
    full.mounter.mount("look", str(place(places)))
    full.remove("lone")
    full.upkeep.cleanup()
    full.update("base", {"of": "base", "snapd-native.standby": "1"})
    eventually(lambda: full.standby("base")[0] == 1)
    before = state_of(full)
    assert full.upkeep.check() == []
    assert state_of(full) == before
    for target in full.mounter.list_mounts():
        full.mounter.unmount(target.target)


def test_a_tree_that_is_gone(full: Snapshotter) -> None:
    os.rename(full.prepare("lost").source, full.state_directory / "elsewhere")
    kind, key, what = only([*full.upkeep.check()])
    assert (kind, key) == (Trouble.TREE, "lost")
    assert "restore it from a backup" in what


@pytest.mark.parametrize("name", ["17", "new-18"])
def test_an_orphan(full: Snapshotter, name: str) -> None:
    (full.state_directory / "snapshots" / name).mkdir()
    kind, key, what = only([*full.upkeep.check()])
    assert (kind, key) == (Trouble.ORPHAN, "")
    assert what.startswith(f"{name} ")
    full.upkeep.cleanup()
    assert full.upkeep.check() == []


def test_what_cannot_be_deleted(full: Snapshotter, places: Path) -> None:
    garbage = full.state_directory / "snapshots" / "rm-19"
    (garbage / "on").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", garbage / "on"], check=True)
    try:
        kind, key, what = only([*full.upkeep.check()])
    finally:
        subprocess.run(["umount", garbage / "on"], check=True)
    assert (kind, key) == (Trouble.LEFTOVER, "")
    assert "rm-19" in what


@pytest.mark.parametrize("name", ["mine", "17", "ready-1-x"])
def test_what_is_not_the_service_s(full: Snapshotter, name: str) -> None:
    (full.state_directory / "snapshots" / name).touch()
    kind, key, what = only([*full.upkeep.check()])
    assert (kind, key) == (Trouble.FOREIGN, "")
    assert f'"{name}"' in what


@pytest.mark.parametrize("name", [".", "snapshots", "metadata.db", "metadata.db-wal"])
def test_what_others_may_reach(full: Snapshotter, name: str) -> None:
    path = full.state_directory / name
    path.chmod(path.stat().st_mode | 0o004)
    kind, key, what = only([*full.upkeep.check()])
    assert (kind, key) == (Trouble.MODE, "")
    assert str(path) in what


def test_a_mount_that_the_ledger_does_not_know(full: Snapshotter, places: Path) -> None:
    target = full.mounter.mount("work")
    full._store.ledger.forget([line.id for line in full._store.ledger.lines()])
    kind, key, what = only([*full.upkeep.check()])
    subprocess.run(["umount", target], check=True)
    assert (kind, key) == (Trouble.MOUNT, "")
    assert target in what
    assert full.upkeep.check() == []


def mounted_in_another_boot(state: Path, places: Path) -> Path:
    """Leave `work` mounted by the records only, on a directory that is gone; return that."""
    target = place(places)
    with opened(state) as engine:
        fill(engine)
        engine.mounter.mount("work", str(target))
    subprocess.run(["umount", target], check=True)
    target.rmdir()
    with closing(sqlite3.connect(state / "metadata.db")) as db, db:
        db.execute("UPDATE mounts SET boot = 'another'")
    return target


def test_a_mount_of_another_boot_that_is_not_made_again(state: Path, places: Path) -> None:
    target = mounted_in_another_boot(state, places)
    with opened(state) as engine:
        kind, key, what = only([*engine.upkeep.check()])
        assert (kind, key) == (Trouble.MOUNT, "work")
        assert str(target) in what
        engine.mounter.unmount(str(target))
        assert engine.upkeep.check() == []


def test_a_view_that_is_writable(full: Snapshotter, places: Path) -> None:
    target = str(place(places))
    full.mounter.mount("look", target)
    subprocess.run(["mount", "-o", "remount,bind,rw", target], check=True)
    kind, key, what = only([*full.upkeep.check()])
    assert (kind, key) == (Trouble.MOUNT, "look")
    assert "writable" in what
    full.mounter.unmount(target)


def test_repair_mends_what_it_can(full: Snapshotter, places: Path) -> None:
    snapshots = full.state_directory / "snapshots"
    for name in ("17", "new-18", "rm-19"):
        (snapshots / name / "directory").mkdir(parents=True)
    (snapshots / "mine").touch()
    (full.state_directory / "metadata.db").chmod(0o644)
    os.chown(snapshots, 7, 7)
    target = str(place(places))
    full.mounter.mount("look", target)
    subprocess.run(["mount", "-o", "remount,bind,rw", target], check=True)
    os.rename(full.mounts("lone").source, full.state_directory / "elsewhere")
    before = full.list()
    found = {finding.kind for finding in full.upkeep.check()}
    mended = full.upkeep.repair()
    left = full.upkeep.check()
    assert {finding.kind for finding in left} == {Trouble.FOREIGN, Trouble.TREE}
    assert {f.kind for f in mended} == found - {Trouble.FOREIGN, Trouble.TREE}
    assert full.upkeep.repair() == []
    assert full.upkeep.check() == left
    assert full.list() == before
    assert (full.state_directory / "elsewhere").is_dir()
    with pytest.raises(DataLoss):
        full.mounts("lone")
    full.remove("lone")
    full.prepare("again", "base")
    full.mounter.unmount(target)


def test_repair_makes_again_what_is_not_mounted(state: Path, places: Path) -> None:
    target = mounted_in_another_boot(state, places)
    with opened(state) as engine:
        assert engine.upkeep.repair() == []
        target.mkdir()
        (finding,) = engine.upkeep.repair()
        assert finding.key == "work"
        assert engine.upkeep.check() == []
        assert [mounted.target for mounted in engine.mounter.list_mounts()] == [str(target)]
        engine.mounter.unmount(str(target))


def test_repair_makes_indexes_anew(left: Path) -> None:
    with closing(sqlite3.connect(left / "metadata.db", isolation_level=None)) as db:
        # An index that lacks what its table has, as a write that was lost leaves it.
        db.execute("DROP INDEX children")
        db.execute("CREATE INDEX children ON snapshots (parent) WHERE parent = 0")
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX children ON snapshots (parent)"
            " WHERE parent IS NOT NULL' WHERE name = 'children'"
        )
        db.execute("UPDATE sqlite_sequence SET seq = 1")
    with opened(left) as engine:
        before = engine.list()
        assert {finding.kind for finding in engine.upkeep.check()} == {Trouble.DATABASE}
        assert engine.upkeep.repair() != []
        assert engine.upkeep.check() == []
        assert engine.list() == before
        with pytest.raises(FailedPrecondition, match="children"):
            engine.remove("base")


def test_repair_of_what_is_well_changes_nothing(full: Snapshotter) -> None:
    before = state_of(full)
    assert full.upkeep.repair() == []
    assert state_of(full) == before


BROKEN = {
    "a parent that is gone": (
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
    "an id to be given again": ("its id may be", "UPDATE sqlite_sequence SET seq = 1"),
    "an ancestor of itself": (
        "its own ancestor",
        """
        UPDATE snapshots SET kind = 'committed', size = 0, inodes = 0 WHERE name = 'work';
        UPDATE snapshots SET parent = (SELECT id FROM snapshots WHERE name = 'work')
        WHERE name = 'base'
        """,
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_database_that_breaks_its_rules(left: Path, how: str) -> None:
    with closing(sqlite3.connect(left / "metadata.db")) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            db.execute(f"DROP TRIGGER {trigger}")
        says, statements = BROKEN[how]
        db.executescript(statements)
    with opened(left) as engine:
        found = engine.upkeep.check()
    assert any(f.kind is Trouble.DATABASE and f.key and says in f.what for f in found)


def test_a_damaged_database(left: Path) -> None:
    path = left / "metadata.db"
    with opened(left) as engine:
        with path.open("r+b") as file:
            # The leaves of the tables and indexes, not what leads to them.
            for page in range(2, path.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xff" * 512)
        found = engine.upkeep.check()
        assert {finding.kind for finding in found} == {Trouble.DATABASE}
        assert all("backup" in finding.what for finding in found)
        assert all(finding.what.isprintable() for finding in found)


def test_what_goes_on_meanwhile_is_no_finding(full: Snapshotter) -> None:
    ended = threading.Event()
    failed: list[BaseException] = []

    def busy(number: int) -> None:
        try:
            while not ended.is_set():
                full.prepare(f"a{number}", "base")
                full.commit(f"b{number}", f"a{number}")
                full.view(f"c{number}")
                full.remove(f"b{number}")
                full.remove(f"c{number}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=busy, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert full.upkeep.check() == []
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_it_waits_for_what_is_being_deleted(full: Snapshotter) -> None:
    done: list[object] = []
    with gated("delete") as gate:
        full.remove("lone")
        gate.wait_until_reached()
        thread = threading.Thread(target=lambda: done.append(full.upkeep.check()))
        thread.start()
        for _ in range(10):
            assert full.stat("base").name == "base"
        assert done == []
        gate.open()
        thread.join()
    assert done == [[]]


def test_a_removal_that_is_half_way_is_no_finding(
    full: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory has its new name, and the reaper knows nothing of it yet, when Check looks."""
    asks, waits = threading.Event(), threading.Event()
    unmounted, catch_up, retire = Mounter.unmounted, Reaper.catch_up, StateDirectory.retire
    found: list[Sequence[Finding]] = []
    checking = threading.Thread(target=lambda: found.append(full.upkeep.check()))

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
        assert asks.wait(WAIT)
        waits.clear()
        return name

    monkeypatch.setattr(Mounter, "unmounted", ask)
    monkeypatch.setattr(Reaper, "catch_up", wait)
    monkeypatch.setattr(StateDirectory, "retire", retire_slowly)
    with gated("delete") as gate:
        full.remove("lone")
        eventually(lambda: waits.is_set() or not checking.is_alive())
        gate.open()
        checking.join()
    assert found == [[]]


def test_it_can_be_cancelled(full: Snapshotter) -> None:
    job = Job()
    with gated("delete") as gate:
        full.remove("lone")
        gate.wait_until_reached()
        assert job.cancel()
        with pytest.raises(Cancelled):
            full.upkeep.check(job)
        gate.open()


def test_over_the_bus(service: Service, client: BlockingClient) -> None:
    committed(client, "base")
    assert client.check() == []
    assert service.call("Check", "a{sv}", "0").stdout == "a(sss) 0\n"
    (service.state / "snapshots" / "17").mkdir()
    assert only([*client.check()])[0] is Trouble.ORPHAN
    outcome = service.call("Check", "a{sv}", "1", "repair", "b", "true")
    assert "repair" in outcome.stderr
    client.cleanup()
