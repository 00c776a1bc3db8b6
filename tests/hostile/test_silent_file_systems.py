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
from tests.support.engine import fill, opened
from tests.support.file_systems import on_ext4
from tests.support.kernel_mounts import place, targets, writable
from tests.support.service import NOBODY, check_sentence
from tests.support.silent_file_system import SilentFileSystem, silent_file_system
from tests.support.waiting import WAIT, becomes

pytestmark = on_ext4

Call = Callable[[Snapshotter, SilentFileSystem], object]


@pytest.fixture
def silent(scratch: Path) -> Iterator[SilentFileSystem]:
    with silent_file_system(scratch / "silent") as lent:
        yield lent


@pytest.fixture
def mounted(
    full: Snapshotter, state: Path, places: Path, silent: SilentFileSystem
) -> Iterator[Snapshotter]:
    """Mount `work` on the file system while that answers, and make a defect for Repair."""
    # The fixture `places` unmounts everything after this fixture ends. Then the file system
    # answers.
    assert places.is_dir()
    (state / "metadata.db").chmod(0o644)
    full.mounter.mount("work", str(silent.root / "here"))
    subprocess.run(["mount", "--make-shared", str(silent.root / "here")], check=True)
    yield full
    silent.answer()
    becomes(waiting, 0)
    for target in targets(full):
        full.mounter.unmount(target)


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


def waiting() -> int:
    """Return the number of threads that work on file systems of others."""
    return sum(thread.name == "bounded" for thread in threading.enumerate())


@pytest.mark.parametrize("call", [commit, unmount, unmount_lazily, mount, repair])
def test_other_calls_are_answered_while_one_waits_for_a_silent_file_system(
    mounted: Snapshotter,
    silent: SilentFileSystem,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", WAIT)
    silent.stop_answering()
    with ThreadPoolExecutor() as pool:
        held_up = pool.submit(call, mounted, silent)
        try:
            silent.wait_until_asked(WAIT)
            mounted.mounter.mount("lone", str(place(places)))
            assert len(mounted.mounter.list_mounts()) == 2
            mounted.commit("another", "lone")
            mounted.mounter.unmount(str(places / "here"))
            mounted.remove("another")
            mounted.upkeep.check()
            assert not held_up.done()
        finally:
            silent.answer()
        held_up.result(WAIT)


@pytest.mark.parametrize("call", [commit, unmount, unmount_lazily, mount])
def test_a_call_on_a_file_system_that_stays_silent_raises_failed_precondition(
    mounted: Snapshotter, silent: SilentFileSystem, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    before = mounted.mounter.list_mounts(), mounted.stat("work")
    silent.stop_answering()
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "SECONDS", 0.1)
        with pytest.raises(FailedPrecondition, match="answer") as caught:
            call(mounted, silent)
    check_sentence(caught.value.message, str(silent.root))
    assert (mounted.mounter.list_mounts(), mounted.stat("work")) == before
    silent.answer()
    assert writable(silent.root / "here")
    call(mounted, silent)


def test_repair_does_not_change_a_mount_on_a_silent_file_system(
    mounted: Snapshotter, silent: SilentFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent.stop_answering()
    monkeypatch.setattr(bounded, "SECONDS", 0.1)
    assert [finding.kind for finding in mounted.upkeep.repair()] == [Trouble.MODE]
    silent.answer()
    assert writable(silent.root / "here")


def test_a_start_does_not_ask_the_file_system_of_an_intact_mount(
    state: Path, places: Path, silent: SilentFileSystem
) -> None:
    """Otherwise each such mount delays the start, and systemd ends a start that takes too long."""
    assert places.is_dir()
    here = str(silent.root / "here")
    with opened(state) as engine:
        fill(engine)
        engine.mounter.mount("work", here)
    silent.stop_answering()
    with opened(state) as engine:
        assert not silent.was_asked()
        silent.answer()
        assert targets(engine) == [here]
        engine.mounter.unmount(here)


def test_commit_does_not_ask_a_file_system_that_a_process_holds_after_a_lazy_unmount(
    full: Snapshotter, silent: SilentFileSystem
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
            pool.submit(full.commit, "done", "work").result(WAIT)
        finally:
            silent.answer()


def test_repeated_calls_on_a_silent_mount_leave_one_thread(
    mounted: Snapshotter, silent: SilentFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent.stop_answering()
    monkeypatch.setattr(bounded, "SECONDS", 0.01)
    for _ in range(3):
        for call in (unmount, unmount_lazily, commit):
            with pytest.raises(FailedPrecondition, match="does not answer"):
                call(mounted, silent)
    assert waiting() == 1


def test_silent_targets_of_a_user_use_a_bounded_number_of_threads_and_do_not_delay_root(
    mounted: Snapshotter, silent: SilentFileSystem, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent.stop_answering()
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "SECONDS", 0.01)
        for _ in range(bounded.MOST + 1):
            with pytest.raises(FailedPrecondition, match="does not answer"):
                mounted.mounter.mount("look", str(silent.root / "there"), uid=NOBODY)
    assert waiting() == bounded.MOST
    mounted.mounter.mount("lone", str(place(places)))
    mounted.commit("another", "lone")
    mounted.mounter.unmount(str(places / "here"))
