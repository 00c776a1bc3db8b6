"""Engines for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.model import Change, Info, Mount
from snapd_native.snapshotter import Snapshotter
from tests.support import PROJECT
from tests.support.in_process import without_workers
from tests.support.waiting import WAIT

BEFORE = ["base", "lone", "look", "work"]
"""The names of the snapshots that `fill` makes."""


def ignore(_: Change) -> None:
    """Ignore changes."""


@contextmanager
def opened(state: Path, announce: Callable[[Change], None] = ignore) -> Iterator[Snapshotter]:
    with closing(Snapshotter(state, announce, runtime=state.parent / "run")) as made:
        yield made


@pytest.fixture
def state(scratch: Path) -> Path:
    return scratch / "state"


@pytest.fixture
def engine(state: Path) -> Iterator[Snapshotter]:
    with opened(state) as made:
        yield made


def fill(engine: Snapshotter) -> None:
    """Make the committed `base`, then `work` and `look` from it, and `lone` without a parent."""
    # No workers are started here: the first test that needs workers starts them.
    with without_workers():
        write(engine.prepare("preparing"), file="base", other="more")
        engine.commit("base", "preparing", {"of": "base"})
        engine.prepare("work", "base", {"of": "work", "dotted.key/x": "old"})
        engine.view("look", "base")
        engine.prepare("lone")


@pytest.fixture
def full(engine: Snapshotter) -> Snapshotter:
    fill(engine)
    return engine


@pytest.fixture
def left(state: Path) -> Path:
    """Return a filled state directory that no engine has open."""
    with opened(state) as engine:
        fill(engine)
    return state


def grow(engine: Snapshotter, name: str, files: int) -> None:
    """Commit a snapshot with many files, a hundred in each directory."""
    root = Path(engine.prepare("growing").source)
    for number in range(files):
        directory = root / str(number // 100)
        directory.mkdir(exist_ok=True)
        (directory / str(number)).touch()
    engine.commit(name, "growing")


def write(mount: Mount, **files: str) -> None:
    for name, content in files.items():
        (Path(mount.source) / name).write_text(content)


def read(mount: Mount) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(mount.source).iterdir()}


def names(engine: Snapshotter) -> list[str]:
    return [info.name for info in engine.list()]


def directories(engine: Snapshotter) -> set[str]:
    return set(os.listdir(engine.state_directory / "snapshots"))


def state_of(engine: Snapshotter) -> tuple[set[str], list[Info], set[int]]:
    """Return everything that a failed call must not change."""
    return directories(engine), engine.list(), engine._store.reserved()


def identity(engine: Snapshotter, key: str) -> str:
    return str(engine._store.get(key).id)


class Gate:
    """Blocks calls of a function until the gate is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(WAIT)

    def open(self) -> None:
        self.opened.set()


@contextmanager
def gated(name: str) -> Iterator[Gate]:
    """Block the calls of a function of `trees`, or of a method of `trees.Crew`."""
    owner = trees.Crew if hasattr(trees.Crew, name) else trees
    gate, real = Gate(), getattr(owner, name)

    def wait(*arguments: object, **options: object) -> object:
        gate.reached.set()
        assert gate.opened.wait(WAIT)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wait)
        try:
            yield gate
        finally:
            gate.open()


def fail(code: int) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "/a/path/of/the/service")

    return failing


def kill_where_it_stands(program: str, *arguments: str | Path) -> None:
    """Run a program with an engine until it prints ``there``, then kill it."""
    command = [sys.executable, "-c", program, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=PROJECT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "there\n"
        finally:
            process.kill()
        assert process.wait(WAIT) == -signal.SIGKILL
