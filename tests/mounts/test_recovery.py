"""Mounts after restarts of the daemon, after reboots, and after crashes at any step."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd_native import linux
from snapd_native.errors import NotFound
from snapd_native.mounts import Table
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import open_engine, populate, run_until_reached_and_kill, snapshot_names
from tests.support.file_systems import long_on_xfs
from tests.support.kernel_mounts import (
    entry_on,
    make_target,
    mount_by_hand,
    mount_targets,
    mount_tmpfs,
    mounted_on,
    mounts_below,
    propagation_of,
)

pytestmark = [long_on_xfs, pytest.mark.usefixtures("places")]


@contextmanager
def simulate_reboot(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> Iterator[None]:
    """Simulate a reboot: remove all mounts and the runtime directory, and change the boot id."""
    for target in reversed(mounts_below(scratch)):
        subprocess.run(["umount", target], check=True)
    run = scratch / "run" / "mounts"
    if run.exists():
        for directory in run.iterdir():
            directory.rmdir()
        run.rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(linux, "boot_id", lambda: "another boot")
        yield


def test_a_restart_keeps_the_mounts_and_their_records(state: Path, places: Path) -> None:
    made = [str(make_target(places, str(count))) for count in range(50)]
    with open_engine(state) as engine:
        populate(engine)
        for target in made:
            engine.mounter.mount("look", target)
        made.append(engine.mounter.mount("work"))
        before = engine.mounter.list_mounts()
        numbers = [entry_on(target).id for target in made]
    for _ in range(2):
        with open_engine(state) as engine:
            assert engine.mounter.list_mounts() == before
            assert [entry_on(target).id for target in made] == numbers
            assert sorted(mounts_below(state.parent)) == sorted(made)
    with open_engine(state) as engine:
        for target in made:
            engine.mounter.unmount(target)
        assert mounts_below(state.parent) == []


def test_a_mount_unmounted_while_the_daemon_is_down_is_forgotten(state: Path, places: Path) -> None:
    here = str(make_target(places))
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", here)
        own = engine.mounter.mount("work")
    for target in (here, own):
        subprocess.run(["umount", target], check=True)
    with open_engine(state) as engine:
        assert engine.mounter.list_mounts() == []
        assert not Path(own).exists()
        for key in ("look", "work"):
            engine.remove(key)


def test_a_foreign_mount_on_a_recorded_target_is_not_listed(state: Path, places: Path) -> None:
    here = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
    subprocess.run(["umount", str(here)], check=True)
    with mount_tmpfs(here), open_engine(state) as engine:
        assert engine.mounter.list_mounts() == []
        with pytest.raises(NotFound):
            engine.mounter.unmount(str(here))


def test_a_persistent_mount_unmounted_by_others_is_restored_after_a_reboot(
    state: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systemd unmounts it at shutdown; calls before the end of the service keep its record."""
    here = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
        own = engine.mounter.mount("work")
        for target in (here, own):
            subprocess.run(["umount", target], check=True)
        assert engine.mounter.list_mounts() == []
        assert engine.mounter.user(str(here)) == 0
        with pytest.raises(NotFound):
            engine.mounter.unmount("/nothing")
        engine.mounter.unmount(engine.mounter.mount("work", str(make_target(places, "other"))))
        assert [finding.key for finding in engine.mounter.findings()] == ["look", "work"]
    monkeypatch.setattr(linux, "boot_id", lambda: "the next boot")
    with open_engine(state) as engine:
        assert sorted(mount_targets(engine)) == sorted([str(here), own])
        assert engine.mounter.findings() == []


def test_repair_restores_a_persistent_mount_unmounted_by_others(state: Path, places: Path) -> None:
    here = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
        subprocess.run(["umount", here], check=True)
        engine.upkeep.repair()
        assert mount_targets(engine) == [str(here)]
        engine.mounter.unmount(str(here))


def test_a_new_mount_replaces_the_record_of_one_unmounted_by_others(
    state: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
        subprocess.run(["umount", here], check=True)
        engine.mounter.mount("work", str(here))
        subprocess.run(["umount", here], check=True)
    monkeypatch.setattr(linux, "boot_id", lambda: "the next boot")
    with open_engine(state) as engine:
        assert [mounted.key for mounted in engine.mounter.list_mounts()] == ["work"]
        engine.mounter.unmount(str(here))


def test_a_foreign_mount_with_a_recorded_id_is_not_listed(state: Path, places: Path) -> None:
    here, there = make_target(places), make_target(places, "there")
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
        (line,) = engine._store.ledger.lines()
        subprocess.run(["umount", str(here)], check=True)
        with mount_by_hand("--bind", engine.mounts("work").source, there):
            # The kernel can reuse a mount id.
            engine._store.ledger.recreated(line.id, line.boot, entry_on(there).id)
            assert engine.mounter.list_mounts() == []
            assert mounted_on(there)


def test_a_moved_mount_is_listed_at_its_new_target(state: Path, places: Path) -> None:
    # A mount on a shared mount cannot be moved.
    here, there = make_target(places), make_target(places, "there")
    with mount_by_hand("--bind", places, places):
        subprocess.run(["mount", "--make-private", str(places)], check=True)
        with open_engine(state) as engine:
            populate(engine)
            engine.mounter.mount("look", str(here))
            subprocess.run(["mount", "--move", str(here), str(there)], check=True)
            assert mount_targets(engine) == [str(there)]
        with open_engine(state) as engine:
            assert mount_targets(engine) == [str(there)]
            engine.mounter.unmount(str(there))
            assert mounted_on(there) is None


def test_persistent_mounts_are_restored_after_a_reboot(
    state: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [str(make_target(places, name)) for name in ("look", "work", "ro", "client")]
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", made[0])
        engine.mounter.mount("work", made[1])
        engine.mounter.mount("work", made[2], read_only=True)
        engine.mounter.mount("work", made[3], owner="bus :1.1")
        own = engine.mounter.mount("lone")
        before = [mounted for mounted in engine.mounter.list_mounts() if mounted.target != made[3]]
    with simulate_reboot(monkeypatch, state.parent):
        for _ in range(2):
            with open_engine(state) as engine:
                assert engine.mounter.list_mounts() == before
                assert sorted(mounts_below(state.parent)) == sorted([*made[:3], own])
                assert (Path(made[0]) / "file").read_text() == "base"
                read_only = [bool((entry := mounted_on(t)) and entry.read_only) for t in made[:3]]
                assert read_only == [True, False, True]
                assert all(propagation_of(target) == [] for target in made[:3])
                assert engine.mounter.owners() == frozenset()


def test_a_mount_that_cannot_be_restored_is_retried_at_the_next_start(
    state: Path,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here, there = make_target(places), make_target(places, "there")
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
        engine.mounter.mount("work", str(there))
    with simulate_reboot(monkeypatch, state.parent):
        for path in (here, there):
            path.rmdir()
        with open_engine(state) as engine:
            assert engine.mounter.list_mounts() == []
            sentences = [record.getMessage() for record in caplog.records]
            for key, path in (("look", here), ("work", there)):
                assert any(f'"{key}"' in text and str(path) in text for text in sentences)
            # The mount can be unmounted, and then its snapshot can be removed.
            engine.mounter.unmount(str(there))
            engine.remove("work")
        here.mkdir()
        with open_engine(state) as engine:
            assert mount_targets(engine) == mounts_below(places) == [str(here)]
        with open_engine(state) as engine:
            engine.mounter.unmount(str(here))
            engine.remove("look")


def test_a_mount_restored_before_a_crash_is_not_mounted_twice(
    state: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("look", str(here))
    with simulate_reboot(monkeypatch, state.parent):
        with open_engine(state) as engine:
            (line,) = engine._store.ledger.lines()
            engine._store.ledger.recreated(line.id, "the boot before", 1)
        before = entry_on(here).id
        with open_engine(state) as engine:
            assert mount_targets(engine) == mounts_below(places) == [str(here)]
            assert entry_on(here).id == before


CRASH = """
import sys
from pathlib import Path
from snapd_native import linux, mounts
from snapd_native.metastore.ledger import Ledger
from snapd_native.metastore import Metastore
from snapd_native.snapshotter import Snapshotter

state, call, step, when, turn = sys.argv[1:]
engine = Snapshotter(Path(state), lambda *_: None, runtime=Path(state).parent / "run")
owner = next(o for o in (linux, Ledger, Metastore) if hasattr(o, step))
real, calls = getattr(owner, step), []

def hold_at_step(*arguments, **options):
    calls.append(None)
    if len(calls) != int(turn):
        return real(*arguments, **options)
    if when == "after":
        real(*arguments, **options)
    print("reached", flush=True)
    sys.stdin.read()

setattr(owner, step, hold_at_step)
eval(call)
print("not reached", flush=True)
"""

MOUNT = "engine.mounter.mount('look', str(Path(state).parent / 'places' / 'here'))"
MOUNT_WRITABLE = "engine.mounter.mount('work', str(Path(state).parent / 'places' / 'here'))"
MOUNT_WITHOUT_TARGET = "engine.mounter.mount('look')"
UNMOUNT = "engine.mounter.unmount(str(Path(state).parent / 'places' / 'before'))"
UNMOUNT_LAZILY = "engine.mounter.unmount(str(Path(state).parent / 'places' / 'before'), lazy=True)"
COMMIT = "engine.commit('done', 'work')"

STEPS = [
    *((call, step, turn) for call in (MOUNT, MOUNT_WITHOUT_TARGET) for step, turn in [
        ("open_tree", 1), ("mount_setattr", 1), ("add", 1), ("move_mount", 1), ("mount_setattr", 2),
    ]),
    (MOUNT_WRITABLE, "move_mount", 1),
    (MOUNT_WRITABLE, "mount_setattr", 2),
    (UNMOUNT, "umount2", 1),
    (UNMOUNT, "forget", 1),
    (UNMOUNT_LAZILY, "mount_setattr", 1),
    (UNMOUNT_LAZILY, "umount2", 1),
    (COMMIT, "mount_setattr", 1),
    (COMMIT, "syncfs", 1),
    (COMMIT, "publish_commit", 1),
]  # fmt: skip
"""A call, a function that it calls as one of its steps, and which call of that function."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("call", "step", "turn"), STEPS)
def test_after_a_crash_at_any_step_mounts_and_records_agree(
    state: Path, places: Path, call: str, step: str, turn: int, when: str
) -> None:
    make_target(places)
    with open_engine(state) as engine:
        populate(engine)
        before = engine.mounter.mount("work", str(make_target(places, "before")))
    run_until_reached_and_kill(CRASH, state, call, step, when, str(turn))
    with open_engine(state) as engine:
        check_agreement(engine, state.parent)
        # The call is complete or undone.
        assert snapshot_names(engine) in (
            ["base", "lone", "look", "work"],
            ["base", "done", "lone", "look"],
        )
        committed = "done" in snapshot_names(engine)
        if call in (UNMOUNT, UNMOUNT_LAZILY):
            assert mount_targets(engine) in ([before], [])
        else:
            assert mount_targets(engine)[0] == before
        for target in mount_targets(engine):
            engine.mounter.unmount(target)
        assert mounts_below(state.parent) == []
        for key in snapshot_names(engine)[::-1]:
            if key != "base":
                engine.remove(key)
        assert snapshot_names(engine) == ["base"]
        assert committed == (call == COMMIT and (step, when) == ("publish_commit", "after"))


def check_agreement(engine: Snapshotter, scratch: Path) -> None:
    """Check that each listed mount exists with its flags, and that there is no other mount."""
    listed = {mounted.target: mounted for mounted in engine.mounter.list_mounts()}
    assert sorted(listed) == sorted(mounts_below(scratch))
    for target, mounted in listed.items():
        entry = mounted_on(target)
        assert entry is not None
        assert entry.read_only == mounted.read_only
        assert propagation_of(target) == []
        assert (Path(target) / "file").read_text() == "base"
    assert len([entry for entry in Table.read() if entry.target in listed]) == len(listed)
    own = scratch / "run" / "mounts"
    if own.exists():
        assert sorted(map(str, own.iterdir())) == sorted(t for t in listed if str(own) in t)
    assert os.listdir(scratch / "state" / "snapshots")
