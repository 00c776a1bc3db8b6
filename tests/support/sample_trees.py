"""Trees for tests, and the calls that tests make on them."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pytest

from snapd_native import trees
from snapd_native.model import Usage
from tests.support import in_process, torture_tree
from tests.support.file_systems import FileSystem

LEVELS = 2000
"""The number of nested directories in a deep tree. A path to the last exceeds PATH_MAX by far."""

MEMORY = 4 << 20
"""Bytes of memory that a process may need more for a wide directory than for a narrow one."""


class Stopped(Exception):
    """Raised by a step, as a cancelled job raises an error."""


def ignore(*_: int) -> None:
    """Ignore the progress."""


@contextmanager
def directory(path: Path) -> Iterator[int]:
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
def opened(tree: Path, *, writable: bool = False) -> Iterator[int]:
    """Open a tree as the service does before it copies it."""
    with (
        directory(tree.parent) as parent,
        trees.open_tree(parent, tree.name, writable=writable) as root,
    ):
        yield root


def clone(
    source: Path,
    target: Path,
    step: trees.Report = ignore,
    *,
    reflink: bool = False,
    by: Copier = in_process,
) -> None:
    """Make ``target`` a copy of ``source``; ``step`` is called for every entry."""
    target.mkdir(exist_ok=True)
    with opened(source) as here, opened(target, writable=True) as there:
        by.clone(here, there, step, reflink=reflink)


def measure(tree: Path, step: trees.Report = ignore, *, by: Copier = in_process) -> Usage:
    """Return the usage of a tree; ``step`` is called for every entry."""
    with opened(tree) as root:
        return by.measure(root, step)


def delete(tree: Path, step: trees.Report = ignore) -> None:
    with directory(tree.parent) as parent:
        trees.delete(parent, tree.name, step)


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
    torture_tree.build(path)
    os.sync()
    return path


def make_deep(root: int, levels: int, name: str) -> None:
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
