"""A crew of worker processes: what one hand does right, many must do right together."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.model import Usage
from snapd_native.trees import crew as module
from tests import torture
from tests.filesystems import FileSystem, mounted


class Stopped(Exception):
    """Raised by a step, as a cancelled job does."""


@pytest.fixture(params=[1, 2, 5])
def crew(request: pytest.FixtureRequest) -> Iterator[trees.Crew]:
    with closing(trees.Crew(request.param)) as crew:
        yield crew


@contextmanager
def opened(tree: Path, *, writable: bool = False) -> Iterator[int]:
    parent = os.open(tree.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with trees.open_tree(parent, tree.name, writable=writable) as root:
            yield root
    finally:
        os.close(parent)


def clone(
    crew: trees.Crew,
    source: Path,
    target: Path,
    step: trees.Report = lambda *_: None,
    *,
    reflink: bool = False,
) -> None:
    target.mkdir()
    with opened(source) as here, opened(target, writable=True) as there:
        crew.clone(here, there, step, reflink=reflink)


def measure(crew: trees.Crew, tree: Path) -> Usage:
    with opened(tree) as root:
        return crew.measure(root, lambda *_: None)


def workers() -> list[int]:
    """Return the processes that this one has started and not yet seen the end of."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in children.split()]


def forest(root: Path, directories: int, files: int) -> None:
    """Make many directories, whose files are all names of files in other directories too."""
    (root / "first").mkdir(parents=True)
    for number in range(files):
        (root / "first" / f"file{number}").write_text(f"{number}\n" * 100)
    for number in range(directories):
        here = root / f"branch{number % 7}" / f"twig{number}"
        here.mkdir(parents=True)
        for file in range(files):
            os.link(root / "first" / f"file{file}", here / f"name{file}")
        (here / "own").write_text("own\n")


def test_the_torture_tree(crew: trees.Crew, filesystem: FileSystem, scratch: Path) -> None:
    torture.build(scratch / "tree")
    clone(crew, scratch / "tree", scratch / "copy", reflink=filesystem.reflink)
    assert torture.differences(scratch / "tree", scratch / "copy") == ""


def test_hard_links_across_workers(crew: trees.Crew, scratch: Path) -> None:
    forest(scratch / "tree", directories=300, files=5)
    for copy in (scratch / "copy", scratch / "another"):
        clone(crew, scratch / "tree", copy)
        assert torture.differences(scratch / "tree", copy) == ""


def test_one_wide_directory_is_work_for_all(crew: trees.Crew, scratch: Path) -> None:
    wide = scratch / "tree" / "wide"
    wide.mkdir(parents=True)
    for number in range(3000):
        (wide / f"file{number}").write_text(f"{number}\n")
        if number % 10 == 0:
            os.link(wide / f"file{number}", wide / f"link{number}")
            (wide / f"directory{number}").mkdir()
    # A default ACL and times tell whether anybody wrote into it after it was finished.
    subprocess.run(["setfacl", "-d", "-m", "u:1:rwx", wide], check=True)
    os.utime(wide, ns=(1, 1))
    clone(crew, scratch / "tree", scratch / "copy")
    assert torture.differences(scratch / "tree", scratch / "copy") == ""


def test_measure_is_what_du_says(crew: trees.Crew, scratch: Path) -> None:
    forest(scratch / "tree", directories=300, files=5)
    torture.build(scratch / "tree" / "torture")
    os.sync()  # what is not allocated yet may still change
    used = measure(crew, scratch / "tree")
    for unit, value in (("--block-size=1", used.size), ("--inodes", used.inodes)):
        said = subprocess.run(
            ["du", "-s", unit, scratch / "tree"], capture_output=True, text=True, check=True
        )
        assert int(said.stdout.split()[0]) == value


def test_what_is_reported_adds_up_to_the_usage(crew: trees.Crew, scratch: Path) -> None:
    forest(scratch / "tree", directories=100, files=20)
    with (scratch / "tree" / "large").open("wb") as file:
        os.truncate(file.fileno(), 80 << 20)
        os.posix_fallocate(file.fileno(), 20 << 20, 50 << 20)
    os.sync()  # what is not allocated yet may still change
    reports: list[tuple[int, int]] = []
    clone(crew, scratch / "tree", scratch / "copy", lambda *report: reports.append(report))
    reported = Usage(inodes=sum(r[0] for r in reports), size=sum(r[1] for r in reports))
    assert reported == measure(crew, scratch / "tree")
    assert min(min(report) for report in reports) >= 0


def test_a_step_that_raises_stops_all(crew: trees.Crew, scratch: Path) -> None:
    forest(scratch / "tree", directories=2000, files=5)

    def step(*_: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        clone(crew, scratch / "tree", scratch / "stopped", step)
    names = sum(len(files) for _, _, files in os.walk(scratch / "stopped"))
    assert names < 2000 * 6
    # The workers are well, and do the next job.
    clone(crew, scratch / "tree", scratch / "copy")
    assert torture.differences(scratch / "tree", scratch / "copy") == ""


def test_a_worker_that_is_killed_stops_all(scratch: Path) -> None:
    forest(scratch / "tree", directories=2000, files=5)
    with closing(trees.Crew(2)) as crew:
        before = set(workers())

        def kill(*_: int) -> None:
            os.kill(min(set(workers()) - before), signal.SIGKILL)

        with pytest.raises(ChildProcessError):
            clone(crew, scratch / "tree", scratch / "stopped", kill)
        clone(crew, scratch / "tree", scratch / "copy")
    assert torture.differences(scratch / "tree", scratch / "copy") == ""
    assert set(workers()) <= before


def test_an_idle_worker_that_was_killed_is_replaced(scratch: Path) -> None:
    (scratch / "tree").mkdir()
    before = set(workers())
    with closing(trees.Crew(2)) as crew:
        clone(crew, scratch / "tree", scratch / "first")
        victim = min(set(workers()) - before)
        ended = os.pidfd_open(victim)
        os.kill(victim, signal.SIGKILL)
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)
        for number in range(4):
            clone(crew, scratch / "tree", scratch / f"copy{number}")
        assert len(set(workers()) - before) == 2


def test_a_finding_that_never_comes_is_an_error(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends after its last task, before it tells, must not make a tree smaller."""
    forest(scratch / "tree", directories=50, files=2)
    before = set(workers())
    with closing(trees.Crew(2)) as crew:
        right = measure(crew, scratch / "tree")
        real = module._watch

        def watch(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            for pid in set(workers()) - before:
                os.kill(pid, signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_watch", watch)
            with pytest.raises(ChildProcessError):
                measure(crew, scratch / "tree")
        assert measure(crew, scratch / "tree") == right


def test_workers_end_with_the_crew(scratch: Path) -> None:
    before = set(workers())
    with closing(trees.Crew(3)) as crew:
        (scratch / "tree").mkdir()
        clone(crew, scratch / "tree", scratch / "copy")
        assert len(set(workers()) - before) == 3
    assert set(workers()) <= before


KILLED = """
import os, sys
from pathlib import Path
from snapd_native import trees
from tests.test_crew import clone, workers

def end(*_):
    print(*workers(), flush=True)
    os.kill(os.getpid(), 9)

place = Path(sys.argv[1])
crew = trees.Crew(3)
clone(crew, place / "tree", place / "copy", end if sys.argv[2] == "in a job" else lambda *_: None)
end(0)
"""


@pytest.mark.parametrize("when", ["in a job", "after it"])
def test_workers_end_when_their_crew_is_killed(scratch: Path, when: str) -> None:
    forest(scratch / "tree", directories=3000, files=5)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, scratch, when],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert process.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in process.stdout.split()]
    assert len(pids) == 3
    for pid in pids:
        with suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            try:
                # A pidfd becomes readable when the process ends.
                assert select.select([ended], [], [], 60)[0]
            finally:
                os.close(ended)


def test_many_jobs_at_once(scratch: Path) -> None:
    forest(scratch / "tree", directories=100, files=3)
    with closing(trees.Crew(2)) as crew, ThreadPoolExecutor(8) as pool:
        copies = [scratch / f"copy{number}" for number in range(16)]
        list(pool.map(lambda copy: clone(crew, scratch / "tree", copy), copies))
        used = list(pool.map(lambda copy: measure(crew, copy), copies))
    assert len({usage.inodes for usage in used}) == 1
    for copy in copies:
        assert torture.differences(scratch / "tree", copy) == ""


def test_failures_leave_no_fds_and_no_workers(scratch: Path, tmp_path: Path) -> None:
    (scratch / "tree").mkdir()
    for number in range(40):
        (scratch / "tree" / str(number)).write_bytes(os.urandom(1 << 20))
    with closing(trees.Crew(2)) as crew:
        clone(crew, scratch / "tree", scratch / "copy")
        before = len(os.listdir("/proc/self/fd")), len(workers())
        with mounted("ext4", 16 << 20, tmp_path) as small:
            (small.root / "tree").mkdir()
            for number in range(9):
                shutil.copy(scratch / "tree" / str(number), small.root / "tree")
            for _ in range(3):
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    clone(crew, small.root / "tree", small.root / "copy")
                shutil.rmtree(small.root / "copy")
        clone(crew, scratch / "tree", scratch / "another")
        assert (len(os.listdir("/proc/self/fd")), len(workers())) == before
