"""The state directory: its owner, mode and lock, and what start and cleanup delete in it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd_native import linux, trees
from snapd_native.errors import (
    DataLoss,
    FailedPrecondition,
    Unavailable,
)
from snapd_native.metastore import Metastore
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests.support.engine import (
    POPULATED_NAMES,
    directories,
    failing_function,
    id_of,
    ignore_change,
    open_engine,
    read_files,
    snapshot_names,
    write_files,
)
from tests.support.file_systems import long_on_xfs
from tests.support.holding import hold_function
from tests.support.sealing import unsealed

pytestmark = long_on_xfs


def test_start_and_cleanup_delete_orphans_and_nothing_else(populated_state: Path) -> None:
    own = set(os.listdir(populated_state / "snapshots"))
    foreign = {"lost+found", "017", "0", "new-", "new-x", "rm-1x", "17 ", "old-17", "x", "-17"}

    def make_orphans() -> None:
        for name in {"17", "new-18", "rm-19", "20", "rm-21"} | foreign:
            (populated_state / "snapshots" / name / "deep").mkdir(parents=True, exist_ok=True)
            (populated_state / "snapshots" / name / "deep" / "file").touch()

    with open_engine(populated_state) as engine:
        make_orphans()
        engine.upkeep.cleanup()
        assert directories(engine) == own | foreign
        make_orphans()
    with open_engine(populated_state) as again:
        assert directories(again) == own | foreign
        assert snapshot_names(again) == POPULATED_NAMES
        assert Path(again.prepare("new").source).name not in {"17", "18", "19", "20", "21"}


WITHOUT_THE_CAPABILITY = """
import sys
from pathlib import Path
from snapd_native.errors import FailedPrecondition
from snapd_native.snapshotter import Snapshotter
try:
    Snapshotter(Path(sys.argv[1]), lambda *_: None)
except FailedPrecondition as error:
    print(error)
"""


@pytest.mark.parametrize("capability", ["linux_immutable", "lease"])
def test_a_start_without_a_capability_for_sealing_is_refused(state: Path, capability: str) -> None:
    outcome = subprocess.run(
        [
            *("setpriv", f"--bounding-set=-{capability}"),
            *(sys.executable, "-c", WITHOUT_THE_CAPABILITY, str(state)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"CAP_{capability.upper()}" in outcome.stdout


def test_concurrent_listings_of_the_directory_are_complete(scratch: Path) -> None:
    state = StateDirectory(scratch / "state")
    try:
        for number in range(1, 1001):
            (scratch / "state" / "snapshots" / str(number)).mkdir()
            (scratch / "state" / "snapshots" / f"ready-{number}-{number}").mkdir()
        with ThreadPoolExecutor(2) as pool:
            for _ in range(50):
                listing, standbys = pool.submit(state.listing), pool.submit(state.standbys)
                assert (len(listing.result()), len(standbys.result())) == (1000, 1000)
    finally:
        state.close()


def test_an_id_is_never_reused_after_a_restart(state: Path) -> None:
    seen: list[str] = []
    for _ in range(3):
        with open_engine(state) as engine:
            for _ in range(3):
                seen.append(Path(engine.prepare("key").source).name)
                engine.remove("key")
    assert len(set(seen)) == 9


def test_an_unsettled_prepare_of_an_earlier_boot_is_dropped_at_start(state: Path) -> None:
    def boot_before(settled: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linux, "boot_id", lambda: "the boot before")
            if not settled:
                patch.setattr(Metastore, "settle", failing_function(errno.EIO))
            with open_engine(state) as engine:
                engine.prepare("settled" if settled else "unsettled", "base")

    with open_engine(state) as engine:
        write_files(engine.prepare("preparing"), file="base")
        engine.commit("base", "preparing")
    boot_before(settled=True)
    with open_engine(state) as engine:
        assert snapshot_names(engine) == ["base", "settled"]
    boot_before(settled=False)
    with open_engine(state) as engine:
        assert snapshot_names(engine) == ["base", "settled"]
        assert directories(engine) == {id_of(engine, key) for key in ("base", "settled")}
        write_files(engine.prepare("unsettled", "base"), file="again")


def test_a_restart_settles_unsettled_prepares(state: Path) -> None:
    with open_engine(state) as engine:
        engine.prepare("preparing")
        engine.commit("base", "preparing")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Metastore, "settle", failing_function(errno.EIO))
            engine.prepare("work", "base")
            engine._syncer.submit(lambda: None).result()
        engine.prepare("committed", "base")
        engine.commit("done", "committed")
    with open_engine(state) as engine:
        engine._syncer.submit(lambda: None).result()
        assert engine._store.unsettled() == set()
        assert snapshot_names(engine) == ["base", "done", "work"]


@pytest.mark.parametrize("parent", ["", "base"])
def test_prepare_does_not_touch_a_foreign_directory_at_its_path(
    populated: Snapshotter, parent: str
) -> None:
    last = max(map(int, directories(populated)))
    way = populated.state_directory / "snapshots" / str(last + 1)
    (way / "precious").mkdir(parents=True)
    with pytest.raises(FailedPrecondition, match="in its way"):
        populated.prepare("new", parent)
    assert (way / "precious").is_dir()
    assert Path(populated.prepare("new", parent).source).name == str(last + 2)


def test_the_id_of_an_undeletable_orphan_is_not_reused(populated_state: Path) -> None:
    last = max(int(name) for name in os.listdir(populated_state / "snapshots"))
    orphan = populated_state / "snapshots" / f"new-{last + 1}"
    (orphan / "inside").mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(populated_state), str(orphan / "inside")], check=True)
    try:
        with open_engine(populated_state) as engine:
            assert orphan.name in directories(engine)
            assert Path(engine.prepare("new").source).name == str(last + 2)
            assert engine.list(["name==base"])
    finally:
        subprocess.run(["umount", str(orphan / "inside")], check=True)
    with open_engine(populated_state) as engine:
        assert orphan.name not in directories(engine)


@pytest.mark.parametrize("size", [None, 0])
def test_start_without_the_database_raises_data_loss_and_deletes_nothing(
    populated_state: Path, size: int | None
) -> None:
    before = sorted(os.listdir(populated_state / "snapshots"))
    for path in populated_state.glob("metadata.db*"):
        path.rename(populated_state.parent / path.name)
    if size is not None:
        (populated_state / "metadata.db").touch()
    with pytest.raises(DataLoss, match="restore it"):
        Snapshotter(populated_state, ignore_change)
    assert sorted(os.listdir(populated_state / "snapshots")) == before
    for path in populated_state.parent.glob("metadata.db*"):
        path.rename(populated_state / path.name)
    with open_engine(populated_state) as engine:
        assert snapshot_names(engine) == POPULATED_NAMES


def test_cleanup_keeps_a_regular_file_named_like_an_id(populated_state: Path) -> None:
    file = populated_state / "snapshots" / "99"
    file.write_text("somebody's")
    with open_engine(populated_state) as engine:
        engine.upkeep.cleanup()
        assert file.read_text() == "somebody's"
    file.unlink()


def test_a_start_waits_for_a_killed_daemon_that_has_just_started_a_worker(state: Path) -> None:
    """Until it executes its program, the process of the worker has all files of the daemon open."""
    with open_engine(state):
        pass
    held = os.open(state, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with hold_function(time, "sleep") as waiting, ThreadPoolExecutor(1) as pool:
        started = pool.submit(lambda: StateDirectory(state).close())
        waiting.wait_until_reached()
        os.close(held)
        waiting.release()
    started.result()


def test_a_second_snapshotter_on_a_state_directory_raises_unavailable(
    populated_state: Path,
) -> None:
    for _ in range(2):
        with open_engine(populated_state) as engine:
            with pytest.raises(Unavailable, match="in use"):
                Snapshotter(populated_state, ignore_change)
            assert snapshot_names(engine) == POPULATED_NAMES


@pytest.mark.parametrize("before", [None, 0o755, 0o777])
def test_the_state_directory_gets_mode_0700(state: Path, before: int | None) -> None:
    if before is not None:
        (state / "snapshots").mkdir(parents=True)
        for path in (state, state / "snapshots"):
            path.chmod(before)
    with open_engine(state):
        for path in (state, state / "snapshots"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "metadata.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("which", [".", "snapshots"])
@pytest.mark.parametrize("wrong", ["owner", "file", "link to a file"])
def test_a_state_directory_of_another_owner_or_type_is_refused(
    state: Path, which: str, wrong: str
) -> None:
    path = state / which
    if wrong == "owner":
        path.mkdir(parents=True)
        os.chown(path, 1000, 1000)
    else:
        path.parent.mkdir(exist_ok=True)
        (path.parent / "file").touch()
        path.symlink_to("file") if wrong != "file" else (path.parent / "file").rename(path)
    with pytest.raises(FailedPrecondition):
        Snapshotter(state, ignore_change)
    assert not (state / "metadata.db").exists()
    if wrong == "owner":
        os.chown(path, 0, 0)
        with open_engine(state) as engine:
            assert snapshot_names(engine) == []


def test_start_with_a_damaged_database_raises_data_loss(populated_state: Path) -> None:
    own = set(os.listdir(populated_state / "snapshots"))
    content = (populated_state / "metadata.db").read_bytes()
    (populated_state / "metadata.db").write_bytes(b"garbage!" * 4096)
    with pytest.raises(DataLoss):
        Snapshotter(populated_state, ignore_change)
    (populated_state / "metadata.db").write_bytes(content)
    with open_engine(populated_state) as again:
        assert snapshot_names(again) == POPULATED_NAMES
        assert directories(again) == own


@pytest.mark.parametrize("instead", ["nothing", "file", "link"])
def test_calls_on_a_lost_tree_raise_data_loss(populated: Snapshotter, instead: str) -> None:
    for name in ("base", "lone"):
        path = populated.state_directory / "snapshots" / id_of(populated, name)
        unsealed(path).rename(populated.state_directory / name)
        if instead == "file":
            path.touch()
        elif instead == "link":
            path.symlink_to(populated.state_directory / name)
    before = directories(populated), populated.list()
    for call in (
        lambda: populated.mounts("look"),
        lambda: populated.mounts("lone"),
        lambda: populated.usage("lone"),
        lambda: populated.prepare("new", "base"),
        lambda: populated.view("new", "base"),
        lambda: populated.commit("new", "lone"),
    ):
        with pytest.raises(DataLoss) as caught:
            call()
        assert str(populated.state_directory) not in str(caught.value)
    assert (directories(populated), populated.list()) == before
    assert populated.usage("base").inodes == 3


def test_cleanup_does_not_delete_through_a_mount_inside_a_tree(populated: Snapshotter) -> None:
    (Path(populated.mounts("lone").source) / "mounted").mkdir()
    removed = populated.state_directory / "snapshots" / f"rm-{id_of(populated, 'lone')}"
    try:
        with hold_function(trees, "delete") as held:
            populated.remove("lone")
            held.wait_until_reached()
            source, inside = populated.mounts("work").source, removed / "mounted"
            subprocess.run(["mount", "--bind", source, str(inside)], check=True)
        with pytest.raises(FailedPrecondition, match="mounted"):
            populated.upkeep.cleanup()
    finally:
        points = Path("/proc/self/mountinfo").read_text().splitlines()
        under = [
            line.split()[4] for line in points if str(populated.state_directory) in line.split()[4]
        ]
        for point in under:
            subprocess.run(["umount", point], check=True)
    populated.upkeep.cleanup()
    assert read_files(populated.mounts("work")) == {"file": "base", "other": "more"}
    assert directories(populated) == {id_of(populated, "base"), id_of(populated, "work")}


@pytest.mark.parametrize("name", ["state", "snapshots"])
def test_a_directory_with_foreign_files_is_refused_and_left_unchanged(
    scratch: Path, name: str
) -> None:
    state = scratch / name
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    (state / "something").touch()
    with pytest.raises(FailedPrecondition, match="choose"):
        Snapshotter(state, ignore_change)
    assert stat.S_IMODE(state.stat().st_mode) == 0o755
    assert os.listdir(state) == ["something"]


def test_a_stop_during_start_raises_unavailable(populated_state: Path) -> None:
    orphan = populated_state / "snapshots" / "new-99"
    (orphan / "inside").mkdir(parents=True)
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(Unavailable):
        Snapshotter(populated_state, ignore_change, stopping)
    assert (orphan / "inside").exists()
    with open_engine(populated_state):
        assert not orphan.exists()
