"""Trees for tests, and the calls that tests make on them."""

from __future__ import annotations

import gc
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pytest

from snapd_native import trees
from snapd_native.model import Usage
from tests.support import in_process, torture_tree
from tests.support.commands import run_command
from tests.support.file_systems import FileSystem

DEEP_LEVELS = 2000
"""The number of nested directories in a deep tree. A path to the last exceeds PATH_MAX by far."""

EXTRA_MEMORY = 4 << 20
"""Bytes by which the memory for a wide directory may exceed the memory for a narrow one."""


class StoppedByReport(Exception):
    """Raised by a step, as a cancelled job raises an error."""


def ignore_progress(*_: int) -> None:
    """Ignore the progress."""


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


class Copier(Protocol):
    """Clones and measures trees: a crew of workers, or `in_process`."""

    def clone(self, source: int, target: int, report: trees.Report, *, reflink: bool) -> None: ...

    def measure(self, root: int, report: trees.Report) -> Usage: ...


@contextmanager
def open_for_copy(tree: Path, *, writable: bool = False) -> Iterator[int]:
    """Open a tree as the service does before it copies it."""
    with (
        open_directory(tree.parent) as parent,
        trees.open_tree(parent, tree.name, writable=writable) as root,
    ):
        yield root


def clone(
    source: Path,
    target: Path,
    report: trees.Report = ignore_progress,
    *,
    reflink: bool = False,
    by: Copier = in_process,
) -> None:
    """Make ``target`` a copy of ``source``; ``report`` is called for every entry."""
    target.mkdir(exist_ok=True)
    with open_for_copy(source) as here, open_for_copy(target, writable=True) as there:
        by.clone(here, there, report, reflink=reflink)


def measure(
    tree: Path, report: trees.Report = ignore_progress, *, by: Copier = in_process
) -> Usage:
    """Return the usage of a tree; ``report`` is called for every entry."""
    with open_for_copy(tree) as root:
        return by.measure(root, report)


def delete(tree: Path, report: trees.Report = ignore_progress) -> None:
    with open_directory(tree.parent) as parent:
        trees.delete(parent, tree.name, report)


def open_files() -> dict[str, str]:
    """Return the targets of this process's descriptors, without the one that lists them."""
    # Unreachable files could be closed at any time, so they are closed first.
    gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextmanager
def limit_open_files(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def mount_in_block(*arguments: str | Path) -> Iterator[None]:
    """Run mount(8); the mount must still exist at the end of the block, and is unmounted."""
    run_command("mount", *arguments)
    try:
        yield
    finally:
        run_command("umount", arguments[-1])


@pytest.fixture(scope="module")
def original(filesystem: FileSystem) -> Path:
    """Share one torture tree among the tests that only read it."""
    path = Path(tempfile.mkdtemp(prefix="original", dir=filesystem.root))
    torture_tree.build(path)
    os.sync()
    return path


def make_deep_tree(root: int, levels: int, name: str) -> None:
    """Make ``levels`` nested directories, with a hard link to one file in every hundredth."""
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
