"""Measuring and deleting trees, and opening a tree as a detached mount."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native import trees
from tests.support import torture_tree
from tests.support.commands import run_command
from tests.support.file_systems import long_on_xfs
from tests.support.sample_trees import (
    clone,
    delete,
    make_deep_tree,
    measure,
    mount_in_block,
    open_directory,
    open_files,
    open_for_copy,
)


def test_measure_agrees_with_du(original: Path) -> None:
    usage = measure(original)
    assert usage.size == int(run_command("du", "--block-size=1", "-s", original).split()[0])
    assert usage.inodes == int(run_command("du", "--inodes", "-s", original).split()[0])


def test_measure_counts_a_hard_linked_file_once(scratch: Path) -> None:
    tree = scratch / "tree"
    for name in ("a", "b", "c"):
        (tree / name).mkdir(parents=True)
    (tree / "a" / "file").write_bytes(b"x" * 100_000)
    alone = measure(tree)
    for name in ("b", "c"):
        os.link(tree / "a" / "file", tree / name / "file")
    os.link(tree / "a" / "file", tree / "a" / "again")
    os.link(tree / "a" / "file", scratch / "outside")
    assert measure(tree) == alone
    (tree / "a" / "file").unlink()
    assert measure(tree) == alone


@long_on_xfs
@pytest.mark.parametrize("turns", [40, pytest.param(200, marks=pytest.mark.long)])
def test_measure_of_a_changing_tree_succeeds_or_raises_estale(scratch: Path, turns: int) -> None:
    tree = scratch / "tree"
    tree.mkdir()
    with ThreadPoolExecutor(1) as pool:
        changes = pool.submit(change_repeatedly, tree, turns)
        try:
            measure_until(changes, tree)
        finally:
            changes.result()


def measure_until(changes: Future[None], tree: Path) -> None:
    while True:
        finished = changes.done()
        try:
            assert measure(tree).inodes >= 1
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        if finished:
            return


def change_repeatedly(tree: Path, turns: int) -> None:
    """Create, move and remove entries of ``tree`` repeatedly, also deep inside it."""
    for turn in range(turns):
        deep = tree / f"deep {turn % 3}" / "/".join(["d"] * 80)
        deep.mkdir(parents=True, exist_ok=True)
        wide = tree / f"wide {turn % 5}"
        wide.mkdir(exist_ok=True)
        for number in range(20):
            (wide / str(number)).touch()
            (wide / f"d{number}").mkdir(exist_ok=True)
            with suppress(FileExistsError):
                os.link(wide / str(number), deep / str(number))
        for number in range(20):
            (wide / str(number)).rename(deep / f"moved {number}")
            (wide / f"d{number}").rename(wide / f"e{number}")
            (wide / f"e{number}").rmdir()
            (wide / f"e{number}").symlink_to("..")
            (wide / f"e{number}").unlink()
        inner = tree / f"deep {turn % 3}" / "d/d/d"
        inner.rename(tree / f"moved {turn % 2}")
        run_command("rm", "-rf", tree / f"moved {turn % 2}")


def test_measure_raises_estale_when_a_directory_is_moved(scratch: Path) -> None:
    """Directories far above the current one are not open, and ``..`` leads to the new place."""
    tree = scratch / "tree"
    tree.mkdir()
    with open_directory(tree) as root:
        make_deep_tree(root, 100, "d")
    moved: list[int] = []

    def step(*_: int) -> None:
        moved.append(0)
        if len(moved) == 100:
            (tree / "/".join("d" * 20)).rename(tree / "elsewhere")

    before = open_files()
    with pytest.raises(OSError, match="moved") as caught:
        measure(tree, step)
    assert caught.value.errno == errno.ESTALE
    assert open_files() == before


def test_delete_removes_the_torture_tree(original: Path, scratch: Path) -> None:
    clone(original, scratch / "copy")
    delete(scratch / "copy")
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_delete_removes_immutable_and_append_only_files(scratch: Path, flag: str) -> None:
    tree = scratch / "tree"
    (tree / "directory" / "below").mkdir(parents=True)
    (tree / "directory" / "file").touch()
    (tree / "directory" / "below" / "symlink").symlink_to("nowhere")
    os.mknod(tree / "directory" / "below" / "device", stat.S_IFCHR, os.makedev(1, 3))
    (tree / "file").touch()
    (tree / "mode 0").touch(0)
    for name in ("file", "mode 0", "directory/file", "directory/below", "directory"):
        run_command("chattr", flag, tree / name)
    delete(tree)
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_delete_removes_an_immutable_or_append_only_root(scratch: Path, flag: str) -> None:
    tree = scratch / "tree"
    (tree / "directory").mkdir(parents=True)
    (tree / "file").touch()
    os.mknod(tree / "device", stat.S_IFCHR, os.makedev(1, 3))
    run_command("chattr", flag, tree)
    delete(tree)
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("where", ["tree", "tree/inner"])
def test_delete_removes_files_that_are_added_during_the_deletion(scratch: Path, where: str) -> None:
    (scratch / where).mkdir(parents=True)
    (scratch / where / "0").touch()
    left = iter(range(1, 6))

    def fill_again(*_: int) -> None:
        # The running scan does not see the new file, so the directory is not empty at its rmdir.
        if (number := next(left, None)) is not None and (scratch / where).is_dir():
            (scratch / where / str(number)).touch()

    delete(scratch / "tree", fill_again)
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("instead", ["nothing", "symlink", "file", "directory"])
def test_delete_keeps_files_outside_when_a_directory_is_replaced(
    scratch: Path, instead: str
) -> None:
    """Delete has already entered the moved directory. It deletes the files in it, and no others."""
    tree, outside = scratch / "tree", scratch / "outside"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "file").touch()
    outside.mkdir()
    (outside / "kept").touch()
    reports: list[int] = []

    def move(*_: int) -> None:
        reports.append(0)
        if len(reports) == 2:
            (tree / "inner").rename(outside / "moved")
            if instead == "symlink":
                (tree / "inner").symlink_to(outside)
            elif instead == "file":
                (tree / "inner").touch()
            elif instead == "directory":
                (tree / "inner" / "below").mkdir(parents=True)

    delete(tree, move)
    assert sorted(os.listdir(scratch)) == ["outside"]
    assert sorted(os.listdir(outside)) == ["kept", "moved"]


def test_delete_follows_no_symbolic_link(scratch: Path) -> None:
    outside = scratch / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept\n")
    tree = scratch / "tree"
    tree.mkdir()
    (tree / "absolute").symlink_to(outside)
    (tree / "relative").symlink_to("../outside")
    (tree / "file").symlink_to(outside / "file")
    (scratch / "link").symlink_to("outside")
    delete(tree)
    with pytest.raises(NotADirectoryError):
        delete(scratch / "link")
    assert sorted(os.listdir(scratch)) == ["link", "outside"]
    assert (outside / "file").read_bytes() == b"kept\n"


@contextmanager
def make_tree_with_mounts(tree: Path, outside: Path) -> Iterator[None]:
    """Make ``tree`` with three mounts in it, each of which hides a file and shows other files.

    The tree itself has eight inodes, and a little more than 64 KiB.
    """
    for name in ("tmpfs", "deep/bind"):
        (tree / name).mkdir(parents=True)
        (tree / name / "hidden").write_bytes(b"hidden\n")
    (tree / "deep" / "file").write_bytes(b"h" * 65536)
    (tree / "plain").touch()
    outside.mkdir()
    (outside / "shown").write_bytes(b"shown\n")
    (outside / "directory").mkdir()
    with (
        mount_in_block("-t", "tmpfs", "tmpfs", tree / "tmpfs"),
        mount_in_block("--bind", outside, tree / "deep" / "bind"),
        mount_in_block("--bind", outside / "shown", tree / "deep" / "file"),
    ):
        (tree / "tmpfs" / "shown").write_bytes(b"shown\n")
        yield


def test_delete_crosses_no_mount(scratch: Path) -> None:
    tree, outside = scratch / "tree", scratch / "outside"
    with make_tree_with_mounts(tree, outside):
        before = open_files()
        with pytest.raises(OSError, match="busy") as caught:
            delete(tree)
        assert caught.value.errno == errno.EBUSY
        assert open_files() == before
        assert sorted(os.listdir(tree)) == ["deep", "tmpfs"]
        assert (tree / "tmpfs" / "shown").read_bytes() == b"shown\n"
        assert (tree / "deep" / "bind" / "shown").read_bytes() == b"shown\n"
        assert (tree / "deep" / "file").read_bytes() == b"shown\n"
    assert sorted(os.listdir(outside)) == ["directory", "shown"]
    assert os.listdir(tree / "deep" / "bind") == []
    delete(tree)
    assert os.listdir(scratch) == ["outside"]


def test_delete_of_a_tree_that_is_a_mount_point_raises_ebusy(scratch: Path) -> None:
    tree, outside = scratch / "tree", scratch / "outside"
    tree.mkdir()
    (tree / "hidden").touch()
    outside.mkdir()
    (outside / "shown").touch()
    with mount_in_block("--bind", outside, tree):
        with pytest.raises(OSError, match="busy"):
            delete(tree)
        assert os.listdir(tree) == ["shown"]
    delete(tree)
    assert os.listdir(outside) == ["shown"]
    assert os.listdir(scratch) == ["outside"]


def test_clone_and_measure_read_the_files_below_mounts(scratch: Path) -> None:
    tree = scratch / "tree"
    with make_tree_with_mounts(tree, scratch / "outside"):
        mounted_over = measure(tree)
        clone(tree, scratch / "copy")
    assert mounted_over == measure(tree)
    assert mounted_over.inodes == 8
    assert torture_tree.differences(tree, scratch / "copy") == ""
    assert (scratch / "copy" / "deep" / "bind" / "hidden").read_bytes() == b"hidden\n"


def test_open_tree_accepts_only_directories(scratch: Path) -> None:
    (scratch / "directory").mkdir()
    (scratch / "link").symlink_to("directory")
    (scratch / "file").touch()
    os.mkfifo(scratch / "fifo")
    before = open_files()
    for name in ("link", "file", "fifo"):
        with pytest.raises(NotADirectoryError), open_for_copy(scratch / name):
            pass
    with pytest.raises(FileNotFoundError), open_for_copy(scratch / "nothing"):
        pass
    assert open_files() == before


def test_open_tree_is_read_only_by_default(scratch: Path) -> None:
    (scratch / "tree").mkdir()
    with open_for_copy(scratch / "tree") as root, pytest.raises(OSError, match="Read-only"):
        os.mkdir("new", dir_fd=root)
    with open_directory(scratch) as parent, trees.open_tree(parent, "tree", writable=True) as root:
        os.mkdir("new", dir_fd=root)
    assert os.listdir(scratch / "tree") == ["new"]
