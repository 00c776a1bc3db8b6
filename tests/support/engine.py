"""Engines for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from snapd_native.model import Change, Info, Mount
from snapd_native.private import temporary_state
from snapd_native.snapshotter import Snapshotter
from tests.support import PROJECT
from tests.support.in_process import without_workers
from tests.support.waiting import WAIT_TIMEOUT

POPULATED_NAMES = ["base", "lone", "look", "work"]
"""The names of the snapshots that `populate` makes."""


def ignore_change(_: Change) -> None:
    """Ignore changes."""


@contextmanager
def open_engine(
    state: Path, announce: Callable[[Change], None] = ignore_change
) -> Iterator[Snapshotter]:
    with closing(Snapshotter(state, announce, runtime=state.parent / "run")) as made:
        yield made


@pytest.fixture
def state(scratch: Path) -> Path:
    return scratch / "state"


@pytest.fixture
def host_state(tmp_path: Path) -> Iterator[Path]:
    """Yield the path of a state directory on the host's own file system."""
    with temporary_state(tmp_path) as path:
        yield path


@pytest.fixture
def engine(state: Path) -> Iterator[Snapshotter]:
    with open_engine(state) as made:
        yield made


def populate(engine: Snapshotter) -> None:
    """Make the committed `base`, then `work` and `look` from it, and `lone` without a parent."""
    # No workers are started here: the first test that needs workers starts them.
    with without_workers():
        write_files(engine.prepare("preparing"), file="base", other="more")
        engine.commit("base", "preparing", {"of": "base"})
        engine.prepare("work", "base", {"of": "work", "dotted.key/x": "old"})
        engine.view("look", "base")
        engine.prepare("lone")


@pytest.fixture
def populated(engine: Snapshotter) -> Snapshotter:
    populate(engine)
    return engine


@pytest.fixture
def populated_state(state: Path) -> Path:
    """Return a filled state directory that no engine has open."""
    with open_engine(state) as engine:
        populate(engine)
    return state


def commit_many_files(engine: Snapshotter, name: str, files: int) -> None:
    """Commit a snapshot with many files, a hundred in each directory."""
    root = Path(engine.prepare("growing").source)
    for number in range(files):
        directory = root / str(number // 100)
        directory.mkdir(exist_ok=True)
        (directory / str(number)).touch()
    engine.commit(name, "growing")


def write_files(mount: Mount, **files: str) -> None:
    for name, content in files.items():
        (Path(mount.source) / name).write_text(content)


def read_files(mount: Mount) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(mount.source).iterdir()}


def snapshot_names(engine: Snapshotter) -> list[str]:
    return [info.name for info in engine.list()]


def directories(engine: Snapshotter) -> set[str]:
    return set(os.listdir(engine.state_directory / "snapshots"))


def state_of(engine: Snapshotter) -> tuple[set[str], list[Info], set[int]]:
    """Return everything that a failed call must not change."""
    return directories(engine), engine.list(), engine._store.reserved()


def id_of(engine: Snapshotter, key: str) -> str:
    return str(engine._store.get(key).id)


def failing_function(code: int) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "/a/path/of/the/service")

    return failing


def run_until_reached_and_kill(program: str, *arguments: str | Path) -> None:
    """Run a program with an engine until it prints ``reached``, then kill it."""
    command = [sys.executable, "-c", program, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=PROJECT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "reached\n"
        finally:
            process.kill()
        assert process.wait(WAIT_TIMEOUT) == -signal.SIGKILL
