"""Trees on real ext4 and xfs: faithful copies, usage as du sees it, deletion of anything."""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import snapd_native
from snapd_native import trees
from snapd_native.model import Usage
from tests import alone, torture
from tests.filesystems import FileSystem, mounted, scratch_on

LEVELS = 2000
"""Directories below each other in a deep tree; their names alone exceed PATH_MAX by far."""

MEMORY = 4 << 20
"""Bytes that a process may need more for a wide directory than for a narrow one."""


class Stopped(Exception):
    """Raised by a step, as a cancelled job does."""


def ignore(_: int) -> None:
    """Take no notice of progress."""


@contextmanager
def directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(tree: Path) -> Iterator[int]:
    with directory(tree.parent) as parent, trees.open_tree(parent, tree.name) as root:
        yield root


def clone(
    source: Path, target: Path, step: Callable[[int], None] = ignore, *, reflink: bool = False
) -> None:
    target.mkdir(exist_ok=True)
    with opened(source) as here, directory(target) as there:
        alone.clone(here, there, step, reflink=reflink)


def measure(tree: Path, step: Callable[[int], None] = ignore) -> Usage:
    with opened(tree) as root:
        return alone.measure(root, step)


def delete(tree: Path, step: Callable[[int], None] = ignore) -> None:
    with directory(tree.parent) as parent:
        trees.delete(parent, tree.name, step)


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def open_files() -> dict[str, str]:
    """Describe the process's file descriptors, but for the one that lists them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextmanager
def file_limit(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def mount(*arguments: str | Path) -> Iterator[None]:
    run("mount", *arguments)
    try:
        yield
    finally:
        run("umount", arguments[-1])


@pytest.fixture(scope="module")
def original(filesystem: FileSystem) -> Path:
    """Share one torture tree among the tests that only read it."""
    path = Path(tempfile.mkdtemp(prefix="original", dir=filesystem.root))
    torture.build(path)
    os.sync()
    return path


# Clone.


@pytest.mark.parametrize("reflink", [True, False])
def test_clone_is_faithful(
    filesystem: FileSystem, original: Path, scratch: Path, reflink: bool
) -> None:
    clone(original, scratch / "copy", reflink=reflink and filesystem.reflink)
    assert torture.differences(original, scratch / "copy") == ""


def test_clone_falls_back_to_copying(original: Path, scratch: Path) -> None:
    """Reflink asked for where it cannot be is no error: file systems have many reasons."""
    clone(original, scratch / "copy", reflink=True)
    assert torture.differences(original, scratch / "copy") == ""


def test_clone_of_a_clone_of_an_empty_directory(scratch: Path) -> None:
    (scratch / "empty").mkdir(mode=0o750)
    clone(scratch / "empty", scratch / "copy")
    clone(scratch / "copy", scratch / "again")
    assert torture.differences(scratch / "empty", scratch / "again") == ""


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
    """Give two files with two names each the same contents, but other partners."""
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
    lambda copy: run("setfacl", "-m", "user:9:r", copy / "acls" / "file"),
    lambda copy: os.removexattr(copy, "user.empty"),
]


def test_the_judge_is_strict(original: Path, scratch: Path) -> None:
    for number, change in enumerate(CHANGES):
        copy = scratch / str(number)
        clone(original, copy)
        change(copy)
        assert torture.differences(original, copy) != "", number


def test_clone_leaves_access_times_alone(scratch: Path) -> None:
    source = scratch / "source"
    torture.build(source)
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


def test_reflink_shares_data(filesystem: FileSystem, scratch: Path) -> None:
    with directory(scratch) as fd:
        assert trees.reflink_works(fd) == filesystem.reflink
    assert list(scratch.iterdir()) == []
    (scratch / "source").mkdir()
    (scratch / "source" / "file").write_bytes(os.urandom(1 << 20))
    clone(scratch / "source", scratch / "copy", reflink=filesystem.reflink)
    os.sync()
    for tree in ("source", "copy"):
        extents = [
            line
            for line in run("filefrag", "-v", scratch / tree / "file").splitlines()
            if re.match(r" +\d+:", line)
        ]
        assert extents
        assert all(("shared" in extent) == filesystem.reflink for extent in extents), extents


def test_hard_links_leave_no_trace_of_names_outside_the_tree(scratch: Path) -> None:
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


def test_clone_whatever_names_the_source_has_taken(scratch: Path) -> None:
    source = scratch / "source"
    source.mkdir()
    for length in range(256 - len(".links")):
        (source / f".links{'-' * length}").touch()
        (source / f".links-{length}").touch()
    os.link(source / ".links", source / "linked")
    clone(source, scratch / "copy")
    assert torture.differences(source, scratch / "copy") == ""


def test_clone_overrides_what_the_target_inherited(scratch: Path) -> None:
    """A setgid directory with a default ACL hands both on to the target, but not to the copy."""
    source, home = scratch / "source", scratch / "home"
    (source / "directory").mkdir(parents=True)
    for place in (source, source / "directory"):
        (place / "file").touch()
        (place / "symlink").symlink_to("file")
        os.mkfifo(place / "fifo")
    home.mkdir()
    os.chown(home, 0, 1234)
    home.chmod(0o2755)
    run("setfacl", "-d", "-m", "user:5:rwx", home)
    clone(source, home / "copy")
    assert torture.differences(source, home / "copy") == ""


def test_hard_links_of_several_devices(loop_directory: Path, tmp_path: Path) -> None:
    """A tree can hold equal inode numbers: overlayfs shows them, and subvolumes of btrfs."""
    with (
        mounted("ext4", 16 << 20, loop_directory) as one,
        mounted("ext4", 16 << 20, loop_directory) as two,
    ):
        for mode, root in ((0o600, one.root), (0o644, two.root)):
            lower = root / "lower" / "tree"
            (lower / "a").mkdir(parents=True)
            (lower / "b").mkdir()
            (lower / "a" / f"{mode:o}").touch(mode)
            os.link(lower / "a" / f"{mode:o}", lower / "b" / f"{mode:o}")
        source, copy = tmp_path / "tree", one.root / "copy"
        options = f"lowerdir={one.root}/lower:{two.root}/lower,xino=off"
        with mount("-t", "overlay", "-o", options, "overlay", tmp_path):
            inodes = [(source / "a" / name).stat().st_ino for name in ("600", "644")]
            assert inodes[0] == inodes[1]
            clone(source, copy)
        for name in ("600", "644"):
            first = (copy / "a" / name).stat()
            assert f"{stat.S_IMODE(first.st_mode):o}" == name
            assert first.st_nlink == 2
            assert os.path.samestat(first, (copy / "b" / name).stat())


def test_a_file_with_all_the_links_that_ext4_allows(ext4: FileSystem) -> None:
    with scratch_on(ext4) as home:
        source = home / "source"
        (source / "a").mkdir(parents=True)
        (source / "z").mkdir()
        (source / "a" / "0").write_bytes(b"65000 names\n")
        with directory(source) as fd:
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


def test_steps_tell_the_bytes_and_come_inside_large_files(scratch: Path) -> None:
    (scratch / "source").mkdir()
    with (scratch / "source" / "large").open("wb") as file:
        for _ in range(129):
            file.write(b"x" * (1 << 20))
    (scratch / "source" / "small").write_bytes(b"x" * 5000)
    os.sync()
    steps: list[int] = []
    clone(scratch / "source", scratch / "copy", steps.append)
    usage = measure(scratch / "source")
    assert sum(steps) == usage.size - (scratch / "source").stat().st_blocks * 512
    assert len(steps) >= 4


# Trees of extreme shape.


def test_deep_tree(scratch: Path) -> None:
    source, copy = scratch / "source", scratch / "copy"
    source.mkdir()
    with directory(source) as root:
        make_deep(root, LEVELS, "d" * 250)
    before = open_files()
    with file_limit(256):
        clone(source, copy)
        usage = measure(source)
        assert measure(copy).inodes == usage.inodes == 1 + LEVELS + LEVELS // 100
        with opened(source) as here, opened(copy) as there:
            assert describe_deep(here) == describe_deep(there)
        delete(source)
        delete(copy)
    assert os.listdir(scratch) == []
    assert open_files() == before


def make_deep(root: int, levels: int, name: str) -> None:
    """Make directories below each other, with a name of one file in every hundredth."""
    here = os.dup(root)
    for level in range(levels):
        if level == 0:
            os.mknod("file", 0o600, dir_fd=here)
        elif level % 100 == 0:
            os.link("file", f"file {level}", src_dir_fd=root, dst_dir_fd=here)
            os.mknod("other", 0o640, dir_fd=here)
        os.mkdir(name, 0o700 + level % 64, dir_fd=here)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def describe_deep(root: int) -> list[list[tuple[str, int, int, int]]]:
    described = []
    here = os.dup(root)
    while True:
        names = sorted(os.listdir(here))
        status = {name: os.stat(name, dir_fd=here) for name in names}
        described.append(
            [(name, s.st_mode, s.st_nlink, s.st_mtime_ns) for name, s in status.items()]
        )
        inner = [name for name in names if stat.S_ISDIR(status[name].st_mode)]
        below = os.open(inner[0], os.O_RDONLY, dir_fd=here) if inner else -1
        os.close(here)
        if below < 0:
            return described
        here = below


def fill(path: Path, names: int, inodes: int) -> None:
    """Fill a directory; where files have two names, those come far apart in any order."""
    path.mkdir()
    with directory(path) as fd:
        for number in range(names):
            if number < inodes:
                os.mknod(f"{number:06}", dir_fd=fd)
            else:
                first = f"{number - inodes:06}"
                os.link(first, f"{number:06}", src_dir_fd=fd, dst_dir_fd=fd)


PROGRAM = """
import os, sys
from snapd_native import trees
from tests import alone

def ignore(_): pass

parent = os.open(sys.argv[1], os.O_RDONLY)
os.mkdir("copy", dir_fd=parent)
target = os.open("copy", os.O_RDONLY, dir_fd=parent)
with trees.open_tree(parent, "source") as source:
    alone.clone(source, target, ignore, reflink=False)
    print(sum(1 for _ in os.scandir(target)))
    if sys.argv[2] == "measure":
        print(alone.measure(source, ignore).inodes)
for name in ("source", "copy"):
    trees.delete(parent, name)
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def test_wide_directory_in_bounded_memory(scratch: Path) -> None:
    narrow, wide = (peak(scratch, names, names, "measure") for names in (2000, 200_000))
    assert wide - narrow < MEMORY


def test_many_hard_links_cloned_in_bounded_memory(ext4: FileSystem) -> None:
    with scratch_on(ext4) as home:
        few, many = (peak(home, 2 * files, files) for files in (1000, 50_000))
    assert many - few < MEMORY


def peak(home: Path, names: int, inodes: int, *extra: str) -> int:
    """Clone and delete a directory in a process of its own; return the memory that it took."""
    fill(home / "source", names, inodes)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home), *(extra or ["clone"])],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(snapd_native.__file__).parents[1])},
    )
    *counted, kibibytes = [int(word) for word in done.stdout.split()]
    assert counted == [names, *([inodes + 1] if extra else [])]
    assert os.listdir(home) == []
    return kibibytes << 10


# Measure.


def test_measure_is_what_du_says(original: Path) -> None:
    usage = measure(original)
    assert usage.size == int(run("du", "--block-size=1", "-s", original).split()[0])
    assert usage.inodes == int(run("du", "--inodes", "-s", original).split()[0])


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


def test_measure_of_a_tree_that_changes_meanwhile(scratch: Path) -> None:
    tree = scratch / "tree"
    tree.mkdir()
    with ThreadPoolExecutor(1) as pool:
        changes = pool.submit(stir, tree)
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


def stir(tree: Path) -> None:
    """Make, move and remove things in ``tree`` again and again, also deep down in it."""
    for turn in range(200):
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
        run("rm", "-rf", tree / f"moved {turn % 2}")


def test_a_directory_moved_under_way_is_noticed(scratch: Path) -> None:
    """Far above the position no directory stays open, and ``..`` leads where it went."""
    tree = scratch / "tree"
    tree.mkdir()
    with directory(tree) as root:
        make_deep(root, 100, "d")
    moved: list[int] = []

    def step(_: int) -> None:
        moved.append(0)
        if len(moved) == 100:
            (tree / "/".join("d" * 20)).rename(tree / "elsewhere")

    before = open_files()
    with pytest.raises(OSError, match="moved") as caught:
        measure(tree, step)
    assert caught.value.errno == errno.ESTALE
    assert open_files() == before


# Delete.


def test_delete_the_torture_tree(original: Path, scratch: Path) -> None:
    clone(original, scratch / "copy")
    delete(scratch / "copy")
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_delete_protected_files(scratch: Path, flag: str) -> None:
    tree = scratch / "tree"
    (tree / "directory" / "below").mkdir(parents=True)
    (tree / "directory" / "file").touch()
    (tree / "directory" / "below" / "symlink").symlink_to("nowhere")
    os.mknod(tree / "directory" / "below" / "device", stat.S_IFCHR, os.makedev(1, 3))
    (tree / "file").touch()
    (tree / "mode 0").touch(0)
    for name in ("file", "mode 0", "directory/file", "directory/below", "directory"):
        run("chattr", flag, tree / name)
    delete(tree)
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_delete_a_protected_root(scratch: Path, flag: str) -> None:
    tree = scratch / "tree"
    (tree / "directory").mkdir(parents=True)
    (tree / "file").touch()
    os.mknod(tree / "device", stat.S_IFCHR, os.makedev(1, 3))
    run("chattr", flag, tree)
    delete(tree)
    assert os.listdir(scratch) == []


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
def mounts_inside(tree: Path, outside: Path) -> Iterator[None]:
    """Make ``tree`` with three mounts in it, each of which hides something and shows ``outside``.

    The tree has eight inodes, and 64 KiB and some.
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
        mount("-t", "tmpfs", "tmpfs", tree / "tmpfs"),
        mount("--bind", outside, tree / "deep" / "bind"),
        mount("--bind", outside / "shown", tree / "deep" / "file"),
    ):
        (tree / "tmpfs" / "shown").write_bytes(b"shown\n")
        yield


def test_delete_crosses_no_mount(scratch: Path) -> None:
    tree, outside = scratch / "tree", scratch / "outside"
    with mounts_inside(tree, outside):
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


def test_delete_spares_what_is_mounted_on_the_tree_itself(scratch: Path) -> None:
    tree, outside = scratch / "tree", scratch / "outside"
    tree.mkdir()
    (tree / "hidden").touch()
    outside.mkdir()
    (outside / "shown").touch()
    with mount("--bind", outside, tree):
        with pytest.raises(OSError, match="busy"):
            delete(tree)
        assert os.listdir(tree) == ["shown"]
    delete(tree)
    assert os.listdir(outside) == ["shown"]
    assert os.listdir(scratch) == ["outside"]


# What open_tree shows.


def test_mounts_are_not_seen_but_what_they_hide(scratch: Path) -> None:
    tree = scratch / "tree"
    with mounts_inside(tree, scratch / "outside"):
        mounted_over = measure(tree)
        clone(tree, scratch / "copy")
    assert mounted_over == measure(tree)
    assert mounted_over.inodes == 8
    assert torture.differences(tree, scratch / "copy") == ""
    assert (scratch / "copy" / "deep" / "bind" / "hidden").read_bytes() == b"hidden\n"


def test_open_tree_takes_directories_only(scratch: Path) -> None:
    (scratch / "directory").mkdir()
    (scratch / "link").symlink_to("directory")
    (scratch / "file").touch()
    os.mkfifo(scratch / "fifo")
    before = open_files()
    for name in ("link", "file", "fifo"):
        with pytest.raises(NotADirectoryError), opened(scratch / name):
            pass
    with pytest.raises(FileNotFoundError), opened(scratch / "nothing"):
        pass
    assert open_files() == before


def test_open_tree_is_read_only_unless_told(scratch: Path) -> None:
    (scratch / "tree").mkdir()
    with opened(scratch / "tree") as root, pytest.raises(OSError, match="Read-only"):
        os.mkdir("new", dir_fd=root)
    with directory(scratch) as parent, trees.open_tree(parent, "tree", writable=True) as root:
        os.mkdir("new", dir_fd=root)
    assert os.listdir(scratch / "tree") == ["new"]


# Failing.


@pytest.mark.parametrize("last", [1, 2, 50, 150, 400, 600])
def test_a_step_that_raises_stops_everything(original: Path, scratch: Path, last: int) -> None:
    """Whoever keeps the exception does not keep files open with it."""

    def step(_: int) -> None:
        steps.append(0)
        if len(steps) == last:
            raise Stopped

    clone(original, scratch / "copy")
    before = open_files()
    works: list[Callable[[], object]] = [
        lambda: measure(original, step),
        lambda: clone(original, scratch / "stopped", step),
        lambda: delete(scratch / "copy", step),
    ]
    for work in works:
        steps: list[int] = []
        with pytest.raises(Stopped) as caught:
            work()
        assert len(steps) == last
        assert open_files() == before, caught
    delete(scratch / "stopped")
    delete(scratch / "copy")


def test_no_file_stays_open(original: Path, scratch: Path) -> None:
    before = open_files()
    clone(original, scratch / "copy")
    measure(scratch / "copy")
    delete(scratch / "copy")
    with directory(scratch) as fd:
        here = open_files()
        trees.reflink_works(fd)
        assert open_files() == here
    assert open_files() == before


def test_running_out_of_files_leaves_none_open(scratch: Path) -> None:
    source = scratch / "source"
    source.mkdir()
    with directory(source) as root:
        make_deep(root, 100, "d")
    works: list[Callable[[Path], object]] = [
        lambda tree: clone(tree, scratch / "copy"),
        measure,
        delete,
    ]
    before = open_files()
    for work in works:
        with file_limit(len(before) + 30):
            with pytest.raises(OSError, match="Too many open files") as caught:
                work(source)
            assert open_files() == before, caught
    delete(source)


@pytest.mark.parametrize(("name", "size"), [("ext4", 16 << 20), ("xfs", 300 << 20)])
def test_a_full_disk(loop_directory: Path, name: str, size: int) -> None:
    with mounted(name, size, loop_directory) as small:
        source, copy = small.root / "source", small.root / "copy"
        (source / "a" / "b").mkdir(parents=True)
        for number in range(400):
            path = source / "a" / "b" / str(number)
            path.write_bytes(b"x" * 5000)
            os.setxattr(path, "user.large", f"{number:03}".encode() * 1000)
            os.link(path, source / "a" / str(number))
        copy.mkdir()
        fill_up(small.root / "ballast")
        before = open_files()
        with pytest.raises(OSError, match="No space left") as caught:
            clone(source, copy)
        assert caught.value.errno == errno.ENOSPC
        assert open_files() == before
        delete(copy)
        assert sorted(os.listdir(small.root)) == sorted(
            ["ballast", "source", *(["lost+found"] if name == "ext4" else [])]
        )


def fill_up(ballast: Path) -> None:
    """Take all free space but a few blocks."""
    with ballast.open("wb") as file:
        position = 0
        # What xfs has set aside for growing files comes free by and by.
        for piece in [*(1 << bits for bits in range(24, 11, -1))] * 3:
            os.sync()
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), position, piece)
                    position += piece
