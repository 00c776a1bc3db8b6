"""Mount, Unmount and ListMounts: targets, flags, propagation and concurrent calls."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
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
from tests.support.engine import fill, ignore, read
from tests.support.file_systems import long_on_xfs
from tests.support.kernel_mounts import (
    below,
    by_hand,
    mounted_on,
    place,
    propagation,
    targets,
    tmpfs,
)
from tests.support.waiting import WAIT

pytestmark = [long_on_xfs, pytest.mark.usefixtures("places")]


def refused_to_write(path: Path) -> bool:
    try:
        (path / "new").write_text("text")
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def test_an_active_snapshot_is_mounted_writable(full: Snapshotter, places: Path) -> None:
    here = place(places)
    assert full.mounter.mount("work", str(here)) == str(here)
    assert (here / "file").read_text() == "base"
    (here / "new").write_text("text")
    assert (Path(full.mounts("work").source) / "new").read_text() == "text"
    assert full.mounter.list_mounts() == [Mounted(str(here), "work", False, Lifetime.PERSISTENT, 0)]
    assert propagation(here) == []
    full.mounter.unmount(str(here))
    assert mounted_on(here) is None
    assert list(here.iterdir()) == []
    assert full.mounter.list_mounts() == []


def test_a_view_is_mounted_read_only(full: Snapshotter, places: Path) -> None:
    here = place(places)
    full.mounter.mount("look", str(here))
    assert (here / "file").read_text() == "base"
    assert refused_to_write(here)
    assert full.mounter.list_mounts("look") == [
        Mounted(str(here), "look", True, Lifetime.PERSISTENT, 0)
    ]
    with pytest.raises(InvalidArgument, match='"look" is a view'):
        full.mounter.mount("look", str(place(places, "there")), read_only=False)


def test_an_active_snapshot_may_be_mounted_read_only(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    full.mounter.mount("work", str(here), read_only=True)
    full.mounter.mount("work", str(there))
    assert refused_to_write(here)
    assert not refused_to_write(there)
    assert (here / "new").read_text() == "text"
    assert [mounted.read_only for mounted in full.mounter.list_mounts("work")] == [True, False]


def test_mount_without_a_target_makes_a_directory_for_the_mount(
    full: Snapshotter, scratch: Path
) -> None:
    target = full.mounter.mount("look")
    assert Path(target).parent == scratch / "run" / "mounts"
    assert Path(target).parent.stat().st_mode & 0o777 == 0o700
    assert (Path(target) / "file").read_text() == "base"
    with pytest.raises(AlreadyExists, match="unmount it first"):
        full.mounter.mount("look")
    full.mounter.unmount(target)
    assert not Path(target).exists()


def test_mount_includes_the_mounts_inside_the_snapshot(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    inside = Path(full.mounts("work").source) / "inside"
    inside.mkdir()
    with tmpfs(inside):
        (inside / "deep").mkdir()
        with tmpfs(inside / "deep"):
            full.mounter.mount("work", str(here))
            full.mounter.mount("work", str(there), read_only=True)
            for path in ("inside", "inside/deep"):
                assert not refused_to_write(here / path)
                assert refused_to_write(there / path)
                assert propagation(here / path) == propagation(there / path) == []
            assert (inside / "new").exists()
            for target in targets(full):
                with pytest.raises(FailedPrecondition, match=f'unmount "{target}/inside" first'):
                    full.mounter.unmount(target)
                full.mounter.unmount(target, lazy=True)
    assert below(places) == []


def test_commit_and_prepare_do_not_copy_mounts_inside_the_snapshot(
    full: Snapshotter, places: Path
) -> None:
    before = full.usage("work")
    inside = Path(full.mounts("work").source) / "inside"
    inside.mkdir()
    with tmpfs(inside):
        (inside / "file").write_text("elsewhere")
        assert full.usage("work").inodes == before.inodes + 1
        full.commit("v2", "work")
    copy = Path(full.prepare("copy", "v2").source)
    assert list((copy / "inside").iterdir()) == []
    assert full.usage("v2").inodes == before.inodes + 1


def test_mounts_are_private_on_a_shared_mount(full: Snapshotter, places: Path) -> None:
    """The mount propagates to the peers of its parent mount; mounts inside it do not propagate."""
    first, second = place(places, "first"), place(places, "second")
    with by_hand("--bind", first, first):
        subprocess.run(["mount", "--make-shared", str(first)], check=True)
        with by_hand("--bind", first, second):
            here = place(first)
            full.mounter.mount("look", str(here))
            assert propagation(here) == []
            assert refused_to_write(here)
            assert refused_to_write(second / "here")
            full.mounter.unmount(str(here))
            assert mounted_on(second / "here") is None


STEPS = ("openat2", "open_tree", "mount_id", "mount_setattr", "move_mount", "umount2")
"""All system calls by which the service mounts and unmounts."""


@contextmanager
def stepping(before: Callable[[], object], after: Callable[[], object]) -> Iterator[None]:
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


def test_the_mount_of_a_view_is_never_writable(full: Snapshotter, places: Path) -> None:
    here = place(places)
    seen: list[bool] = []

    def look() -> None:
        seen.extend(entry.read_only for entry in Table.read() if entry.target == str(here))

    with stepping(look, look):
        full.mounter.mount("look", str(here))
        full.mounter.unmount(str(here))
    assert set(seen) == {True}
    assert mounted_on(here) is None
    assert sorted(read(full.mounts("look"))) == ["file", "other"]


def relative(places: Path, _: Snapshotter) -> str:
    return os.path.relpath(place(places))


def symlink(places: Path, _: Snapshotter) -> str:
    (places / "link").symlink_to(place(places))
    return str(places / "link")


def over_a_symlink(places: Path, _: Snapshotter) -> str:
    place(place(places))
    (places / "link").symlink_to(places / "here")
    return str(places / "link" / "here")


def magic_link(places: Path, _: Snapshotter) -> str:
    return f"/proc/{os.getpid()}/cwd"


def file(places: Path, _: Snapshotter) -> str:
    (places / "file").touch()
    return str(places / "file")


def missing(places: Path, _: Snapshotter) -> str:
    return str(places / "none")


def too_long(places: Path, _: Snapshotter) -> str:
    return "/" + "x/" * 3000


def state_directory(_: Path, engine: Snapshotter) -> str:
    return str(engine.state_directory)


def inside_the_state(_: Path, engine: Snapshotter) -> str:
    return engine.mounts("lone").source


def above_the_state(places: Path, _: Snapshotter) -> str:
    return str(places.parent)


def root(_: Path, __: Snapshotter) -> str:
    return "/"


@pytest.mark.parametrize(
    "target",
    [
        relative,
        symlink,
        over_a_symlink,
        magic_link,
        file,
        missing,
        too_long,
        state_directory,
        inside_the_state,
        above_the_state,
        root,
    ],
)
def test_mount_on_a_bad_target_raises_invalid_argument(
    full: Snapshotter, places: Path, target: Callable[[Path, Snapshotter], str]
) -> None:
    before = below(places.parent)
    path = target(places, full)
    with pytest.raises(InvalidArgument) as caught:
        full.mounter.mount("look", path)
    assert ": " in caught.value.message
    assert below(places.parent) == before
    assert full.mounter.list_mounts() == []


def test_mount_returns_the_canonical_path_of_its_target(full: Snapshotter, places: Path) -> None:
    here = place(places, "with space\nand\\more")
    there = place(places, "there")
    assert full.mounter.mount("look", f"{there}/../{here.name}//") == str(here)
    assert targets(full) == [str(here)]
    full.mounter.unmount(f"{there}/../{here.name}/")
    assert mounted_on(here) is None


def test_a_second_mount_on_a_target_raises_already_exists(full: Snapshotter, places: Path) -> None:
    here = place(places)
    full.mounter.mount("look", str(here))
    with pytest.raises(AlreadyExists, match=f'"{here}" already'):
        full.mounter.mount("work", str(here))
    assert targets(full) == [str(here)]
    # After an unmount by hand, the target can be used again.
    subprocess.run(["umount", str(here)], check=True)
    full.mounter.mount("work", str(here))
    assert [mounted.key for mounted in full.mounter.list_mounts()] == ["work"]


def test_mount_of_a_committed_or_unknown_key_is_refused(full: Snapshotter, places: Path) -> None:
    here = str(place(places))
    with pytest.raises(FailedPrecondition, match='"base" is committed'):
        full.mounter.mount("base", here)
    with pytest.raises(NotFound, match='"none"'):
        full.mounter.mount("none", here)
    with pytest.raises(NotFound, match='"none"'):
        full.mounter.list_mounts("none")
    with pytest.raises(InvalidArgument, match="key is empty"):
        full.mounter.mount("", here)
    assert below(places) == []


def test_unmount_of_a_foreign_mount_raises_not_found(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    with by_hand("--bind", full.mounts("work").source, here):
        for path in (here, there, places / "none"):
            with pytest.raises(NotFound, match="no snapshot is mounted"):
                full.mounter.unmount(str(path))
        with pytest.raises(InvalidArgument, match="relative"):
            full.mounter.unmount("here")
        assert mounted_on(here)


def test_unmount_of_a_covered_mount_raises_failed_precondition(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    full.mounter.mount("look", str(here))
    with tmpfs(here):
        for lazy in (False, True):
            with pytest.raises(FailedPrecondition, match=f'"{here}" is mounted over it'):
                full.mounter.unmount(str(here), lazy)
        assert len([entry for entry in Table.read() if entry.target == str(here)]) == 2
    full.mounter.unmount(str(here))


def test_unmount_and_commit_name_the_mount_that_covers_a_parent_of_the_target(
    full: Snapshotter, places: Path
) -> None:
    above = places / "above"
    above.mkdir()
    here = place(above)
    full.mounter.mount("work", str(here))
    with tmpfs(above):
        for call in (
            lambda: full.mounter.unmount(str(here)),
            lambda: full.mounter.unmount(str(here), lazy=True),
            lambda: full.commit("done", "work"),
        ):
            with pytest.raises(FailedPrecondition, match=f'"{above}" is mounted over it'):
                call()
    full.mounter.unmount(str(here))


@pytest.mark.parametrize("how", ["cwd", "open", "mapped"])
def test_unmount_of_a_busy_mount_names_the_process_that_uses_it(
    full: Snapshotter, places: Path, how: str
) -> None:
    here = place(places)
    full.mounter.mount("work", str(here))
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
            full.mounter.unmount(str(here))
        assert targets(full) == [str(here)]
        full.mounter.unmount(str(here), lazy=True)
        assert mounted_on(here) is None
        process.communicate(b"\n")
    assert full.mounter.list_mounts() == []


@pytest.mark.parametrize("linked", [False, True], ids=["becomes a link", "was a link"])
def test_mount_never_follows_a_target_that_becomes_a_symlink(
    full: Snapshotter, places: Path, linked: bool
) -> None:
    """Each round replaces the target before another step of Mount or Unmount."""
    here, elsewhere = places / "here", place(places, "elsewhere")
    aside = places / "aside"
    left = 0

    def swap() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            toggle(here, aside, elsewhere)

    def look() -> None:
        assert mounted_on(elsewhere) is None

    outcomes: set[type] = set()
    for step in count(1):
        here.mkdir()
        if linked:
            toggle(here, aside, elsewhere)
        left = step
        with stepping(swap, look):
            try:
                full.mounter.mount("look", str(here))
            except SnapdError as error:
                outcomes.add(type(error))
            else:
                outcomes.add(Mounted)
            for target in targets(full):
                assert target in (str(here), str(aside))
                with suppress(FailedPrecondition):
                    full.mounter.unmount(target)
        for target in targets(full):
            full.mounter.unmount(target)
        for path in (here, aside):
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                path.rmdir()
        if left > 0:
            break
    assert outcomes == {InvalidArgument, Mounted}
    assert below(places) == []


def toggle(here: Path, aside: Path, elsewhere: Path) -> None:
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
def test_a_view_can_be_mounted_500_times(full: Snapshotter, places: Path) -> None:
    made = [str(place(places, str(number))) for number in range(500)]
    for target in made:
        full.mounter.mount("look", target)
    assert targets(full) == targets(full, "look") == below(places) == made
    assert full.mounter.list_mounts("work") == []
    for target in made:
        full.mounter.unmount(target)
    assert targets(full) == below(places) == []


def test_sixty_four_concurrent_mounts_and_unmounts_succeed(full: Snapshotter, places: Path) -> None:
    made = [str(place(places, str(number))) for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda target: full.mounter.mount("work", target), made)) == made
        assert sorted(targets(full)) == sorted(below(places)) == sorted(made)

        def again(target: str) -> None:
            full.mounter.unmount(target)
            full.mounter.mount("look", target)
            full.mounter.unmount(target)

        list(pool.map(again, made))
    assert targets(full) == below(places) == []


def test_only_one_of_sixteen_concurrent_mounts_gets_a_target(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)

    def mount(_: int) -> bool:
        try:
            full.mounter.mount("look", str(here))
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(mount, range(16))) == 1
    assert below(places) == [str(here)]


def test_a_failed_mount_leaves_no_record_and_no_directory(
    full: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "move_mount")

    with monkeypatch.context() as patch:
        patch.setattr(linux, "move_mount", too_many)
        with pytest.raises(SnapdError, match=r"fs\.mount-max"):
            full.mounter.mount("look", str(place(places)))
        with pytest.raises(SnapdError, match=r"fs\.mount-max"):
            full.mounter.mount("look")
    assert full.mounter.list_mounts() == []
    assert full._store.ledger.lines() == []
    assert below(places.parent) == []
    assert list((places.parent / "run" / "mounts").iterdir()) == []


def test_a_snapshotter_does_not_unmount_the_mounts_of_another(places: Path, scratch: Path) -> None:
    with (
        closing(Snapshotter(scratch / "a", ignore, runtime=scratch / "run-a")) as one,
        closing(Snapshotter(scratch / "b", ignore, runtime=scratch / "run-b")) as other,
    ):
        for engine in (one, other):
            fill(engine)
            engine.mounter.mount("look", str(place(places, engine.state_directory.name)))
        assert targets(one) == [str(places / "a")]
        with pytest.raises(NotFound):
            one.mounter.unmount(str(places / "b"))
        other.mounter.unmount(str(places / "b"))


def test_commit_is_refused_while_a_lazily_unmounted_file_is_open_for_writing(
    full: Snapshotter, places: Path
) -> None:
    here, there = place(places), place(places, "there")
    for target in (here, there):
        full.mounter.mount("work", str(target))
    directory = os.open(there, os.O_RDONLY)
    try:
        full.mounter.unmount(str(there), lazy=True)
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("new", dir_fd=directory)
    finally:
        os.close(directory)
    with (here / "file").open("w") as file:
        full.mounter.unmount(str(here), lazy=True)
        assert below(places) == []
        with pytest.raises(FailedPrecondition, match=rf"\(pid {os.getpid()}\).* can still write"):
            full.commit("v2", "work")
        file.write("the last word")
        full.mounter.unmount(full.mounter.mount("work"))
    full.commit("v2", "work")
    assert (Path(full.view("new", "v2").source) / "file").read_text() == "the last word"


def test_mount_and_unmount_ignore_extra_slashes_in_a_target(
    full: Snapshotter, places: Path
) -> None:
    here = place(places)
    full.mounter.mount("look", f"//{here}//")
    full.mounter.unmount(f"//{here}/.")
    assert below(places) == []


def test_unmount_waits_while_another_call_has_the_mount_open(
    full: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wait, Unmount would find that the service itself uses the mount."""
    here = place(places)
    full.mounter.mount("work", str(here))
    subprocess.run(["mount", "--make-shared", str(here)], check=True)
    opened, go_on = threading.Event(), threading.Event()

    def restore(entry: Entry, *, read_only: bool) -> None:
        fd = os.open(entry.target, os.O_PATH)
        opened.set()
        assert go_on.wait(WAIT)
        os.close(fd)

    monkeypatch.setattr(mounts, "restore", restore)
    with ThreadPoolExecutor() as pool:
        repairing = pool.submit(full.mounter.repair)
        try:
            assert opened.wait(WAIT)
            unmounting = pool.submit(full.mounter.unmount, str(here))
            # A refusal would come in less than this time.
            assert not wait([unmounting], timeout=0.5).done
        finally:
            go_on.set()
        repairing.result(WAIT)
        unmounting.result(WAIT)
    assert mounted_on(here) is None


def test_check_and_repair_ignore_a_mount_that_is_being_unmounted(
    full: Snapshotter, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmount detaches the mount before it deletes the record; a Mount can run between the two."""
    here, there = place(places), place(places, "there")
    full.prepare("other")
    full.mounter.mount("work", str(here))
    detached, go_on = threading.Event(), threading.Event()
    detach = mounts.detach

    def wait_after(entry: Entry, *, lazy: bool) -> None:
        detach(entry, lazy=lazy)
        detached.set()
        assert go_on.wait(WAIT)

    monkeypatch.setattr(mounts, "detach", wait_after)
    with ThreadPoolExecutor() as pool:
        unmounting = pool.submit(full.mounter.unmount, str(here))
        try:
            assert detached.wait(WAIT)
            assert full.upkeep.check() == []
            full.mounter.mount("other", str(there))
            assert full.upkeep.check() == []
            full.mounter.repair()
            assert mounted_on(here) is None
        finally:
            go_on.set()
        unmounting.result(WAIT)
    assert [mounted.key for mounted in full.mounter.list_mounts()] == ["other"]
