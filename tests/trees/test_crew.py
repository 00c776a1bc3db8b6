"""A crew of worker processes that copies and measures trees in parallel."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from snapd_native import trees
from snapd_native.model import Usage
from snapd_native.trees import crew as module
from snapd_native.trees import relay
from tests.support import PROJECT, torture_tree
from tests.support.descriptors import THIS_PROCESS, nothing_left_open, worker_pids
from tests.support.file_systems import FileSystem, long_on_xfs, new_file_system, scratch_on
from tests.support.holding import hold_at_files
from tests.support.sample_trees import StoppedByReport, clone, measure


@pytest.fixture(params=[1, 2, 5])
def crew(request: pytest.FixtureRequest) -> Iterator[trees.Crew]:
    with closing(trees.Crew(request.param)) as crew:
        yield crew


def make_forest(root: Path, directories: int, files: int) -> None:
    """Make many directories, whose files are mostly hard links to the files in `first`."""
    (root / "first").mkdir(parents=True)
    for number in range(files):
        (root / "first" / f"file{number}").write_text(f"{number}\n" * 100)
    for number in range(directories):
        here = root / f"branch{number % 7}" / f"twig{number}"
        here.mkdir(parents=True)
        for file in range(files):
            os.link(root / "first" / f"file{file}", here / f"name{file}")
        (here / "own").write_text("own\n")


@pytest.fixture(scope="module")
def large_forest(filesystem: FileSystem) -> Iterator[Path]:
    """Share a large forest among the tests, which only read it."""
    with scratch_on(filesystem) as place:
        make_forest(place / "tree", directories=2000, files=5)
        yield place / "tree"


@pytest.fixture(scope="module")
def small_forest(filesystem: FileSystem) -> Iterator[Path]:
    """Share a forest that is large enough for several workers."""
    with scratch_on(filesystem) as place:
        make_forest(place / "tree", directories=300, files=5)
        yield place / "tree"


def test_a_crew_copies_the_torture_tree_exactly(
    crew: trees.Crew, filesystem: FileSystem, scratch: Path
) -> None:
    torture_tree.build(scratch / "tree")
    clone(scratch / "tree", scratch / "copy", reflink=filesystem.reflink, by=crew)
    assert torture_tree.differences(scratch / "tree", scratch / "copy") == ""


@long_on_xfs
def test_a_crew_keeps_hard_links_across_workers(
    crew: trees.Crew, small_forest: Path, scratch: Path
) -> None:
    for copy in (scratch / "copy", scratch / "another"):
        clone(small_forest, copy, by=crew)
        assert torture_tree.differences(small_forest, copy) == ""


@long_on_xfs
def test_a_crew_copies_a_wide_directory_exactly(crew: trees.Crew, scratch: Path) -> None:
    wide = scratch / "tree" / "wide"
    wide.mkdir(parents=True)
    for number in range(3000):
        (wide / f"file{number}").write_text(f"{number}\n")
        if number % 10 == 0:
            os.link(wide / f"file{number}", wide / f"link{number}")
            (wide / f"directory{number}").mkdir()
    # A default ACL and times show whether a worker wrote to the directory after it was finished.
    subprocess.run(["setfacl", "-d", "-m", "u:1:rwx", wide], check=True)
    os.utime(wide, ns=(1, 1))
    clone(scratch / "tree", scratch / "copy", by=crew)
    assert torture_tree.differences(scratch / "tree", scratch / "copy") == ""


def test_measure_of_a_crew_agrees_with_du(crew: trees.Crew, scratch: Path) -> None:
    make_forest(scratch / "tree", directories=300, files=5)
    torture_tree.build(scratch / "tree" / "torture")
    os.sync()  # delayed allocation would still change the usage
    used = measure(scratch / "tree", by=crew)
    for unit, value in (("--block-size=1", used.size), ("--inodes", used.inodes)):
        said = subprocess.run(
            ["du", "-s", unit, scratch / "tree"], capture_output=True, text=True, check=True
        )
        assert int(said.stdout.split()[0]) == value


def test_the_reports_of_clone_add_up_to_the_usage(crew: trees.Crew, scratch: Path) -> None:
    make_forest(scratch / "tree", directories=100, files=20)
    with (scratch / "tree" / "large").open("wb") as file:
        os.truncate(file.fileno(), 80 << 20)
        os.posix_fallocate(file.fileno(), 20 << 20, 50 << 20)
    os.sync()  # delayed allocation would still change the usage
    reports: list[tuple[int, int]] = []
    clone(scratch / "tree", scratch / "copy", lambda *report: reports.append(report), by=crew)
    reported = Usage(inodes=sum(r[0] for r in reports), size=sum(r[1] for r in reports))
    assert reported == measure(scratch / "tree", by=crew)
    assert min(min(report) for report in reports) >= 0


@long_on_xfs
def test_a_report_that_raises_stops_all_workers(
    crew: trees.Crew, small_forest: Path, scratch: Path
) -> None:
    def step(*_: int) -> None:
        raise StoppedByReport

    with hold_at_files(small_forest / "branch3"), pytest.raises(StoppedByReport):
        clone(small_forest, scratch / "stopped", step, by=crew)
    assert list((scratch / "stopped" / "branch3").glob("*")) == []
    # The crew can do the next job.
    clone(small_forest, scratch / "copy", by=crew)
    assert torture_tree.differences(small_forest, scratch / "copy") == ""


def test_a_killed_worker_makes_clone_raise_child_process_error(
    small_forest: Path, scratch: Path
) -> None:
    with closing(trees.Crew(2)) as crew:
        before = set(worker_pids(THIS_PROCESS))
        killed: set[int] = set()

        def kill(*_: int) -> None:
            if not killed:
                victim = min(set(worker_pids(THIS_PROCESS)) - before)
                killed.add(victim)
                os.kill(victim, signal.SIGKILL)

        with hold_at_files(small_forest / "branch3"), pytest.raises(ChildProcessError):
            clone(small_forest, scratch / "stopped", kill, by=crew)
        clone(small_forest, scratch / "copy", by=crew)
    assert torture_tree.differences(small_forest, scratch / "copy") == ""
    assert set(worker_pids(THIS_PROCESS)) <= before


def test_a_killed_idle_worker_is_replaced(scratch: Path) -> None:
    (scratch / "tree").mkdir()
    before = set(worker_pids(THIS_PROCESS))
    with closing(trees.Crew(2)) as crew:
        clone(scratch / "tree", scratch / "first", by=crew)
        victim = min(set(worker_pids(THIS_PROCESS)) - before)
        ended = os.pidfd_open(victim)
        os.kill(victim, signal.SIGKILL)
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)
        for number in range(4):
            clone(scratch / "tree", scratch / f"copy{number}", by=crew)
        assert len(set(worker_pids(THIS_PROCESS)) - before) == 2


def test_measure_raises_when_a_worker_ends_before_it_reports(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum without a worker that was killed after its last task would be too small."""
    make_forest(scratch / "tree", directories=50, files=2)
    before = set(worker_pids(THIS_PROCESS))
    with closing(trees.Crew(2)) as crew:
        right = measure(scratch / "tree", by=crew)
        real = module._watch

        def watch(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            for pid in set(worker_pids(THIS_PROCESS)) - before:
                os.kill(pid, signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_watch", watch)
            with pytest.raises(ChildProcessError):
                measure(scratch / "tree", by=crew)
        assert measure(scratch / "tree", by=crew) == right


def test_a_failure_is_raised_when_its_worker_has_already_ended_the_job() -> None:
    """A busy crew can read several reports late, after the worker has ended the job."""
    crew, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports, to_crew = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = relay.Page.create()
    with crew, worker, reports, to_crew, closing(relay.Page(fd)) as page:
        os.close(fd)
        for what, code in ((relay.ANNOUNCED, 0), (relay.FAILED, errno.ENOSPC)):
            to_crew.send(relay.REPORT.pack(what, code))
        relay.send_finding(worker, b"")
        with subprocess.Popen(["true"]) as process:
            workers = [module._Worker(process, crew)]
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                module._watch(page, reports, workers, lambda *_: None)


def test_close_ends_the_workers_of_a_crew(scratch: Path) -> None:
    before = set(worker_pids(THIS_PROCESS))
    with closing(trees.Crew(3)) as crew:
        (scratch / "tree").mkdir()
        clone(scratch / "tree", scratch / "copy", by=crew)
        assert len(set(worker_pids(THIS_PROCESS)) - before) == 3
    assert set(worker_pids(THIS_PROCESS)) <= before


KILL_PARENT = """
import os, sys
from pathlib import Path
from snapd_native import trees
from tests.support.sample_trees import clone
from tests.support.descriptors import THIS_PROCESS, worker_pids

def end(*_):
    print(*worker_pids(THIS_PROCESS), flush=True)
    os.kill(os.getpid(), 9)

tree, copy, when = sys.argv[1:]
crew = trees.Crew(3)
step = end if when == "in a job" else lambda *_: None
clone(Path(tree), Path(copy), step, by=crew)
end(0)
"""


@pytest.mark.parametrize("when", ["in a job", "after it"])
def test_workers_end_when_their_parent_is_killed(
    large_forest: Path, scratch: Path, when: str
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", KILL_PARENT, large_forest, scratch / "copy", when],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=PROJECT,
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


@long_on_xfs
def test_a_crew_runs_many_jobs_at_once(scratch: Path) -> None:
    make_forest(scratch / "tree", directories=100, files=3)
    with closing(trees.Crew(2)) as crew, ThreadPoolExecutor(8) as pool:
        copies = [scratch / f"copy{number}" for number in range(16)]
        list(pool.map(lambda copy: clone(scratch / "tree", copy, by=crew), copies))
        used = list(pool.map(lambda copy: measure(copy, by=crew), copies))
    assert len({usage.inodes for usage in used}) == 1
    for copy in copies:
        assert torture_tree.differences(scratch / "tree", copy) == ""


def test_failed_copies_leak_no_descriptors_and_no_workers(scratch: Path, tmp_path: Path) -> None:
    (scratch / "tree").mkdir()
    for number in range(40):
        (scratch / "tree" / str(number)).write_bytes(os.urandom(1 << 20))
    with closing(trees.Crew(2)) as crew:
        clone(scratch / "tree", scratch / "copy", by=crew)
        there = len(worker_pids(THIS_PROCESS))
        with (
            nothing_left_open(THIS_PROCESS),
            new_file_system("ext4", 16 << 20, tmp_path) as small_forest,
        ):
            (small_forest.root / "tree").mkdir()
            for number in range(9):
                shutil.copy(scratch / "tree" / str(number), small_forest.root / "tree")
            for _ in range(3):
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    clone(small_forest.root / "tree", small_forest.root / "copy", by=crew)
                shutil.rmtree(small_forest.root / "copy")
        clone(scratch / "tree", scratch / "another", by=crew)
        assert len(worker_pids(THIS_PROCESS)) == there
