"""Trees of extreme shape, and failures in the middle of the work."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import snapd_native
from snapd_native import trees
from tests.support.file_systems import FileSystem, new_file_system, scratch_on
from tests.support.sample_trees import (
    DEEP_LEVELS,
    EXTRA_MEMORY,
    StoppedByReport,
    clone,
    delete,
    limit_open_files,
    make_deep_tree,
    measure,
    open_directory,
    open_files,
    open_for_copy,
)


def test_a_deep_tree_is_copied_measured_and_deleted_with_few_open_files(scratch: Path) -> None:
    source, copy = scratch / "source", scratch / "copy"
    source.mkdir()
    with open_directory(source) as root:
        make_deep_tree(root, DEEP_LEVELS, "d" * 250)
    before = open_files()
    with limit_open_files(256):
        clone(source, copy)
        usage = measure(source)
        assert measure(copy).inodes == usage.inodes == 1 + DEEP_LEVELS + DEEP_LEVELS // 100
        with open_for_copy(source) as here, open_for_copy(copy) as there:
            assert describe_deep(here) == describe_deep(there)
        delete(source)
        delete(copy)
    assert os.listdir(scratch) == []
    assert open_files() == before


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


def make_wide_directory(path: Path, names: int, inodes: int) -> None:
    """Fill a directory with ``inodes`` files; two names of one file are far apart."""
    path.mkdir()
    with open_directory(path) as fd:
        for number in range(names):
            if number < inodes:
                os.mknod(f"{number:06}", dir_fd=fd)
            else:
                first = f"{number - inodes:06}"
                os.link(first, f"{number:06}", src_dir_fd=fd, dst_dir_fd=fd)


CLONE_AND_DELETE = """
import os, sys
from snapd_native import trees
from tests.support import in_process

def ignore(*_): pass

parent = os.open(sys.argv[1], os.O_RDONLY)
os.mkdir("copy", dir_fd=parent)
target = os.open("copy", os.O_RDONLY, dir_fd=parent)
with trees.open_tree(parent, "source") as source:
    in_process.clone(source, target, ignore, reflink=False)
    print(sum(1 for _ in os.scandir(target)))
    if sys.argv[2] == "measure":
        print(in_process.measure(source, ignore).inodes)
for name in ("source", "copy"):
    trees.delete(parent, name)
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


@pytest.mark.long
def test_a_wide_directory_is_copied_in_bounded_memory(scratch: Path) -> None:
    narrow, wide = (
        peak_memory_of_clone(scratch, names, names, "measure") for names in (2000, 200_000)
    )
    assert wide - narrow < EXTRA_MEMORY


@pytest.mark.long
def test_many_hard_links_are_copied_in_bounded_memory(ext4: FileSystem) -> None:
    with scratch_on(ext4) as home:
        few, many = (peak_memory_of_clone(home, 2 * files, files) for files in (1000, 50_000))
    assert many - few < EXTRA_MEMORY


def peak_memory_of_clone(home: Path, names: int, inodes: int, *extra: str) -> int:
    """Clone and delete a directory in a separate process; return its peak memory in bytes."""
    make_wide_directory(home / "source", names, inodes)
    done = subprocess.run(
        [sys.executable, "-c", CLONE_AND_DELETE, str(home), *(extra or ["clone"])],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(snapd_native.__file__).parents[1])},
    )
    *counted, kibibytes = [int(word) for word in done.stdout.split()]
    assert counted == [names, *([inodes + 1] if extra else [])]
    assert os.listdir(home) == []
    return kibibytes << 10


@pytest.mark.parametrize("last", [1, 2, 50, 150, 400, 600])
def test_a_report_that_raises_stops_the_work_and_leaves_no_open_files(
    original: Path, scratch: Path, last: int
) -> None:
    """An exception object that the caller keeps holds no files open."""

    def step(*_: int) -> None:
        steps.append(0)
        if len(steps) == last:
            raise StoppedByReport

    clone(original, scratch / "copy")
    before = open_files()
    works: list[Callable[[], object]] = [
        lambda: measure(original, step),
        lambda: clone(original, scratch / "stopped", step),
        lambda: delete(scratch / "copy", step),
    ]
    for work in works:
        steps: list[int] = []
        with pytest.raises(StoppedByReport) as caught:
            work()
        assert len(steps) == last
        assert open_files() == before, caught
    delete(scratch / "stopped")
    delete(scratch / "copy")


def test_clone_measure_and_delete_leave_no_open_files(original: Path, scratch: Path) -> None:
    before = open_files()
    clone(original, scratch / "copy")
    measure(scratch / "copy")
    delete(scratch / "copy")
    with open_directory(scratch) as fd:
        here = open_files()
        trees.reflink_works(fd)
        assert open_files() == here
    assert open_files() == before


def test_reaching_the_limit_of_open_files_leaves_no_open_files(scratch: Path) -> None:
    source = scratch / "source"
    source.mkdir()
    with open_directory(source) as root:
        make_deep_tree(root, 100, "d")
    works: list[Callable[[Path], object]] = [
        lambda tree: clone(tree, scratch / "copy"),
        measure,
        delete,
    ]
    before = open_files()
    for work in works:
        with limit_open_files(len(before) + 30):
            with pytest.raises(OSError, match="Too many open files") as caught:
                work(source)
            assert open_files() == before, caught
    delete(source)


@pytest.mark.parametrize(("name", "size"), [("ext4", 16 << 20), ("xfs", 300 << 20)])
def test_clone_on_a_full_disk_raises_enospc_and_leaves_no_open_files(
    loop_directory: Path, name: str, size: int
) -> None:
    with new_file_system(name, size, loop_directory) as small:
        source, copy = small.root / "source", small.root / "copy"
        (source / "a" / "b").mkdir(parents=True)
        for number in range(400):
            path = source / "a" / "b" / str(number)
            path.write_bytes(b"x" * 5000)
            os.setxattr(path, "user.large", f"{number:03}".encode() * 1000)
            os.link(path, source / "a" / str(number))
        copy.mkdir()
        use_all_but_few_blocks(small.root / "ballast")
        before = open_files()
        with pytest.raises(OSError, match="No space left") as caught:
            clone(source, copy)
        assert caught.value.errno == errno.ENOSPC
        assert open_files() == before
        delete(copy)
        assert sorted(os.listdir(small.root)) == sorted(
            ["ballast", "source", *(["lost+found"] if name == "ext4" else [])]
        )


def use_all_but_few_blocks(ballast: Path) -> None:
    """Use all free space except a few blocks."""
    with ballast.open("wb") as file:
        position = 0
        # xfs frees the preallocation of growing files some time later.
        for piece in [*(1 << bits for bits in range(24, 11, -1))] * 3:
            os.sync()
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), position, piece)
                    position += piece
