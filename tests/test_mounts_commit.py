"""Remove and Commit beside mounts: ours, and anybody's."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.errors import FailedPrecondition, SnapdError
from snapd_native.jobs import Job
from snapd_native.model import Kind, Lifetime, Mounted
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from tests.engines import WAIT, directories, fail, gated, identity, names, opened
from tests.mounting import below, by_hand, mounted_on, place, targets, tmpfs, writable

pytestmark = pytest.mark.usefixtures("places")


def source(engine: Snapshotter, key: str = "work") -> Path:
    return Path(engine.mounts(key).source)


def whole(engine: Snapshotter, _: Path) -> list[str | Path]:
    return ["--bind", source(engine)]


def part(engine: Snapshotter, _: Path) -> list[str | Path]:
    (source(engine) / "part").mkdir()
    return ["--bind", source(engine) / "part"]


def alias(engine: Snapshotter, places: Path) -> list[str | Path]:
    """Through another mount of the state directory."""
    other = place(places, "alias")
    return ["--bind", other / "snapshots" / identity(engine, "work")]


@pytest.mark.parametrize("kind", [whole, part, alias])
def test_what_somebody_has_mounted_is_not_removed(
    full: Snapshotter, places: Path, kind: object
) -> None:
    here = place(places)
    assert callable(kind)
    arguments = kind(full, places)
    with ExitStack() as stack:
        if kind is alias:
            stack.enter_context(by_hand("--bind", full.state_directory, places / "alias"))
        with by_hand(*arguments, here):
            before = directories(full)
            with pytest.raises(FailedPrecondition, match=f'"work": it is mounted.* "{here}" first'):
                full.remove("work")
            assert directories(full) == before
            full.remove("lone")
    full.remove("work")


def test_a_file_that_somebody_has_mounted_is_not_removed(full: Snapshotter, places: Path) -> None:
    here = places / "file"
    here.touch()
    with (
        by_hand("--bind", source(full) / "file", here),
        pytest.raises(FailedPrecondition, match="is mounted"),
    ):
        full.remove("work")
    full.remove("work")


def test_what_has_something_mounted_in_it_is_not_removed(full: Snapshotter) -> None:
    inside = source(full) / "deep" / "inside"
    inside.mkdir(parents=True)
    with tmpfs(inside):
        with pytest.raises(FailedPrecondition, match='in it on "deep/inside"') as caught:
            full.remove("work")
        assert str(full.state_directory) not in str(caught.value)
    full.remove("work")


def test_what_the_service_has_mounted_is_not_removed(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("look", str(here))
    full.mounter.mount("work", str(there))
    for key, target in (("look", here), ("work", there)):
        with pytest.raises(FailedPrecondition, match=f'unmount "{target}" first'):
            full.remove(key)
    with pytest.raises(FailedPrecondition, match="it has children"):
        full.remove("base")
    full.mounter.unmount(str(here))
    full.remove("look")
    assert targets(full) == [str(there)]


def test_a_committed_snapshot_that_somebody_has_mounted(full: Snapshotter, places: Path) -> None:
    here = place(places)
    with by_hand("--bind", source(full, "look"), here):
        for key in ("look", "work"):
            full.remove(key)
        with pytest.raises(FailedPrecondition, match="is mounted"):
            full.remove("base")
    full.remove("base")


def test_commit_turns_mounts_read_only(full: Snapshotter, places: Path) -> None:
    ours, theirs, other = (place(places, name) for name in ("ours", "theirs", "other"))
    full.mounter.mount("work", str(ours))
    full.mounter.mount("lone", str(other))
    with by_hand("--bind", source(full), theirs), (ours / "file").open() as reading:
        assert writable(ours)
        assert writable(theirs)
        full.commit("done", "work")
        assert not writable(ours)
        assert not writable(theirs)
        assert writable(other)
        assert reading.read() == "base"
        assert full.mounter.list_mounts("done") == [
            Mounted(str(ours), "done", True, Lifetime.PERSISTENT, 0)
        ]
        state = full.state_directory
        full.close()
        with opened(state) as again:
            assert [mounted.read_only for mounted in again.mounter.list_mounts()] == [True, False]
            assert not writable(ours)


@contextmanager
def written(path: Path) -> Iterator[None]:
    with path.open("a"):
        yield


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    # The map has a descriptor of its own; that one is closed, and the map stays.
    try:
        yield
    finally:
        memory.close()


@pytest.mark.parametrize("use", [written, mapped])
@pytest.mark.parametrize("where", ["ours", "theirs"])
def test_commit_is_refused_while_somebody_writes(
    full: Snapshotter, places: Path, use: object, where: str
) -> None:
    assert callable(use)
    mounts = [place(places, name) for name in ("ours", "theirs")]
    full.mounter.mount("work", str(mounts[0]))
    with by_hand("--bind", source(full), mounts[1]):
        with use(places / where / "file"):
            with pytest.raises(FailedPrecondition) as caught:
                full.commit("done", "work")
            assert f"(pid {os.getpid()}) has a file open for writing" in caught.value.message
            assert str(places / where) in caught.value.message
            assert full.stat("work").kind is Kind.ACTIVE
            assert all(writable(mount) for mount in mounts)
            assert [mounted.read_only for mounted in full.mounter.list_mounts()] == [False]
        full.commit("done", "work")
        assert not any(writable(mount) for mount in mounts)


@pytest.mark.parametrize("how", ["measure", "sync", "cancel"])
def test_a_commit_that_fails_later_undoes_it(full: Snapshotter, places: Path, how: str) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
    job = Job()
    with pytest.MonkeyPatch.context() as patch:
        match how:
            case "measure":
                patch.setattr(trees.Crew, "measure", fail(errno.EIO))
            case "sync":
                patch.setattr(StateDirectory, "sync", fail(errno.ENOSPC))
            case "cancel":
                job = Job(lambda: job.cancel())
        with pytest.raises(SnapdError):
            full.commit("done", "work", job=job)
    assert "work" in names(full)
    assert writable(here)
    if how != "sync":
        full.commit("done", "work")
        assert not writable(here)


def test_what_is_being_committed_is_not_mounted(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("work", str(here))
    with ThreadPoolExecutor(1) as pool, gated("measure") as gate:
        committing = pool.submit(full.commit, "done", "work")
        gate.wait_until_reached()
        assert not writable(here)
        for call in (
            lambda: full.mounter.mount("work", str(there)),
            lambda: full.mounter.open_tree("work"),
        ):
            with pytest.raises(FailedPrecondition, match="is being committed"):
                call()
        # Others are not concerned, and do not wait.
        full.mounter.mount("lone", str(there))
        gate.open()
        committing.result(WAIT)
    assert below(places) == [str(here), str(there)]


def test_a_mount_that_cannot_be_reached_holds_a_commit_up(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("work", str(there))
    full.mounter.mount("work", str(here))
    with tmpfs(here):
        with pytest.raises(FailedPrecondition, match="something else over it"):
            full.commit("done", "work")
        assert writable(there)
        assert "work" in names(full)
    full.commit("done", "work")


def test_a_mount_that_is_hidden_is_turned_read_only_all_the_same(
    full: Snapshotter, places: Path
) -> None:
    """What is mounted in a mount of the snapshot stays as it is."""
    here = place(places)
    (source(full) / "inside").mkdir()
    full.mounter.mount("work", str(here))
    with tmpfs(here / "inside"):
        full.commit("done", "work")
        assert not writable(here)
        assert writable(here / "inside")
        assert mounted_on(here / "inside")


def test_what_is_mounted_inside_is_not_measured_or_copied(full: Snapshotter) -> None:
    before = full.usage("work")
    inside = source(full) / "inside"
    inside.mkdir()
    with tmpfs(inside):
        (inside / "elsewhere").touch()
        assert full.usage("work").inodes == before.inodes + 1
        full.commit("done", "work")
        copy = Path(full.prepare("copy", "done").source)
        assert list((copy / "inside").iterdir()) == []
