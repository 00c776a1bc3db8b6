"""A disk that loses writes: commit never succeeds for data that is not on the disk."""

from __future__ import annotations

import mmap
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from snapd_native import linux, trees
from snapd_native.errors import DataLoss, ResourceExhausted
from snapd_native.model import STANDBY_LABEL, Kind, Mount
from snapd_native.snapshotter import Snapshotter
from tests.support import PROJECT
from tests.support.engine import directories, id_of, ignore_change, snapshot_names
from tests.support.failing_disk import KINDS, FailingDisk, failing_disk
from tests.support.service import check_sentence
from tests.support.waiting import WAIT_TIMEOUT, wait_until, wait_until_equal

LENGTH = 1 << 20

WRITABLE_AFTER_HEAL = [kind for kind in KINDS if kind != "ext4 without its journal"]


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, loop_directory: Path) -> Iterator[FailingDisk]:
    with failing_disk(request.param, loop_directory) as made:
        yield made


only_writable_after_heal = pytest.mark.parametrize("disk", WRITABLE_AFTER_HEAL, indirect=True)
"""For tests whose file system can be written to again after the disk is healed."""


on_xfs = pytest.mark.parametrize("disk", ["xfs"], indirect=True)
"""For tests on xfs only.

xfs keeps unwritten directories in memory until the disk is healed; ext4 fails as a whole.
"""


@contextmanager
def open_engine(disk: FailingDisk, runtime: Path) -> Iterator[Snapshotter]:
    with closing(Snapshotter(disk.root / "state", ignore_change, runtime=runtime)) as made:
        # Wait until the background work of the start is done.
        made._syncer.submit(lambda: None).result()
        yield made


def populate(engine: Snapshotter, disk: FailingDisk) -> None:
    write_large_file(engine.prepare("preparing"), "base")
    engine.commit("base", "preparing")
    engine.prepare("work", "base")
    engine.view("look", "base")
    engine.prepare("gone")
    engine._syncer.submit(lambda: None).result()
    disk.sync()


def write_large_file(mount: Mount, text: str) -> None:
    """Write a new file that is so large that most of it needs blocks that had no data before."""
    (Path(mount.source) / text).write_text(text * LENGTH)


def write_lost_file(mount: Mount) -> None:
    """Change a tree on a disk that has failed.

    Data that is written before the failure can already be on the disk: the kernel can write it back
    at any time, and any process can call sync(2). A file system without a journal can already
    refuse the change.
    """
    with suppress(OSError):
        write_large_file(mount, "lost")


def disk_has(mount: Mount, text: str) -> bool:
    """Return whether the disk, and not only the page cache, has the file of `write_large_file`."""
    fd = os.open(Path(mount.source) / text, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(fd, "rb", closefd=False) as file:
            return file.read() == text.encode() * LENGTH
    finally:
        os.close(fd)


def test_a_write_to_the_failing_disk_raises_enospc(disk: FailingDisk) -> None:
    pages, page = 16, mmap.PAGESIZE
    fd = os.open(disk.root / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, pages * page)
        with mmap.mmap(-1, pages * page) as data:
            os.pwrite(fd, memoryview(data)[:page], 0)
            disk.sync()
            disk.fail()
            with pytest.raises(OSError, match="No space left"):
                os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def test_every_commit_of_lost_data_raises_an_error(disk: FailingDisk, tmp_path: Path) -> None:
    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
        work = engine.mounts("work")
        disk.fail()
        write_lost_file(work)
        with pytest.raises((DataLoss, ResourceExhausted)) as caught:
            engine.commit("done", "work")
        check_sentence(caught.value.message, '"work"')
        disk.heal()
        for _ in range(2):
            with pytest.raises(DataLoss) as lost:
                engine.commit("done", "work")
            check_sentence(lost.value.message, '"work"')
        assert snapshot_names(engine) == ["base", "gone", "look", "work"]
        assert engine.stat("work").parent == "base"
        if disk.writable_after_heal:
            assert not disk_has(engine.mounts("work"), "lost")
            engine.remove("work")
            write_large_file(engine.prepare("work", "base"), "kept")
            engine.commit("done", "work")
    disk.mount_again()
    with open_engine(disk, tmp_path) as engine:
        assert engine.upkeep.check() == []
        assert disk_has(engine.view("see base", "base"), "base")
        if disk.writable_after_heal:
            assert disk_has(engine.view("see", "done"), "kept")
        write_large_file(engine.prepare("anew", "base"), "anew")
        engine.commit("after", "anew")
        assert "done" in snapshot_names(engine) or not disk.writable_after_heal


@only_writable_after_heal
def test_commit_of_lost_data_is_still_refused_after_a_restart(
    disk: FailingDisk, tmp_path: Path
) -> None:
    """The kernel reports the error to the first process only; the next one sees no error."""
    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
        work = engine.mounts("work")
        disk.fail()
        write_lost_file(work)
        with pytest.raises((DataLoss, ResourceExhausted)):
            engine.commit("done", "work")
        disk.heal()
    for _ in range(2):
        with open_engine(disk, tmp_path) as engine:
            for key in ("work", "gone"):
                with pytest.raises(DataLoss, match="prepare it anew"):
                    engine.commit("done", key)
    assert not disk_has(work, "lost")
    with open_engine(disk, tmp_path) as engine:
        for key in ("work", "gone"):
            engine.remove(key)
        write_large_file(engine.prepare("work", "base"), "kept")
        engine.commit("done", "work")
        assert disk_has(engine.view("see", "done"), "kept")


@only_writable_after_heal
@pytest.mark.parametrize("note", ["", "no note at all", "a mounting\n7\n8\n"])
def test_an_unreadable_note_of_a_failed_sync_makes_commit_raise_data_loss(
    disk: FailingDisk, tmp_path: Path, note: str
) -> None:
    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
    (tmp_path / "doubt").write_text(note)
    with open_engine(disk, tmp_path) as engine:
        with pytest.raises(DataLoss, match="prepare it anew"):
            engine.commit("done", "work")
        engine.prepare("anew", "base")
        engine.commit("done", "anew")
    (tmp_path / "doubt").write_text("another mounting\n1000000\n")
    with open_engine(disk, tmp_path) as engine:
        engine.commit("more", "work")


def wait_for(go_on: threading.Event) -> None:
    assert go_on.wait(WAIT_TIMEOUT)


def rewind_wal(disk: FailingDisk) -> None:
    """Make the next records overwrite the start of the WAL, where a failed disk still writes."""
    with closing(sqlite3.connect(disk.root / "state" / "metadata.db")) as db:
        db.execute("PRAGMA wal_checkpoint(RESTART)")
    disk.sync()


@on_xfs
def test_a_copy_that_the_disk_lost_is_dropped_at_the_next_boot(
    disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later syncs that succeed and a restart of the service do not change that."""
    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
        go_on = threading.Event()
        engine._syncer.submit(partial(wait_for, go_on))
        rewind_wal(disk)
        disk.fail()
        lost = engine.prepare("lost", "base")
        go_on.set()
        engine._syncer.submit(lambda: None).result()
        disk.heal()
        write_large_file(engine.prepare("kept", "base"), "kept")
    with open_engine(disk, tmp_path) as engine:
        assert not disk_has(lost, "base")
        assert engine._store.unsettled() == {int(id_of(engine, "lost"))}
    monkeypatch.setattr(linux, "boot_id", lambda: "the-next")
    with open_engine(disk, tmp_path) as engine:
        assert snapshot_names(engine) == ["base", "gone", "kept", "look", "work"]
        assert disk_has(engine.mounts("kept"), "base")


@on_xfs
def test_a_standby_clone_that_the_disk_lost_is_dropped(
    disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule also holds when another sync gets the error and the sync of the clone succeeds."""
    real = trees.Crew.clone

    def clone(*arguments: Any, **options: Any) -> None:  # noqa: ANN401 - as it is
        if made.is_set():
            assert seen.wait(WAIT_TIMEOUT)
            real(*arguments, **options)
            return
        disk.fail()
        real(*arguments, **options)
        with pytest.raises(OSError, match=r"No space|I/O"):
            engine._write_back.sync()
        disk.heal()
        made.set()

    made, seen = threading.Event(), threading.Event()
    with open_engine(disk, tmp_path) as engine:
        write_large_file(engine.prepare("preparing"), "base")
        engine.commit("base", "preparing")
        monkeypatch.setattr(trees.Crew, "clone", clone)
        engine.update("base", {STANDBY_LABEL: "1"})
        assert made.wait(WAIT_TIMEOUT)
        # If the thread sees the label before Update wakes it, the next try has begun and waits.
        wait_until(lambda: not any(name.endswith("-1") for name in directories(engine)))
        assert engine.standby("base") == (0, 1)
        seen.set()
        # The clone is tried again after the next change.
        engine.update("base", {STANDBY_LABEL: "1", "a": "b"})
        wait_until(lambda: engine.standby("base") == (1, 1))
        assert disk_has(engine.prepare("work", "base"), "base")
        engine.commit("done", "work")


REFUSED_CALL = """
import sys
from contextlib import suppress
from pathlib import Path
from snapd_native.errors import DataLoss, ResourceExhausted
from snapd_native.snapshotter import Snapshotter

engine = Snapshotter(Path(sys.argv[1]), lambda *_: None, runtime=Path(sys.argv[2]))
engine._syncer.submit(lambda: None).result()
# The start of the WAL is on the disk, so later records in it could be found.
engine.update("look", {})
print("reached", flush=True)
sys.stdin.readline()
with suppress(DataLoss, ResourceExhausted):
    while True:
        engine.update("look", {})
try:
    eval(sys.argv[3])
except (DataLoss, ResourceExhausted) as error:
    print("refused")
    print(error, flush=True)
    sys.stdin.read()
"""


CALLS = {
    "engine.update('base', {'a': 'b'})": WRITABLE_AFTER_HEAL,
    "engine.view('new', 'base')": WRITABLE_AFTER_HEAL,
    "engine.commit('done', 'gone')": WRITABLE_AFTER_HEAL,
    # ext4 fails as a whole when it cannot write a new directory, even half a minute later.
    "engine.prepare('new')": ["xfs"],
}


@pytest.mark.parametrize(
    ("disk", "call"),
    [(kind, call) for call, kinds in CALLS.items() for kind in kinds],
    indirect=["disk"],
)
def test_a_refused_call_has_no_effect_after_a_crash(
    disk: FailingDisk, tmp_path: Path, call: str
) -> None:
    """SQLite finds records in the WAL that were not synced, as long as the page cache has them."""
    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
        engine.remove("work")
        engine.upkeep.cleanup()
        before = directories(engine), names_kinds_and_labels(engine)
    # After a new mount, the blocks that xfs frees with a delay are free.
    disk.mount_again()
    disk.trim()
    command = [sys.executable, "-c", REFUSED_CALL, str(disk.root / "state"), str(tmp_path), call]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=PROJECT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "reached\n"
            disk.fail()
            print("go", file=process.stdin, flush=True)
            assert process.stdout.readline() == "refused\n"
            check_sentence(process.stdout.readline().rstrip("\n"))
        finally:
            process.kill()
        assert process.wait(WAIT_TIMEOUT) == -signal.SIGKILL
    disk.heal()
    with open_engine(disk, tmp_path) as engine:
        assert (directories(engine), names_kinds_and_labels(engine)) == before
        assert engine.upkeep.check() == []


def names_kinds_and_labels(engine: Snapshotter) -> list[tuple[str, Kind, dict[str, str]]]:
    return [(info.name, info.kind, dict(info.labels)) for info in engine.list()]


@pytest.mark.parametrize("how", ["fail", "shut_down"])
def test_calls_on_a_failed_file_system_raise_data_loss_or_resource_exhausted(
    disk: FailingDisk, tmp_path: Path, how: str
) -> None:
    """No error is Internal, and no call leaves a partial change on the disk."""
    target = tmp_path / "target"
    target.mkdir()
    with open_engine(disk, tmp_path / "run") as engine:
        populate(engine, disk)
        before = engine.list()
        getattr(disk, how)()
        with suppress(OSError, DataLoss):
            write_lost_file(engine.mounts("work"))
            disk.sync()
        calls: list[Callable[[], object]] = [
            lambda: engine.prepare("new", "base"),
            lambda: engine.prepare("empty"),
            lambda: engine.view("view", "base"),
            lambda: engine.update("base", {"a": "b"}),
            lambda: engine.mounter.mount("work", str(target)),
            lambda: engine.commit("done", "work"),
            lambda: engine.remove("gone"),
        ]
        for call in calls if not disk.writable_after_heal or how == "shut_down" else []:
            with pytest.raises((DataLoss, ResourceExhausted)) as caught:
                call()
            check_sentence(caught.value.message, "disk")
        assert engine.list() == before or disk.writable_after_heal
        disk.heal()
    disk.mount_again()
    with open_engine(disk, tmp_path / "run") as engine:
        assert engine.upkeep.check() == []
        assert disk_has(engine.view("see base", "base"), "base")
        if not disk.writable_after_heal or how == "shut_down":
            assert [info.name for info in before] == [
                n for n in snapshot_names(engine) if n != "see base"
            ]


@on_xfs
def test_mount_namespaces_of_other_programs_do_not_keep_a_disk_busy(
    disk: FailingDisk,
) -> None:
    command = ["unshare", "--mount", "--propagation", "slave", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as program:
        wait_until_equal(Path(f"/proc/{program.pid}/comm").read_text, "cat\n")
        disk.mount_again()


def test_an_unreadable_disk_is_not_reported_as_a_damaged_database(
    disk: FailingDisk, tmp_path: Path
) -> None:
    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
        for name in snapshot_names(engine):
            # This is more data than SQLite caches.
            engine.update(name, {str(number): "x" * 4000 for number in range(250)})
        disk.shut_down()
        with pytest.raises(DataLoss, match="check the disk"):
            engine.list()
    disk.mount_again()


@on_xfs
def test_a_checkpoint_during_a_read_loses_no_record(disk: FailingDisk, tmp_path: Path) -> None:
    """SQLite syncs the database only after it has copied the whole WAL into it."""
    long = {"long": "x" * 3000}
    names_of = iter(map(str, count(1000)))

    def add(number: int) -> None:
        with suppress(ResourceExhausted, DataLoss):
            for name in islice(names_of, number):
                engine.view(name, "base", long)

    with open_engine(disk, tmp_path) as engine:
        populate(engine, disk)
        # The WAL is so long now that writes to it do not fail. The database has to grow.
        add(300)
        engine.update("look", {str(number): "x" * 4000 for number in range(250)})
        add(5)
        disk.sync()
        disk.fail()
        add(20)
        with engine._store._connections.reading() as db:
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM snapshots").fetchone()
            add(36)
            with suppress(OSError):
                disk.sync()
            db.execute("COMMIT")
        add(50)
        disk.heal()
        add(300)
        before = snapshot_names(engine)
        assert len(before) > 600
    disk.mount_again()
    with open_engine(disk, tmp_path) as engine:
        assert snapshot_names(engine) == before
        assert engine.upkeep.check() == []
