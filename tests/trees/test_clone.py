"""Exact copies on ext4 and xfs, checked with rsync and with further comparisons."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.trees.blocks import Blocks, open_blocks
from snapd_native.trees.opened import open_file
from tests.support import torture_tree
from tests.support.commands import run_command
from tests.support.file_systems import FileSystem, new_file_system, on_ext4, scratch_on
from tests.support.sample_trees import clone, measure, mount_in_block, open_directory


@pytest.mark.parametrize("reflink", [True, False])
def test_clone_copies_the_torture_tree_exactly(
    filesystem: FileSystem, original: Path, scratch: Path, reflink: bool
) -> None:
    clone(original, scratch / "copy", reflink=reflink and filesystem.reflink)
    assert torture_tree.differences(original, scratch / "copy") == ""


def test_clone_copies_data_where_reflink_fails(original: Path, scratch: Path) -> None:
    """A failed reflink is no error: file systems have many reasons to refuse it."""
    clone(original, scratch / "copy", reflink=True)
    assert torture_tree.differences(original, scratch / "copy") == ""


def test_clone_copies_an_empty_directory_exactly(scratch: Path) -> None:
    (scratch / "empty").mkdir(mode=0o750)
    clone(scratch / "empty", scratch / "copy")
    clone(scratch / "copy", scratch / "again")
    assert torture_tree.differences(scratch / "empty", scratch / "again") == ""


def change_content(copy: Path) -> None:
    path = copy / "types" / "regular"
    before = path.stat()
    path.write_bytes(b"REGULAR\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def fill_hole(copy: Path) -> None:
    path = copy / "data" / "all hole"
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def split_links(copy: Path) -> None:
    """Replace a hard link to an empty file by a separate empty file with the same times."""
    first, second = copy / "links" / "nothing", copy / "more links" / "nothing, too"
    before = first.stat()
    second.unlink()
    second.touch()
    os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_time(copy: Path) -> None:
    path = copy / "types" / "symlink"
    before = path.lstat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1), follow_symlinks=False)


def set_xattr(copy: Path) -> None:
    os.setxattr(copy / "xattrs" / "whiteout", "trusted.text", b"else", follow_symlinks=False)


CHANGES: list[Callable[[Path], object]] = [
    change_content,
    fill_hole,
    split_links,
    set_time,
    set_xattr,
    lambda copy: (copy / "types" / "fifo").unlink(),
    lambda copy: (copy / "types" / "empty directory" / "new").touch(),
    lambda copy: (copy / "owners" / "file 0").chmod(0o4644),
    lambda copy: os.chown(copy / "owners" / "symlink 0", 2, 0, follow_symlinks=False),
    lambda copy: run_command("setfacl", "-m", "user:9:r", copy / "acls" / "file"),
    lambda copy: os.removexattr(copy, "user.empty"),
]


@on_ext4
def test_differences_finds_every_change_of_a_copy(original: Path, scratch: Path) -> None:
    for number, change in enumerate(CHANGES):
        copy = scratch / str(number)
        clone(original, copy)
        change(copy)
        assert torture_tree.differences(original, copy) != "", number


def test_clone_and_measure_keep_the_access_times_of_the_source(scratch: Path) -> None:
    source = scratch / "source"
    torture_tree.build(source)
    paths = [
        os.path.join(top, name)
        for top, directories, files in os.walk(os.fsencode(source))
        for name in [b".", *directories, *files]
    ]
    for path in paths:
        os.utime(path, (0, os.lstat(path).st_mtime), follow_symlinks=False)
    before = [os.lstat(path) for path in paths]
    clone(source, scratch / "copy")
    measure(source)
    after = [os.lstat(path) for path in paths]
    for path, old, new in zip(paths, before, after, strict=True):
        assert (old.st_atime_ns, old.st_ctime_ns) == (new.st_atime_ns, new.st_ctime_ns), path
    (source / "types" / "regular").read_bytes()
    assert (source / "types" / "regular").stat().st_atime_ns != 0, "the test could not have failed"


def test_clone_shares_extents_exactly_where_reflink_works(
    filesystem: FileSystem, scratch: Path
) -> None:
    with open_directory(scratch) as fd:
        assert trees.reflink_works(fd) == filesystem.reflink
    assert list(scratch.iterdir()) == []
    (scratch / "source").mkdir()
    (scratch / "source" / "file").write_bytes(os.urandom(1 << 20))
    clone(scratch / "source", scratch / "copy", reflink=filesystem.reflink)
    os.sync()
    for tree in ("source", "copy"):
        extents = [
            line
            for line in run_command("filefrag", "-v", scratch / tree / "file").splitlines()
            if re.match(r" +\d+:", line)
        ]
        assert extents
        assert all(("shared" in extent) == filesystem.reflink for extent in extents), extents


def test_clone_ignores_hard_links_from_outside_the_tree(scratch: Path) -> None:
    source = scratch / "source"
    (source / "a").mkdir(parents=True)
    (source / "b").mkdir()
    for number in range(3):
        (scratch / f"{number}").write_text(str(number))
        os.link(scratch / f"{number}", source / "a" / f"{number}")
    os.link(scratch / "0", source / "b" / "0")
    clone(source, scratch / "copy")
    copy = scratch / "copy"
    assert sorted(os.listdir(copy)) == ["a", "b"]
    assert (copy / "a" / "0").samefile(copy / "b" / "0")
    assert (copy / "a" / "0").stat().st_nlink == 2
    assert [(copy / "a" / str(number)).stat().st_nlink for number in (1, 2)] == [1, 1]
    assert (copy / "a" / "2").read_text() == "2"


def test_clone_works_with_any_names_in_the_source(scratch: Path) -> None:
    source = scratch / "source"
    source.mkdir()
    for length in range(256 - len(".links")):
        (source / f".links{'-' * length}").touch()
        (source / f".links-{length}").touch()
    os.link(source / ".links", source / "linked")
    clone(source, scratch / "copy")
    assert torture_tree.differences(source, scratch / "copy") == ""


def test_clone_overrides_an_inherited_group_and_default_acl(scratch: Path) -> None:
    """The target inherits the group and default ACL of its parent; the copy must not keep them."""
    source, home = scratch / "source", scratch / "home"
    (source / "directory").mkdir(parents=True)
    for place in (source, source / "directory"):
        (place / "file").touch()
        (place / "symlink").symlink_to("file")
        os.mkfifo(place / "fifo")
    home.mkdir()
    os.chown(home, 0, 1234)
    home.chmod(0o2755)
    run_command("setfacl", "-d", "-m", "user:5:rwx", home)
    clone(source, home / "copy")
    assert torture_tree.differences(source, home / "copy") == ""


def test_clone_distinguishes_equal_inode_numbers_of_two_devices(
    loop_directory: Path, tmp_path: Path
) -> None:
    """In overlayfs and btrfs subvolumes, different files in a tree can have equal inode numbers."""
    with (
        new_file_system("ext4", 16 << 20, loop_directory) as one,
        new_file_system("ext4", 16 << 20, loop_directory) as two,
    ):
        for mode, root in ((0o600, one.root), (0o644, two.root)):
            lower = root / "lower" / "tree"
            (lower / "a").mkdir(parents=True)
            (lower / "b").mkdir()
            (lower / "a" / f"{mode:o}").touch(mode)
            os.link(lower / "a" / f"{mode:o}", lower / "b" / f"{mode:o}")
        source, copy = tmp_path / "tree", one.root / "copy"
        options = f"lowerdir={one.root}/lower:{two.root}/lower,xino=off"
        with mount_in_block("-t", "overlay", "-o", options, "overlay", tmp_path):
            inodes = [(source / "a" / name).stat().st_ino for name in ("600", "644")]
            assert inodes[0] == inodes[1]
            clone(source, copy)
        for name in ("600", "644"):
            first = (copy / "a" / name).stat()
            assert f"{stat.S_IMODE(first.st_mode):o}" == name
            assert first.st_nlink == 2
            assert os.path.samestat(first, (copy / "b" / name).stat())


@pytest.mark.long
def test_clone_copies_a_file_with_65000_hard_links(ext4: FileSystem) -> None:
    with scratch_on(ext4) as home:
        source = home / "source"
        (source / "a").mkdir(parents=True)
        (source / "z").mkdir()
        (source / "a" / "0").write_bytes(b"65000 names\n")
        with open_directory(source) as fd:
            for number in range(1, 65000):
                name = f"{'az'[number % 2]}/{number}"
                os.link("a/0", name, src_dir_fd=fd, dst_dir_fd=fd)
            with pytest.raises(OSError, match="Too many links"):
                os.link("a/0", "one too many", src_dir_fd=fd, dst_dir_fd=fd)
        clone(source, home / "copy")
        copy = (home / "copy" / "a" / "0").stat()
        assert copy.st_nlink == 65000
        inodes = [entry.inode() for part in "az" for entry in os.scandir(home / "copy" / part)]
        assert (len(inodes), set(inodes)) == (65000, {copy.st_ino})
        assert sorted(os.listdir(home / "copy")) == ["a", "z"]


def test_clone_reports_all_bytes_and_reports_within_large_files(scratch: Path) -> None:
    (scratch / "source").mkdir()
    with (scratch / "source" / "large").open("wb") as file:
        for _ in range(129):
            file.write(b"x" * (1 << 20))
    (scratch / "source" / "small").write_bytes(b"x" * 5000)
    os.sync()
    reports: list[int] = []
    clone(scratch / "source", scratch / "copy", lambda _, size: reports.append(size))
    assert sum(reports) == measure(scratch / "source").size
    assert len(reports) >= 4


def test_clone_keeps_holes_of_files_with_other_allocated_blocks(scratch: Path) -> None:
    """Blocks for attributes, or beyond the end of a file, do not turn its holes into data."""
    tree = scratch / "tree"
    tree.mkdir()
    for name in ("attribute", "beyond"):
        with (tree / name).open("wb") as file:
            file.truncate(64 << 10)
    os.setxattr(tree / "attribute", "user.large", b"x" * 3000)
    run_command(
        "fallocate", "--keep-size", "--offset", "1MiB", "--length", "128KiB", tree / "beyond"
    )
    os.sync()
    clone(tree, scratch / "copy")
    os.sync()
    for name in ("attribute", "beyond"):
        with (scratch / "copy" / name).open("rb") as copy, pytest.raises(OSError) as caught:
            os.lseek(copy.fileno(), 0, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO


def test_a_device_node_in_an_opened_tree_cannot_be_opened(scratch: Path) -> None:
    (scratch / "tree").mkdir()
    os.mknod(scratch / "tree" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for writable in (False, True):
        with (
            open_directory(scratch) as parent,
            trees.open_tree(parent, "tree", writable=writable) as root,
            pytest.raises(PermissionError),
        ):
            os.open("null", os.O_RDONLY, dir_fd=root)


def test_clone_copies_an_active_swap_file(filesystem: FileSystem, scratch: Path) -> None:
    swap = scratch / "tree" / "swap"
    swap.parent.mkdir()
    swap.write_bytes(bytes(1 << 20))
    swap.chmod(0o600)
    run_command("mkswap", str(swap))
    run_command("swapon", str(swap))
    try:
        clone(swap.parent, scratch / "copy", reflink=filesystem.reflink)
        assert torture_tree.differences(swap.parent, scratch / "copy") == ""
    finally:
        run_command("swapoff", str(swap))


@pytest.fixture
def leased_tree(scratch: Path) -> Iterator[Path]:
    """Yield a tree with a file. Another process has a lease on it, and gives it up on request."""
    path = scratch / "leased" / "file"
    path.parent.mkdir()
    path.write_text("text")
    with subprocess.Popen(
        [sys.executable, "-c", LEASE_HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as lessor:
        assert lessor.stdout
        assert lessor.stdout.readline() == "leased\n"
        yield path.parent
        lessor.terminate()


LEASE_HOLDER = """
import fcntl, os, signal, sys, time

def give_up(*_):
    time.sleep(0.05)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

signal.signal(signal.SIGIO, give_up)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", flush=True)
while True:
    signal.pause()
"""


def test_clone_waits_until_a_lease_is_given_up(leased_tree: Path, scratch: Path) -> None:
    clone(leased_tree, scratch / "copy")
    assert (scratch / "copy" / "file").read_text() == "text"


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_digest_waits_until_a_lease_is_given_up(leased_tree: Path, from_disk: bool) -> None:
    with (
        open_directory(leased_tree) as tree,
        closing(Blocks(open_blocks(tree, "file", from_disk=from_disk), 4096)) as blocks,
    ):
        assert blocks.read(0, 4096) == b"text"


def test_opening_a_fifo_does_not_block(scratch: Path) -> None:
    os.mkfifo(scratch / "file")
    with open_directory(scratch) as tree:
        os.close(open_file(tree, "file"))


def test_inode_flags_are_not_copied(filesystem: FileSystem, scratch: Path) -> None:
    """As cp -a and rsync: they belong to the file system, not to the contents."""
    tree = scratch / "tree"
    tree.mkdir()
    (tree / "file").write_text("data\n")
    subprocess.run(["chattr", "+Aai", tree / "file"], check=True)
    try:
        clone(tree, scratch / "copy", reflink=filesystem.reflink)
        shown = [
            subprocess.run(
                ["lsattr", "-d", path], capture_output=True, text=True, check=True
            ).stdout.split()[0]
            for path in (tree / "file", scratch / "copy" / "file")
        ]
    finally:
        subprocess.run(["chattr", "-Aai", tree / "file"], check=True)
    assert (scratch / "copy" / "file").read_text() == "data\n"
    source, copy = ({flag for flag in flags if flag in "Aai"} for flags in shown)
    assert (source, copy) == ({"A", "a", "i"}, set())


# ext4 has project ids only with the feature `project`.
@pytest.mark.parametrize("filesystem", ["xfs"], indirect=True)
def test_a_copy_has_the_project_of_its_parent_directory(
    filesystem: FileSystem, scratch: Path
) -> None:
    (scratch / "tree").mkdir()
    (scratch / "tree" / "file").write_text("data\n")
    (scratch / "state").mkdir()
    subprocess.run(["chattr", "-p", "7", scratch / "tree" / "file"], check=True)
    subprocess.run(["chattr", "+P", "-p", "8", scratch / "state"], check=True)
    clone(scratch / "tree", scratch / "state" / "copy", reflink=filesystem.reflink)
    shown = subprocess.run(
        ["lsattr", "-p", scratch / "state" / "copy" / "file"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split()[0] == "8"
