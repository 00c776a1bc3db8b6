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
from tests.support.engine import open_engine
from tests.support.file_systems import long_on_xfs
from tests.support.kernel_mounts import mounts_below
from tests.support.kill_points import CASES, Case, KillClient, KillOrder, KillPoint, Outcome
from tests.support.sealing import copy_state, unsealed

Entry = tuple[str, int, int, str]
"""A path in a tree: its mode, its number of hard links (1 for a directory), and its content."""

BEFORE_FIRST_STEP: KillPoint = ("MainThread", 1)
"""The point before the first step of the calling thread."""


@dataclass
class Contents:
    """The snapshots and the mounts of an engine."""

    snapshots: dict[str, tuple[Kind, str, dict[str, str], list[Entry]]]
    mounts: list[tuple[str, str, bool]]
    """The target and the key of each listed mount, and whether the kernel has it read-only."""


@pytest.fixture(scope="module")
def kill_client() -> Iterator[KillClient]:
    with KillClient() as server:
        yield server


pytestmark = pytest.mark.usefixtures("no_workers")


@pytest.fixture
def template_state(scratch: Path) -> Path:
    """Return a state directory in which every call has work to do."""
    template_state = scratch / "template"
    with open_engine(template_state) as engine:
        tree = Path(engine.prepare("preparing").source)
        (tree / "directory").mkdir(mode=0o750)
        (tree / "directory" / "file").write_text("base")
        os.chown(tree / "directory" / "file", 7, 8)
        os.setxattr(tree / "directory" / "file", "user.of", b"base")
        os.link(tree / "directory" / "file", tree / "linked")
        os.symlink("nowhere", tree / "link")
        os.mkfifo(tree / "fifo")
        with (tree / "holes").open("wb") as file:
            file.truncate(1 << 17)
        engine.commit("base", "preparing", {"of": "base"})
        engine.prepare("work", "base", {"of": "work"})
        engine.view("look", "base")
        lone = Path(engine.prepare("lone").source)
        (lone / "directory").mkdir()
        (lone / "directory" / "file").write_text("lone")
    return template_state


class CaseRuns:
    """Runs of one case, each on a fresh copy of the same state."""

    def __init__(self, kill_client: KillClient, template_state: Path, name: str) -> None:
        self._kill_client = kill_client
        self._template = template_state
        self._name = name
        self.case: Case = CASES[name]
        self.directory = template_state.parent / "now"
        self.place = self.directory / "place"

    def run(self, kill: KillPoint | None) -> Outcome:
        """Run the case until it ends or is killed before the step ``kill``."""
        subprocess.run(["rm", "-rf", unsealed(self.directory)], check=True)
        self.place.mkdir(parents=True)
        state = self.directory / "state"
        copy_state(self._template, state)
        self.case.damage(state)
        return self._kill_client.execute(KillOrder(self._name, str(self.directory), kill))

    def end(self) -> None:
        for target in reversed(mounts_below(self.directory)):
            subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("name", CASES)
@long_on_xfs
def test_a_call_killed_at_any_step_is_complete_or_undone(
    kill_client: KillClient, template_state: Path, name: str
) -> None:
    runs = CaseRuns(kill_client, template_state, name)
    complete = runs.run(None)
    assert (complete.status, complete.answered) == (0, True)
    with recover(runs) as engine:
        after = contents_of(engine)
    runs.run(BEFORE_FIRST_STEP)
    with recover(runs) as engine:
        before = contents_of(engine)
    happened: dict[str, list[bool]] = {}
    for point, step in complete.points.items():
        outcome = runs.run(point)
        assert outcome.status == -signal.SIGKILL, f"{step!r} was not reached"
        with recover(runs) as engine:
            found = contents_of(engine)
            at = f"killed before {step!r} of {point[0]}"
            assert found in ([after] if outcome.answered else [before, after]), at
            assert engine.upkeep.check() == [], at
            happened.setdefault(point[0], []).append(found == after)
            if found != after:
                runs.case.call(engine, runs.place)
                assert contents_of(engine) == after, f"called again after it was {at}"
    if before != after:
        # The call takes effect at one step. A kill before that undoes it, and a later one does not.
        took_effect = happened["MainThread"]
        assert took_effect == sorted(took_effect)


class recover:  # noqa: N801 - read as the function it stands for
    """The engine of the next start; at the end of the block everything is unmounted."""

    def __init__(self, runs: CaseRuns) -> None:
        self._runs = runs
        self._opened = open_engine(runs.directory / "state")

    def __enter__(self) -> Snapshotter:
        return self._opened.__enter__()

    def __exit__(self, *error: object) -> None:
        self._runs.end()
        self._opened.__exit__(None, None, None)


def contents_of(engine: Snapshotter) -> Contents:
    """Return the snapshots and mounts; check that the engine, the disk and the kernel agree."""
    engine.upkeep.cleanup()
    snapshots = {}
    directories = set()
    for info in engine.list():
        assert info.created <= info.updated
        tree = engine.state_directory / "snapshots" / str(engine._store.get(info.name).tree_id)
        directories.add(tree.name)
        snapshots[info.name] = (info.kind, info.parent, dict(info.labels), [*entries_of(tree)])
    # A standby clone belongs to no snapshot yet, and can be incomplete. Its name is no number.
    there = {name for name in os.listdir(engine.state_directory / "snapshots") if name.isdigit()}
    assert there == directories
    table = {entry.target: entry for entry in Table.read()}
    listed = engine.mounter.list_mounts()
    mounts = [(m.target, m.key, table[m.target].read_only) for m in listed]
    assert sorted(target for target, *_ in mounts) == sorted(
        mounts_below(engine.state_directory.parent)
    )
    assert [read_only for *_, read_only in mounts] == [m.read_only for m in listed]
    return Contents(snapshots, mounts)


def entries_of(tree: Path) -> Iterator[Entry]:
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
