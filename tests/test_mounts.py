"""Mount, Unmount, ListMounts: what is mounted where, and how."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from snapd_native import linux
from snapd_native.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapdError,
)
from snapd_native.model import Lifetime, Mounted
from snapd_native.mounts import Table
from snapd_native.snapshotter import Snapshotter
from tests.engines import fill, ignore
from tests.mounting import below, by_hand, mounted_on, place, propagation, targets, tmpfs

pytestmark = pytest.mark.usefixtures("places")


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


def test_without_a_target_a_directory_is_made(full: Snapshotter, scratch: Path) -> None:
    target = full.mounter.mount("look")
    assert Path(target).parent == scratch / "run" / "mounts"
    assert Path(target).parent.stat().st_mode & 0o777 == 0o700
    assert (Path(target) / "file").read_text() == "base"
    with pytest.raises(AlreadyExists, match="unmount it first"):
        full.mounter.mount("look")
    full.mounter.unmount(target)
    assert not Path(target).exists()


def test_what_is_mounted_in_a_snapshot_comes_along(full: Snapshotter, places: Path) -> None:
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


def test_what_is_mounted_in_a_snapshot_is_not_copied(full: Snapshotter, places: Path) -> None:
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
    """What is mounted is told to the peers of where it is, and nothing in it to anybody."""
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


def test_a_view_is_never_seen_writable(full: Snapshotter, places: Path) -> None:
    here = place(places)
    inside = Path(full.mounts("look").source)
    with ThreadPoolExecutor(1) as pool:
        ended, seen = threading.Event(), threading.Event()

        def watch() -> None:
            while not ended.is_set():
                for entry in Table.read():
                    if entry.target == str(here):
                        seen.set()
                        assert entry.read_only

        watching = pool.submit(watch)
        try:
            rounds = 0
            while rounds < 200 or not (seen.is_set() or watching.done()):
                full.mounter.mount("look", str(here))
                full.mounter.unmount(str(here))
                rounds += 1
        finally:
            ended.set()
        watching.result()
    assert sorted(path.name for path in inside.iterdir()) == ["file", "other"]


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
def test_a_target_that_cannot_be(
    full: Snapshotter, places: Path, target: Callable[[Path, Snapshotter], str]
) -> None:
    before = below(places.parent)
    path = target(places, full)
    with pytest.raises(InvalidArgument) as caught:
        full.mounter.mount("look", path)
    assert ": " in caught.value.message
    assert below(places.parent) == before
    assert full.mounter.list_mounts() == []


def test_a_target_is_named_as_the_kernel_writes_it(full: Snapshotter, places: Path) -> None:
    here = place(places, "with space\nand\\more")
    there = place(places, "there")
    assert full.mounter.mount("look", f"{there}/../{here.name}//") == str(here)
    assert targets(full) == [str(here)]
    full.mounter.unmount(f"{there}/../{here.name}/")
    assert mounted_on(here) is None


def test_a_target_is_taken_once(full: Snapshotter, places: Path) -> None:
    here = place(places)
    full.mounter.mount("look", str(here))
    with pytest.raises(AlreadyExists, match=f'"{here}" already'):
        full.mounter.mount("work", str(here))
    assert targets(full) == [str(here)]
    # Where it was unmounted by hand, it may be mounted again.
    subprocess.run(["umount", str(here)], check=True)
    full.mounter.mount("work", str(here))
    assert [mounted.key for mounted in full.mounter.list_mounts()] == ["work"]


def test_what_has_no_mount_is_not_mounted(full: Snapshotter, places: Path) -> None:
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


def test_only_what_the_service_mounted_is_unmounted(full: Snapshotter, places: Path) -> None:
    here, there = place(places), place(places, "there")
    with by_hand("--bind", full.mounts("work").source, here):
        for path in (here, there, places / "none"):
            with pytest.raises(NotFound, match="no snapshot is mounted"):
                full.mounter.unmount(str(path))
        with pytest.raises(InvalidArgument, match="relative"):
            full.mounter.unmount("here")
        assert mounted_on(here)


def test_what_covers_a_mount_is_not_unmounted(full: Snapshotter, places: Path) -> None:
    here = place(places)
    full.mounter.mount("look", str(here))
    with tmpfs(here):
        for lazy in (False, True):
            with pytest.raises(FailedPrecondition, match="something else is mounted over it"):
                full.mounter.unmount(str(here), lazy)
        assert len([entry for entry in Table.read() if entry.target == str(here)]) == 2
    full.mounter.unmount(str(here))


@pytest.mark.parametrize("how", ["cwd", "open", "mapped"])
def test_who_uses_a_mount_is_named(full: Snapshotter, places: Path, how: str) -> None:
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


def test_a_target_that_is_swapped_changes_nothing(full: Snapshotter, places: Path) -> None:
    """The directory becomes a link while it is mounted on; what is mounted is never elsewhere."""
    here, elsewhere = places / "here", place(places, "elsewhere")
    aside = places / "aside"
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            # What is mounted on cannot be renamed, and what is a link cannot be mounted on.
            with suppress(OSError):
                here.rename(aside)
            with suppress(OSError):
                here.symlink_to(elsewhere)
            with suppress(OSError):
                here.unlink()
            with suppress(OSError):
                aside.rename(here)

    here.mkdir()
    outcomes: set[type] = set()
    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        try:
            # On a machine with much to do the directory may be a link at every one of a thousand.
            for number in range(100_000):
                if number >= 1000 and Mounted in outcomes:
                    break
                try:
                    full.mounter.mount("look", str(here))
                except SnapdError as error:
                    outcomes.add(type(error))
                else:
                    outcomes.add(Mounted)
                assert mounted_on(elsewhere) is None
                # It may still be moved, by a renaming that had begun before it was mounted.
                while found := targets(full):
                    for target in found:
                        assert target in (str(here), str(aside))
                        with suppress(NotFound, FailedPrecondition):
                            full.mounter.unmount(target)
        finally:
            ended.set()
        swapping.result()
    assert outcomes <= {InvalidArgument, Mounted}
    assert Mounted in outcomes
    assert below(places) == []


def test_many_mounts_of_one_view(full: Snapshotter, places: Path) -> None:
    made = [str(place(places, str(number))) for number in range(500)]
    for target in made:
        full.mounter.mount("look", target)
    assert targets(full) == targets(full, "look") == below(places) == made
    assert full.mounter.list_mounts("work") == []
    for target in made:
        full.mounter.unmount(target)
    assert targets(full) == below(places) == []


def test_many_at_once(full: Snapshotter, places: Path) -> None:
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


def test_one_target_at_once_is_taken_once(full: Snapshotter, places: Path) -> None:
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


def test_a_mount_fails_without_a_trace(
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


def test_two_engines_keep_to_their_own(places: Path, scratch: Path) -> None:
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


def test_what_is_unmounted_lazily_is_not_written_to_after_commit(
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
        with pytest.raises(FailedPrecondition, match=rf"\(pid {os.getpid()}\) can still write"):
            full.commit("v2", "work")
        file.write("the last word")
        full.mounter.unmount(full.mounter.mount("work"))
    full.commit("v2", "work")
    assert (Path(full.view("new", "v2").source) / "file").read_text() == "the last word"


def test_slashes_do_not_count(full: Snapshotter, places: Path) -> None:
    here = place(places)
    full.mounter.mount("look", f"//{here}//")
    full.mounter.unmount(f"//{here}/.")
    assert below(places) == []
