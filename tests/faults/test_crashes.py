"""A call that is killed before any of its steps is complete or undone."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from snapd_native.model import Kind
from snapd_native.mounts import Table
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import opened
from tests.support.file_systems import long_on_xfs
from tests.support.kernel_mounts import below
from tests.support.kill_points import CASES, Case, Course, Deaths, Order, Point

Entry = tuple[str, int, int, str]
"""A path in a tree: its mode, its number of hard links (1 for a directory), and its content."""

AT_REST: Point = ("MainThread", 1)
"""The point before the first step of the calling thread."""


@dataclass
class Portrait:
    """The snapshots and the mounts of an engine."""

    snapshots: dict[str, tuple[Kind, str, dict[str, str], list[Entry]]]
    mounts: list[tuple[str, str, bool]]
    """The target and the key of each listed mount, and whether the kernel has it read-only."""


@pytest.fixture(scope="module")
def deaths() -> Iterator[Deaths]:
    with Deaths() as server:
        yield server


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def template(scratch: Path) -> Path:
    """Return a state directory in which every call has work to do."""
    template = scratch / "template"
    with opened(template) as engine:
        tree = Path(engine.prepare("preparing").source)
        (tree / "directory").mkdir(mode=0o750)
        (tree / "directory" / "file").write_text("base")
        os.chown(tree / "directory" / "file", 7, 8)
        os.setxattr(tree / "directory" / "file", "user.of", b"base")
        os.link(tree / "directory" / "file", tree / "linked")
        os.symlink("nowhere", tree / "link")
        os.mkfifo(tree / "fifo")
        with (tree / "holes").open("wb") as file:
            file.truncate(1 << 20)
        engine.commit("base", "preparing", {"of": "base"})
        engine.prepare("work", "base", {"of": "work"})
        engine.view("look", "base")
        lone = Path(engine.prepare("lone").source)
        (lone / "directory").mkdir()
        (lone / "directory" / "file").write_text("lone")
    return template


class Runs:
    """Runs of one case, each on a fresh copy of the same state."""

    def __init__(self, deaths: Deaths, template: Path, name: str) -> None:
        self._deaths = deaths
        self._template = template
        self._name = name
        self.case: Case = CASES[name]
        self.directory = template.parent / "now"
        self.place = self.directory / "place"

    def run(self, kill: Point | None) -> Course:
        """Run the case until it ends or is killed before the step ``kill``."""
        subprocess.run(["rm", "-rf", str(self.directory)], check=True)
        self.place.mkdir(parents=True)
        state = self.directory / "state"
        subprocess.run(["cp", "-a", str(self._template), str(state)], check=True)
        self.case.spoil(state)
        return self._deaths.follow(Order(self._name, str(self.directory), kill))

    def end(self) -> None:
        for target in reversed(below(self.directory)):
            subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("name", CASES)
@long_on_xfs
def test_a_call_killed_at_any_step_is_complete_or_undone(
    deaths: Deaths, template: Path, name: str
) -> None:
    runs = Runs(deaths, template, name)
    whole = runs.run(None)
    assert (whole.status, whole.answered) == (0, True)
    with recovered(runs) as engine:
        after = portrait(engine)
    runs.run(AT_REST)
    with recovered(runs) as engine:
        before = portrait(engine)
    happened: dict[str, list[bool]] = {}
    for point, step in whole.points.items():
        course = runs.run(point)
        assert course.status == -signal.SIGKILL, f"{step!r} did not come"
        with recovered(runs) as engine:
            found = portrait(engine)
            at = f"killed before {step!r} of {point[0]}"
            assert found in ([after] if course.answered else [before, after]), at
            assert engine.upkeep.check() == [], at
            happened.setdefault(point[0], []).append(found == after)
            if found != after:
                runs.case.call(engine, runs.place)
                assert portrait(engine) == after, f"called again after it was {at}"
    if before != after:
        # The call takes effect at one step. A kill before that undoes it, and a later one does not.
        course_of_call = happened["MainThread"]
        assert course_of_call == sorted(course_of_call)


class recovered:  # noqa: N801 - read as the function it stands for
    """The engine of the next start; at the end of the block everything is unmounted."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._opened = opened(runs.directory / "state")

    def __enter__(self) -> Snapshotter:
        return self._opened.__enter__()

    def __exit__(self, *error: object) -> None:
        self._runs.end()
        self._opened.__exit__(None, None, None)


def portrait(engine: Snapshotter) -> Portrait:
    """Return the snapshots and mounts; check that the engine, the disk and the kernel agree."""
    engine.upkeep.cleanup()
    snapshots = {}
    directories = set()
    for info in engine.list():
        assert info.created <= info.updated
        tree = engine.state_directory / "snapshots" / str(engine._store.get(info.name).tree_id)
        directories.add(tree.name)
        snapshots[info.name] = (info.kind, info.parent, dict(info.labels), [*entries(tree)])
    # A standby clone belongs to no snapshot yet, and can be incomplete. Its name is no number.
    there = {name for name in os.listdir(engine.state_directory / "snapshots") if name.isdigit()}
    assert there == directories
    table = {entry.target: entry for entry in Table.read()}
    listed = engine.mounter.list_mounts()
    mounts = [(m.target, m.key, table[m.target].read_only) for m in listed]
    assert sorted(target for target, *_ in mounts) == sorted(below(engine.state_directory.parent))
    assert [read_only for *_, read_only in mounts] == [m.read_only for m in listed]
    return Portrait(snapshots, mounts)


def entries(tree: Path) -> Iterator[Entry]:
    """Yield an entry for the tree itself and for everything in it."""
    for path in [tree, *sorted(tree.rglob("*"))]:
        status = path.lstat()
        content = ""
        if stat.S_ISREG(status.st_mode):
            xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            digest = sha256(path.read_bytes()).hexdigest()
            content = f"{digest} {xattrs} {status.st_uid}:{status.st_gid}"
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        names = 1 if path.is_dir() else status.st_nlink
        yield str(path.relative_to(tree)), status.st_mode, names, content
