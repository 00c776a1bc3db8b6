"""Mount, Unmount and ListMounts: targets, flags, propagation and concurrent calls."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from snapd_native import linux, mounts
from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.model import Lifetime, Mounted
from snapd_native.mounts import Entry, Table
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import ignore_change, populate, read_files
from tests.support.file_systems import long_on_xfs
from tests.support.kernel_mounts import (
    is_writable,
    make_target,
    mount_by_hand,
    mount_targets,
    mount_tmpfs,
    mounted_on,
    mounts_below,
    propagation_of,
)
from tests.support.waiting import WAIT_TIMEOUT

pytestmark = [long_on_xfs, pytest.mark.usefixtures("places")]


def test_an_active_snapshot_is_mounted_writable(populated: Snapshotter, places: Path) -> None:
    here = make_target(places)
    assert populated.mounter.mount("work", str(here)) == str(here)
    assert (here / "file").read_text() == "base"
    (here / "new").write_text("text")
    assert (Path(populated.mounts("work").source) / "new").read_text() == "text"
    assert populated.mounter.list_mounts() == [
        Mounted(str(here), "work", False, Lifetime.PERSISTENT, 0)
    ]
    assert propagation_of(here) == []
    populated.mounter.unmount(str(here))
    assert mounted_on(here) is None
    assert list(here.iterdir()) == []
    assert populated.mounter.list_mounts() == []


def test_a_view_is_mounted_read_only(populated: Snapshotter, places: Path) -> None:
    here = make_target(places)
    populated.mounter.mount("look", str(here))
    assert (here / "file").read_text() == "base"
    assert not is_writable(here)
    assert populated.mounter.list_mounts("look") == [
        Mounted(str(here), "look", True, Lifetime.PERSISTENT, 0)
    ]
    with pytest.raises(InvalidArgument, match='"look" is a view'):
        populated.mounter.mount("look", str(make_target(places, "there")), read_only=False)


def test_an_active_snapshot_may_be_mounted_read_only(populated: Snapshotter, places: Path) -> None:
    here, there = make_target(places), make_target(places, "there")
    populated.mounter.mount("work", str(here), read_only=True)
    populated.mounter.mount("work", str(there))
    assert not is_writable(here)
    assert is_writable(there)
    assert (here / "new").read_text() == "text"
    assert [mounted.read_only for mounted in populated.mounter.list_mounts("work")] == [True, False]


def test_mount_without_a_target_makes_a_directory_for_the_mount(
    populated: Snapshotter, scratch: Path
) -> None:
    target = populated.mounter.mount("look")
    assert Path(target).parent == scratch / "run" / "mounts"
    assert Path(target).parent.stat().st_mode & 0o777 == 0o700
    assert (Path(target) / "file").read_text() == "base"
    with pytest.raises(AlreadyExists, match="unmount it first"):
        populated.mounter.mount("look")
    populated.mounter.unmount(target)
    assert not Path(target).exists()


def test_mount_includes_the_mounts_inside_the_snapshot(
    populated: Snapshotter, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    inside = Path(populated.mounts("work").source) / "inside"
    inside.mkdir()
    with mount_tmpfs(inside):
        (inside / "deep").mkdir()
        with mount_tmpfs(inside / "deep"):
            populated.mounter.mount("work", str(here))
            populated.mounter.mount("work", str(there), read_only=True)
            for path in ("inside", "inside/deep"):
                assert is_writable(here / path)
                assert not is_writable(there / path)
                assert propagation_of(here / path) == propagation_of(there / path) == []
            assert (inside / "new").exists()
            for target in mount_targets(populated):
                with pytest.raises(FailedPrecondition, match=f'unmount "{target}/inside" first'):
                    populated.mounter.unmount(target)
                populated.mounter.unmount(target, lazy=True)
    assert mounts_below(places) == []


def test_commit_and_prepare_do_not_copy_mounts_inside_the_snapshot(
    populated: Snapshotter, places: Path
) -> None:
    before = populated.usage("work")
    inside = Path(populated.mounts("work").source) / "inside"
    inside.mkdir()
    with mount_tmpfs(inside):
        (inside / "file").write_text("elsewhere")
        assert populated.usage("work").inodes == before.inodes + 1
        populated.commit("v2", "work")
    copy = Path(populated.prepare("copy", "v2").source)
    assert list((copy / "inside").iterdir()) == []
    assert populated.usage("v2").inodes == before.inodes + 1


def test_mounts_are_private_on_a_shared_mount(populated: Snapshotter, places: Path) -> None:
    """The mount propagates to the peers of its parent mount; mounts inside it do not propagate."""
    first, second = make_target(places, "first"), make_target(places, "second")
    with mount_by_hand("--bind", first, first):
        subprocess.run(["mount", "--make-shared", str(first)], check=True)
        with mount_by_hand("--bind", first, second):
            here = make_target(first)
            populated.mounter.mount("look", str(here))
            assert propagation_of(here) == []
            assert not is_writable(here)
            assert not is_writable(second / "here")
            populated.mounter.unmount(str(here))
            assert mounted_on(second / "here") is None


STEPS = ("openat2", "open_tree", "mount_id", "mount_setattr", "move_mount", "umount2")
"""All system calls by which the service mounts and unmounts."""


@contextmanager
def call_around_steps(before: Callable[[], object], after: Callable[[], object]) -> Iterator[None]:
    """Call ``before`` and ``after`` around each step."""
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(linux, name, _stepped(getattr(linux, name), before, after))
        yield


def _stepped(
    real: Callable[..., Any], before: Callable[[], object], after: Callable[[], object]
) -> Callable[..., Any]:
    def step(*arguments: Any) -> Any:  # noqa: ANN401 - whatever it takes and returns
        before()
        try:
            return real(*arguments)
        finally:
            after()

    return step


def test_the_mount_of_a_view_is_never_writable(populated: Snapshotter, places: Path) -> None:
    here = make_target(places)
    seen: list[bool] = []

    def look() -> None:
        seen.extend(entry.read_only for entry in Table.read() if entry.target == str(here))

    with call_around_steps(look, look):
        populated.mounter.mount("look", str(here))
        populated.mounter.unmount(str(here))
    assert set(seen) == {True}
    assert mounted_on(here) is None
    assert sorted(read_files(populated.mounts("look"))) == ["file", "other"]


def relative_path(places: Path, _: Snapshotter) -> str:
    return os.path.relpath(make_target(places))


def symlink(places: Path, _: Snapshotter) -> str:
    (places / "link").symlink_to(make_target(places))
    return str(places / "link")


def over_a_symlink(places: Path, _: Snapshotter) -> str:
    make_target(make_target(places))
    (places / "link").symlink_to(places / "here")
    return str(places / "link" / "here")


def magic_link(places: Path, _: Snapshotter) -> str:
    return f"/proc/{os.getpid()}/cwd"


def regular_file(places: Path, _: Snapshotter) -> str:
    (places / "file").touch()
    return str(places / "file")


def missing_directory(places: Path, _: Snapshotter) -> str:
    return str(places / "none")


def too_long_path(places: Path, _: Snapshotter) -> str:
    return "/" + "x/" * 3000


def state_directory(_: Path, engine: Snapshotter) -> str:
    return str(engine.state_directory)


def inside_the_state(_: Path, engine: Snapshotter) -> str:
    return engine.mounts("lone").source


def above_the_state(places: Path, _: Snapshotter) -> str:
    return str(places.parent)


def root_directory(_: Path, __: Snapshotter) -> str:
    return "/"


@pytest.mark.parametrize(
    "target",
    [
        relative_path,
        symlink,
        over_a_symlink,
        magic_link,
        regular_file,
        missing_directory,
        too_long_path,
        state_directory,
        inside_the_state,
        above_the_state,
        root_directory,
    ],
)
def test_mount_on_a_bad_target_raises_invalid_argument(
    populated: Snapshotter, places: Path, target: Callable[[Path, Snapshotter], str]
) -> None:
    before = mounts_below(places.parent)
    path = target(places, populated)
    with pytest.raises(InvalidArgument) as caught:
        populated.mounter.mount("look", path)
    assert ": " in caught.value.message
    assert mounts_below(places.parent) == before
    assert populated.mounter.list_mounts() == []


def test_mount_returns_the_canonical_path_of_its_target(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places, "with space\nand\\more")
    there = make_target(places, "there")
    assert populated.mounter.mount("look", f"{there}/../{here.name}//") == str(here)
    assert mount_targets(populated) == [str(here)]
    populated.mounter.unmount(f"{there}/../{here.name}/")
    assert mounted_on(here) is None


def test_a_second_mount_on_a_target_raises_already_exists(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)
    populated.mounter.mount("look", str(here))
    with pytest.raises(AlreadyExists, match=f'"{here}" already'):
        populated.mounter.mount("work", str(here))
    assert mount_targets(populated) == [str(here)]
    # After an unmount by hand, the target can be used again.
    subprocess.run(["umount", str(here)], check=True)
    populated.mounter.mount("work", str(here))
    assert [mounted.key for mounted in populated.mounter.list_mounts()] == ["work"]


def test_mount_of_a_committed_or_unknown_key_is_refused(
    populated: Snapshotter, places: Path
) -> None:
    here = str(make_target(places))
    with pytest.raises(FailedPrecondition, match='"base" is committed'):
        populated.mounter.mount("base", here)
    with pytest.raises(NotFound, match='"none"'):
        populated.mounter.mount("none", here)
    with pytest.raises(NotFound, match='"none"'):
        populated.mounter.list_mounts("none")
    with pytest.raises(InvalidArgument, match="key is empty"):
        populated.mounter.mount("", here)
    assert mounts_below(places) == []


def test_unmount_of_a_foreign_mount_raises_not_found(populated: Snapshotter, places: Path) -> None:
    here, there = make_target(places), make_target(places, "there")
    with mount_by_hand("--bind", populated.mounts("work").source, here):
        for path in (here, there, places / "none"):
            with pytest.raises(NotFound, match="no snapshot is mounted"):
                populated.mounter.unmount(str(path))
        with pytest.raises(InvalidArgument, match="relative"):
            populated.mounter.unmount("here")
        assert mounted_on(here)


def test_unmount_of_a_covered_mount_raises_failed_precondition(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)
    populated.mounter.mount("look", str(here))
    with mount_tmpfs(here):
        for lazy in (False, True):
            with pytest.raises(FailedPrecondition, match=f'"{here}" is mounted over it'):
                populated.mounter.unmount(str(here), lazy)
        assert len([entry for entry in Table.read() if entry.target == str(here)]) == 2
    populated.mounter.unmount(str(here))


def test_unmount_and_commit_name_the_mount_that_covers_a_parent_of_the_target(
    populated: Snapshotter, places: Path
) -> None:
    above = places / "above"
    above.mkdir()
    here = make_target(above)
    populated.mounter.mount("work", str(here))
    with mount_tmpfs(above):
        for call in (
            lambda: populated.mounter.unmount(str(here)),
            lambda: populated.mounter.unmount(str(here), lazy=True),
            lambda: populated.commit("done", "work"),
        ):
            with pytest.raises(FailedPrecondition, match=f'"{above}" is mounted over it'):
                call()
    populated.mounter.unmount(str(here))


@pytest.mark.parametrize("how", ["cwd", "open", "mapped"])
def test_unmount_of_a_busy_mount_names_the_process_that_uses_it(
    populated: Snapshotter, places: Path, how: str
) -> None:
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    (here / "big").write_bytes(bytes(8192))
    program = {
        "cwd": "import os; os.chdir(path)",
        "open": "file = open(path + '/file')",
        "mapped": "import mmap; f = open(path + '/big'); m = mmap.mmap(f.fileno(), 0, access=1);"
        " f.close(); import os; [os.close(n) for n in range(3, 20) if os.path.exists("
        "f'/proc/self/fd/{n}') and os.readlink(f'/proc/self/fd/{n}').startswith(path)]",
    }[how]
    command = ["python3", "-c", f"path = {str(here)!r}; {program}; print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        with pytest.raises(FailedPrecondition, match=rf"python3 \(pid {process.pid}\)"):
            populated.mounter.unmount(str(here))
        assert mount_targets(populated) == [str(here)]
        populated.mounter.unmount(str(here), lazy=True)
        assert mounted_on(here) is None
        process.communicate(b"\n")
    assert populated.mounter.list_mounts() == []


@pytest.mark.parametrize("linked", [False, True], ids=["becomes a link", "was a link"])
def test_mount_never_follows_a_target_that_becomes_a_symlink(
    populated: Snapshotter, places: Path, linked: bool
) -> None:
    """Each round replaces the target before another step of Mount or Unmount."""
    here, elsewhere = places / "here", make_target(places, "elsewhere")
    aside = places / "aside"
    left = 0

    def swap() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            swap_directory_and_link(here, aside, elsewhere)

    def look() -> None:
        assert mounted_on(elsewhere) is None

    outcomes: set[type] = set()
    for step in count(1):
        here.mkdir()
        if linked:
            swap_directory_and_link(here, aside, elsewhere)
        left = step
        with call_around_steps(swap, look):
            try:
                populated.mounter.mount("look", str(here))
            except SnapdError as error:
                outcomes.add(type(error))
            else:
                outcomes.add(Mounted)
            for target in mount_targets(populated):
                assert target in (str(here), str(aside))
                with suppress(FailedPrecondition):
                    populated.mounter.unmount(target)
        for target in mount_targets(populated):
            populated.mounter.unmount(target)
        for path in (here, aside):
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                path.rmdir()
        if left > 0:
            break
    assert outcomes == {InvalidArgument, Mounted}
    assert mounts_below(places) == []


def swap_directory_and_link(here: Path, aside: Path, elsewhere: Path) -> None:
    """Replace the directory ``here`` by a link to ``elsewhere``, or the link by the directory."""
    # A mount point cannot be renamed.
    with suppress(OSError):
        if here.is_symlink():
            here.unlink()
            aside.rename(here)
        else:
            here.rename(aside)
            here.symlink_to(elsewhere)


@pytest.mark.long
def test_a_view_can_be_mounted_500_times(populated: Snapshotter, places: Path) -> None:
    made = [str(make_target(places, str(number))) for number in range(500)]
    for target in made:
        populated.mounter.mount("look", target)
    assert (
        mount_targets(populated) == mount_targets(populated, "look") == mounts_below(places) == made
    )
    assert populated.mounter.list_mounts("work") == []
    for target in made:
        populated.mounter.unmount(target)
    assert mount_targets(populated) == mounts_below(places) == []


def test_sixty_four_concurrent_mounts_and_unmounts_succeed(
    populated: Snapshotter, places: Path
) -> None:
    made = [str(make_target(places, str(number))) for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda target: populated.mounter.mount("work", target), made)) == made
        assert sorted(mount_targets(populated)) == sorted(mounts_below(places)) == sorted(made)

        def again(target: str) -> None:
            populated.mounter.unmount(target)
            populated.mounter.mount("look", target)
            populated.mounter.unmount(target)

        list(pool.map(again, made))
    assert mount_targets(populated) == mounts_below(places) == []


def test_two_unmounts_may_have_records_with_the_same_id(
    populated: Snapshotter, places: Path
) -> None:
    """The first has deleted its record, and has not ended, when a new mount gets its id."""
    reconciler = populated.mounter._reconciler
    for name in ("first", "second"):
        populated.mounter.mount("work", str(make_target(places, name)))
    table = Table.read()
    first, second = populated._store.ledger.lines()
    entries = [reconciler.entry(line, table) for line in (first, second)]
    assert entries[0] is not None
    assert entries[1] is not None
    with (
        reconciler.turn(entries[0], leaving=first),
        reconciler.turn(entries[1], leaving=replace(second, id=first.id)),
    ):
        pass
    for name in ("first", "second"):
        populated.mounter.unmount(str(places / name))


def test_only_one_of_sixteen_concurrent_mounts_gets_a_target(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)

    def mount(_: int) -> bool:
        try:
            populated.mounter.mount("look", str(here))
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(mount, range(16))) == 1
    assert mounts_below(places) == [str(here)]


def test_a_failed_mount_leaves_no_record_and_no_directory(
    populated: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "move_mount")

    with monkeypatch.context() as patch:
        patch.setattr(linux, "move_mount", too_many)
        with pytest.raises(SnapdError, match=r"fs\.mount-max"):
            populated.mounter.mount("look", str(make_target(places)))
        with pytest.raises(SnapdError, match=r"fs\.mount-max"):
            populated.mounter.mount("look")
    assert populated.mounter.list_mounts() == []
    assert populated._store.ledger.lines() == []
    assert mounts_below(places.parent) == []
    assert list((places.parent / "run" / "mounts").iterdir()) == []


def test_a_snapshotter_does_not_unmount_the_mounts_of_another(places: Path, scratch: Path) -> None:
    with (
        closing(Snapshotter(scratch / "a", ignore_change, runtime=scratch / "run-a")) as one,
        closing(Snapshotter(scratch / "b", ignore_change, runtime=scratch / "run-b")) as other,
    ):
        for engine in (one, other):
            populate(engine)
            engine.mounter.mount("look", str(make_target(places, engine.state_directory.name)))
        assert mount_targets(one) == [str(places / "a")]
        with pytest.raises(NotFound):
            one.mounter.unmount(str(places / "b"))
        other.mounter.unmount(str(places / "b"))


def test_commit_is_refused_while_a_lazily_unmounted_file_is_open_for_writing(
    populated: Snapshotter, places: Path
) -> None:
    here, there = make_target(places), make_target(places, "there")
    for target in (here, there):
        populated.mounter.mount("work", str(target))
    directory = os.open(there, os.O_RDONLY)
    try:
        populated.mounter.unmount(str(there), lazy=True)
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("new", dir_fd=directory)
    finally:
        os.close(directory)
    with (here / "file").open("w") as file:
        populated.mounter.unmount(str(here), lazy=True)
        assert mounts_below(places) == []
        with pytest.raises(
            FailedPrecondition, match=rf"\(pid {os.getpid()}\) has a file in it open"
        ):
            populated.commit("v2", "work")
        file.write("the last word")
        populated.mounter.unmount(populated.mounter.mount("work"))
    populated.commit("v2", "work")
    assert (Path(populated.view("new", "v2").source) / "file").read_text() == "the last word"


def test_mount_and_unmount_ignore_extra_slashes_in_a_target(
    populated: Snapshotter, places: Path
) -> None:
    here = make_target(places)
    populated.mounter.mount("look", f"//{here}//")
    populated.mounter.unmount(f"//{here}/.")
    assert mounts_below(places) == []


def test_unmount_waits_while_another_call_has_the_mount_open(
    populated: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wait, Unmount would find that the service itself uses the mount."""
    here = make_target(places)
    populated.mounter.mount("work", str(here))
    subprocess.run(["mount", "--make-shared", str(here)], check=True)
    opened, go_on = threading.Event(), threading.Event()

    def restore(entry: Entry, *, read_only: bool) -> None:
        fd = os.open(entry.target, os.O_PATH)
        opened.set()
        assert go_on.wait(WAIT_TIMEOUT)
        os.close(fd)

    monkeypatch.setattr(mounts, "restore", restore)
    with ThreadPoolExecutor() as pool:
        repairing = pool.submit(populated.mounter.repair)
        try:
            assert opened.wait(WAIT_TIMEOUT)
            unmounting = pool.submit(populated.mounter.unmount, str(here))
            # A refusal would come in less than this time.
            assert not wait([unmounting], timeout=0.5).done
        finally:
            go_on.set()
        repairing.result(WAIT_TIMEOUT)
        unmounting.result(WAIT_TIMEOUT)
    assert mounted_on(here) is None


def test_check_and_repair_ignore_a_mount_that_is_being_unmounted(
    populated: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmount detaches the mount before it deletes the record; a Mount can run between the two."""
    here, there = make_target(places), make_target(places, "there")
    populated.prepare("other")
    populated.mounter.mount("work", str(here))
    detached, go_on = threading.Event(), threading.Event()
    detach = mounts.detach

    def wait_after(entry: Entry, *, lazy: bool) -> None:
        detach(entry, lazy=lazy)
        detached.set()
        assert go_on.wait(WAIT_TIMEOUT)

    monkeypatch.setattr(mounts, "detach", wait_after)
    with ThreadPoolExecutor() as pool:
        unmounting = pool.submit(populated.mounter.unmount, str(here))
        try:
            assert detached.wait(WAIT_TIMEOUT)
            assert populated.upkeep.check() == []
            populated.mounter.mount("other", str(there))
            assert populated.upkeep.check() == []
            populated.mounter.repair()
            assert mounted_on(here) is None
        finally:
            go_on.set()
        unmounting.result(WAIT_TIMEOUT)
    assert [mounted.key for mounted in populated.mounter.list_mounts()] == ["other"]
