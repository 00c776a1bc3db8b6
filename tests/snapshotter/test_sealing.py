"""Commit seals trees: their files and directories are immutable, or all is as it was."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapd_native import trees
from snapd_native.errors import Cancelled, FailedPrecondition, SnapdError
from snapd_native.jobs import Job
from snapd_native.metastore import Metastore
from snapd_native.model import Trouble
from snapd_native.mounts import processes
from snapd_native.private import temporary_state
from snapd_native.snapshotter import Snapshotter
from snapd_native.snapshotter.state import StateDirectory
from snapd_native.trees.seal import Sealer
from tests.support.engine import directories, failing_function, open_engine, write_files
from tests.support.kernel_mounts import mount_by_hand
from tests.support.sealing import flags, is_sealed, tree_of, unsealed


@pytest.fixture
def work(populated: Snapshotter) -> Path:
    """Return the tree of the active snapshot ``work``, with entries of all kinds."""
    tree = tree_of(populated, "work")
    for name in ("directory/inner", "empty"):
        (tree / name).mkdir(parents=True)
    for name in ("first", "directory/second", "directory/inner/third"):
        (tree / name).write_text(name)
    os.link(tree / "first", tree / "directory" / "name")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", 0o20600, os.makedev(1, 3))
    (tree / "link").symlink_to("/etc/passwd")
    return tree


def test_commit_seals_all_directories_and_regular_files(populated: Snapshotter, work: Path) -> None:
    before = populated.usage("work")
    populated.commit("done", "work", digest=True)
    assert set(flags(work).values()) == {"i"}
    assert populated.usage("done") == before
    populated.upkeep.verify("done")


def test_a_child_of_a_sealed_tree_is_mutable(populated: Snapshotter, work: Path) -> None:
    populated.commit("done", "work")
    child = Path(populated.prepare("child", "done").source)
    assert set(flags(child).values()) == {""}
    write_files(populated.mounts("child"), first="new")
    assert (work / "first").read_text() == "first"


def test_a_sealed_tree_is_removed(populated: Snapshotter, work: Path) -> None:
    populated.commit("done", "work")
    populated.remove("done")
    populated.upkeep.cleanup()
    assert not work.exists()
    assert not [name for name in directories(populated) if name.startswith("rm-")]


def test_an_empty_view_is_sealed_and_can_be_removed(populated: Snapshotter) -> None:
    view = Path(populated.view("empty").source)
    assert flags(view) == {".": "i"}
    populated.remove("empty")
    populated.upkeep.cleanup()
    assert not view.exists()


def test_check_finds_a_restored_empty_view_that_is_not_sealed(populated: Snapshotter) -> None:
    view = Path(populated.view("empty").source)
    unsealed(view)
    (finding,) = populated.upkeep.check()
    assert (finding.kind, finding.key) == (Trouble.MODE, "empty")
    assert populated.upkeep.repair() == [finding]
    assert flags(view) == {".": "i"}


def test_a_repair_that_stops_in_the_middle_of_a_tree_leaves_its_finding(
    populated: Snapshotter, work: Path
) -> None:
    """The service can be killed after a part of the tree is sealed: the root is not yet sealed."""
    populated.commit("done", "work")
    unsealed(work)
    before = populated.upkeep.check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "seal", failing_function(errno.EIO))
        assert populated.upkeep.repair() == []
    assert set(flags(work / "directory").values()) == {"i"}
    assert populated.upkeep.check() == before
    assert populated.upkeep.repair() == before


def test_check_finds_a_restored_tree_that_is_not_sealed_and_repair_seals_it(
    populated: Snapshotter, work: Path
) -> None:
    populated.commit("done", "work", digest=True)
    assert populated.upkeep.check() == []
    unsealed(work)
    (finding,) = populated.upkeep.check()
    assert (finding.kind, finding.key) == (Trouble.MODE, "done")
    with (work / "first").open("a"):
        assert populated.upkeep.repair() == []
    assert populated.upkeep.repair() == [finding]
    assert set(flags(work).values()) == {"i"}
    assert populated.upkeep.check() == []
    populated.upkeep.verify("done")


def test_a_rename_that_fails_leaves_the_root_sealed(
    populated: Snapshotter, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sealed directory cannot be renamed: its root is unsealed for a moment."""
    populated.commit("done", "work")
    real = os.rename

    def rename(*given: Any, **also: Any) -> None:  # noqa: ANN401 - as os.rename
        if not is_sealed(work):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*given, **also)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            populated._state.set_aside(int(work.name))
    assert is_sealed(work)


@pytest.mark.parametrize("filesystem", ["xfs"], indirect=True)
def test_a_sealed_tree_of_another_quota_project_is_set_aside(
    populated: Snapshotter, work: Path
) -> None:
    populated.commit("done", "work")
    subprocess.run(["chattr", "-p", "100", "+P", work.parent], check=True)
    found = work.with_name(populated._state.set_aside(int(work.name)))
    assert is_sealed(found)
    populated._state.undo_set_aside(int(work.name))
    assert is_sealed(work)


def cancel(engine: Snapshotter) -> None:
    job = Job()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateDirectory, "sync", lambda _: job.cancel())
        with pytest.raises(Cancelled):
            engine.commit("done", "work", job=job)


def fail_to(owner: object, name: str) -> Callable[[Snapshotter], None]:
    """Return a function that calls Commit while ``name`` of ``owner`` fails."""

    def commit(engine: Snapshotter) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing_function(errno.EDQUOT))
            with pytest.raises(SnapdError):
                engine.commit("done", "work")

    return commit


def write_meanwhile(engine: Snapshotter) -> None:
    file = tree_of(engine, "work") / "directory" / "second"
    with file.open("a"), pytest.raises(FailedPrecondition):
        engine.commit("done", "work")


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(cancel, id="cancelled"),
        pytest.param(fail_to(StateDirectory, "sync"), id="sync"),
        pytest.param(write_meanwhile, id="writer"),
    ],
)
def test_a_commit_that_fails_leaves_the_tree_unsealed(
    populated: Snapshotter, work: Path, fail: Callable[[Snapshotter], None]
) -> None:
    subprocess.run(["chattr", "+a", work / "first"], check=True)
    before = flags(work)
    assert set(before.values()) == {"", "a"}
    # A file that was immutable before Commit loses the flag.
    subprocess.run(["chattr", "+i", work / "directory" / "inner" / "third"], check=True)
    fail(populated)
    assert flags(work) == before
    subprocess.run(["chattr", "-a", work / "first"], check=True)
    write_files(populated.mounts("work"), first="new")


@pytest.mark.parametrize("part", ["root", "half", "all"])
def test_a_start_unseals_the_tree_of_an_interrupted_commit(state: Path, part: str) -> None:
    with open_engine(state) as engine:
        write_files(engine.prepare("work"), file="text")
        work = tree_of(engine, "work")
        (work / "directory").mkdir()
        (work / "directory" / "other").touch()
        write_files(engine.prepare("base"), file="text")
        engine.commit("done", "base")
        done = tree_of(engine, "done")
    names = {"root": ["."], "half": [".", "directory"], "all": [".", "directory", "file"]}
    subprocess.run(["chattr", "+i", *names[part]], check=True, cwd=work)
    with open_engine(state) as engine:
        assert set(flags(work).values()) == {""}
        assert set(flags(done).values()) == {"i"}
        engine.commit("later", "work")


def test_a_tree_that_cannot_be_unsealed_is_unsealed_at_the_next_start(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_engine(state) as engine:
        write_files(engine.prepare("work"), file="text")
        work = tree_of(engine, "work")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateDirectory, "sync", failing_function(errno.EDQUOT))
            patch.setattr(trees.Crew, "unseal", failing_function(errno.EIO))
            with pytest.raises(SnapdError):
                engine.commit("done", "work")
        assert flags(work)["."] == "i"
        assert "immutable in part" in caplog.text
    with open_engine(state):
        assert set(flags(work).values()) == {""}


@contextmanager
def loop_device(file: Path) -> Iterator[None]:
    found = subprocess.run(
        ["losetup", "--find", "--show", file], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        yield
    finally:
        subprocess.run(["losetup", "--detach", found], check=True)


@contextmanager
def mapping(file: Path) -> Iterator[None]:
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 4096)
    with mapped:
        yield


@pytest.mark.parametrize(
    ("hold", "who"),
    [
        (lambda file: file.open("r+"), rf"\(pid {os.getpid()}\) has a file in it open"),
        (mapping, rf"\(pid {os.getpid()}\) has a file in it open"),
        (loop_device, "something that was not found, such as a loop device"),
    ],
    ids=["open", "mapped", "loop"],
)
def test_commit_is_refused_while_somebody_can_write_to_a_file(
    populated: Snapshotter, work: Path, hold: Callable[[Path], Iterator[None]], who: str
) -> None:
    file = work / "directory" / "inner" / "third"
    file.write_bytes(bytes(1 << 20))
    with hold(file), pytest.raises(FailedPrecondition, match=who):  # type: ignore[attr-defined]
        populated.commit("done", "work")
    populated.commit("done", "work")


def test_the_search_for_writers_ends_after_its_time_limit(
    populated: Snapshotter, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user with many open files does not delay the refusal of another user's Commit."""
    monkeypatch.setattr(processes, "SEARCH_SECONDS", -1.0)
    with (work / "first").open("a"), pytest.raises(FailedPrecondition, match="was not found"):
        populated.commit("done", "work")


def test_a_directory_is_sealed_before_it_is_read(
    populated: Snapshotter, work: Path, no_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be added to a directory after Commit has listed it."""
    real, seen = Sealer.entry, list[str]()

    def entry(sealer: Sealer, name: str, directory: int, status: os.stat_result) -> None:
        with pytest.raises(PermissionError):
            os.mkdir("late", dir_fd=directory)
        seen.append(name)
        real(sealer, name, directory, status)

    monkeypatch.setattr(Sealer, "entry", entry)
    populated.commit("done", "work")
    assert {"first", "second", "third"} <= set(seen)


def test_a_file_system_without_inode_flags_is_named_at_the_start(
    scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = scratch / "ramfs"
    root.mkdir()
    with (
        mount_by_hand("-t", "ramfs", "ramfs", root),
        caplog.at_level(logging.WARNING),
        open_engine(root / "state") as engine,
    ):
        assert "ramfs lacks inode flags or leases" in caplog.text
        write_files(engine.prepare("work"), file="text")
        engine.commit("done", "work", digest=True)
        engine.upkeep.verify("done")
        engine.remove("done")


def test_a_commit_whose_record_cannot_be_written_leaves_the_tree_unsealed(
    populated: Snapshotter, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Metastore, "publish_commit", failing_function(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            populated.commit("done", "work")
    assert set(flags(work).values()) == {""}


def test_a_temporary_state_with_sealed_trees_is_deleted(scratch: Path) -> None:
    with temporary_state(scratch) as state, open_engine(state) as engine:
        write_files(engine.prepare("work"), file="text")
        engine.commit("done", "work")
    assert list(scratch.iterdir()) == []
