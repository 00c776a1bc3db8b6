"""Mounts on a file system that does not answer, as FUSE and NFS may."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd_native.errors import FailedPrecondition
from snapd_native.model import Trouble
from snapd_native.mounts import bounded
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import open_engine, populate
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import is_writable, make_target, mount_targets
from tests.support.service import NOBODY, check_sentence
from tests.support.silent_file_system import SilentFileSystem, silent_file_system
from tests.support.waiting import WAIT_TIMEOUT, wait_until_equal

pytestmark = on_ext4

Call = Callable[[Snapshotter, SilentFileSystem], object]


@pytest.fixture
def silent(scratch: Path) -> Iterator[SilentFileSystem]:
    with silent_file_system(scratch / "silent") as file_system:
        yield file_system


@pytest.fixture
def engine_with_mount(
    populated: Snapshotter, state: Path, places: Path, silent: SilentFileSystem
) -> Iterator[Snapshotter]:
    """Mount `work` on the file system while that answers, and make a defect for Repair."""
    # The fixture `places` unmounts everything after this fixture ends. Then the file system
    # answers.
    assert places.is_dir()
    (state / "metadata.db").chmod(0o644)
    populated.mounter.mount("work", str(silent.root / "here"))
    subprocess.run(["mount", "--make-shared", str(silent.root / "here")], check=True)
    yield populated
    silent.answer()
    wait_until_equal(bounded_threads, 0)
    for target in mount_targets(populated):
        populated.mounter.unmount(target)


def commit(engine: Snapshotter, _: SilentFileSystem) -> None:
    engine.commit("done", "work")


def unmount(engine: Snapshotter, silent: SilentFileSystem) -> None:
    engine.mounter.unmount(str(silent.root / "here"))


def unmount_lazily(engine: Snapshotter, silent: SilentFileSystem) -> None:
    engine.mounter.unmount(str(silent.root / "here"), lazy=True)


def mount(engine: Snapshotter, silent: SilentFileSystem) -> None:
    engine.mounter.mount("look", str(silent.root / "there"))


def repair(engine: Snapshotter, _: SilentFileSystem) -> None:
    engine.upkeep.repair()


def bounded_threads() -> int:
    """Return the number of threads that work on file systems of others."""
    return sum(thread.name == "bounded" for thread in threading.enumerate())


@pytest.mark.parametrize("call", [commit, unmount, unmount_lazily, mount, repair])
def test_other_calls_are_answered_while_one_waits_for_a_silent_file_system(
    engine_with_mount: Snapshotter,
    silent: SilentFileSystem,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", WAIT_TIMEOUT)
    silent.stop_answering()
    with ThreadPoolExecutor() as pool:
        blocked_call = pool.submit(call, engine_with_mount, silent)
        try:
            silent.wait_until_asked(WAIT_TIMEOUT)
            engine_with_mount.mounter.mount("lone", str(make_target(places)))
            assert len(engine_with_mount.mounter.list_mounts()) == 2
            engine_with_mount.commit("another", "lone")
            engine_with_mount.mounter.unmount(str(places / "here"))
            engine_with_mount.remove("another")
            engine_with_mount.upkeep.check()
            assert not blocked_call.done()
        finally:
            silent.answer()
        blocked_call.result(WAIT_TIMEOUT)


@pytest.mark.parametrize("call", [commit, unmount, unmount_lazily, mount])
def test_a_call_on_a_file_system_that_stays_silent_raises_failed_precondition(
    engine_with_mount: Snapshotter,
    silent: SilentFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    before = engine_with_mount.mounter.list_mounts(), engine_with_mount.stat("work")
    silent.stop_answering()
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "SECONDS", 0.1)
        with pytest.raises(FailedPrecondition, match="answer") as caught:
            call(engine_with_mount, silent)
    check_sentence(caught.value.message, str(silent.root))
    assert (engine_with_mount.mounter.list_mounts(), engine_with_mount.stat("work")) == before
    silent.answer()
    assert is_writable(silent.root / "here")
    call(engine_with_mount, silent)


def test_repair_does_not_change_a_mount_on_a_silent_file_system(
    engine_with_mount: Snapshotter, silent: SilentFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent.stop_answering()
    monkeypatch.setattr(bounded, "SECONDS", 0.1)
    assert [finding.kind for finding in engine_with_mount.upkeep.repair()] == [Trouble.MODE]
    silent.answer()
    assert is_writable(silent.root / "here")


def test_a_start_does_not_ask_the_file_system_of_an_intact_mount(
    state: Path, places: Path, silent: SilentFileSystem
) -> None:
    """Otherwise each such mount delays the start, and systemd ends a start that takes too long."""
    assert places.is_dir()
    here = str(silent.root / "here")
    with open_engine(state) as engine:
        populate(engine)
        engine.mounter.mount("work", here)
    silent.stop_answering()
    with open_engine(state) as engine:
        assert not silent.was_asked()
        silent.answer()
        assert mount_targets(engine) == [here]
        engine.mounter.unmount(here)


def test_commit_does_not_ask_a_file_system_that_a_process_holds_after_a_lazy_unmount(
    populated: Snapshotter, silent: SilentFileSystem
) -> None:
    """No mount namespace contains it, and each user may make one with fusermount."""
    # subprocess would change the directory while it holds the GIL, which the file system needs.
    command = ["sh", "-c", 'cd "$1" && echo && exec cat', "sh", str(silent.root)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe) as process,
        ThreadPoolExecutor() as pool,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        subprocess.run(["umount", "--lazy", str(silent.root)], check=True)
        silent.stop_answering()
        try:
            pool.submit(populated.commit, "done", "work").result(WAIT_TIMEOUT)
        finally:
            silent.answer()


def test_repeated_calls_on_a_silent_mount_leave_one_thread(
    engine_with_mount: Snapshotter, silent: SilentFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent.stop_answering()
    monkeypatch.setattr(bounded, "SECONDS", 0.01)
    for _ in range(3):
        for call in (unmount, unmount_lazily, commit):
            with pytest.raises(FailedPrecondition, match="does not answer"):
                call(engine_with_mount, silent)
    assert bounded_threads() == 1


def test_silent_targets_of_a_user_use_a_bounded_number_of_threads_and_do_not_delay_root(
    engine_with_mount: Snapshotter,
    silent: SilentFileSystem,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent.stop_answering()
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "SECONDS", 0.01)
        for _ in range(bounded.MOST + 1):
            with pytest.raises(FailedPrecondition, match="does not answer"):
                engine_with_mount.mounter.mount("look", str(silent.root / "there"), uid=NOBODY)
    assert bounded_threads() == bounded.MOST
    engine_with_mount.mounter.mount("lone", str(make_target(places)))
    engine_with_mount.commit("another", "lone")
    engine_with_mount.mounter.unmount(str(places / "here"))
