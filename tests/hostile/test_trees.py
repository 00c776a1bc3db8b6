"""Trees that are built to break calls, and trees that change while they are read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native import linux
from snapd_native.client import BlockingClient
from snapd_native.errors import DataLoss, FailedPrecondition, SnapdError
from snapd_native.model import DIGEST_LABEL
from snapd_native.snapshotter import Snapshotter
from tests.support import PROJECT
from tests.support.canary import canary, contains_secret
from tests.support.commands import run_command
from tests.support.descriptors import worker_pids
from tests.support.engine import directories, open_engine
from tests.support.file_systems import FileSystem, long_on_xfs, new_file_system, scratch_on
from tests.support.raw_client import peak_memory
from tests.support.sample_trees import make_deep_tree, open_directory
from tests.support.service import run_daemon

Build = Callable[[Path, Path], object]
"""Fills the tree that is its first argument; the second is a directory outside of the tree."""


@pytest.fixture
def outside(scratch: Path) -> Iterator[Path]:
    with canary(scratch / "outside") as path:
        yield path


def make_links(root: Path, outside: Path) -> None:
    targets = ["/", "..", "../..", ".", "nowhere", "/proc/self/root", "/dev/zero", "l" * 1000]
    targets += [str(outside / name) for name in ("", "secret", "fifo", "directory")]
    targets += [os.path.relpath(outside / "secret", root), "to itself"]
    for number, target in enumerate(targets):
        (root / f"{number}").symlink_to(target)
    (root / "to itself").symlink_to("to itself")


def make_special_files(root: Path, _: Path) -> None:
    """Make special files; to open one can block or have an effect."""
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    for number, minor in enumerate((1, 3, 5, 7, 8, 9, 11)):
        os.mknod(root / f"character {number}", stat.S_IFCHR | 0o600, os.makedev(1, minor))
    os.mknod(root / "terminal", stat.S_IFCHR | 0o600, os.makedev(5, 0))
    os.mknod(root / "watchdog", stat.S_IFCHR | 0o600, os.makedev(10, 130))
    for minor in (0, 1):
        os.mknod(root / f"block {minor}", stat.S_IFBLK | 0o600, os.makedev(7, minor))


def make_odd_names(root: Path, _: Path) -> None:
    for name in (b"\xff" * 255, b"\n" * 255, "ü".encode() * 127, b"-", b"~", b"\\", b"a\x80\xfe"):
        path = root / os.fsdecode(name)
        path.mkdir()
        (path / os.fsdecode(name)).write_bytes(name)
        os.link(path / os.fsdecode(name), path / os.fsdecode(name[:-1] or b"x"))


def make_deep(root: Path, _: Path) -> None:
    with open_directory(root) as fd:
        make_deep_tree(fd, 3000, "d" * 255)


def make_protected(root: Path, _: Path) -> None:
    for flag in "ia":
        (root / flag / "below").mkdir(parents=True)
        for name in ("file", "below/file"):
            (root / flag / name).write_text(name)
            run_command("chattr", f"+{flag}", root / flag / name)
        for path in (root / flag / "below", root / flag):
            run_command("chattr", f"+{flag}", path)
    run_command("chattr", "+i", root)


def make_huge_file(root: Path, _: Path) -> None:
    """Make a sparse file of the largest size, with a byte at both ends and in the middle."""
    size = {"xfs": (1 << 63) - 1, "ext4": (1 << 44) - 4096}[type_of(root)]
    with (root / "file").open("wb") as file:
        file.truncate(size)
        for position in (0, size // 2, size - 1):
            os.pwrite(file.fileno(), b"x", position)


def make_large_attributes(root: Path, _: Path) -> None:
    """Give a file and a directory many extended attributes, and a large one."""
    large, many = {"xfs": (65536, 200), "ext4": (1000, 10)}[type_of(root)]
    (root / "file").touch()
    (root / "directory").mkdir()
    for path in (root / "file", root / "directory"):
        os.setxattr(path, "user.large", b"x" * large)
        for number in range(many):
            os.setxattr(path, f"user.{number:03}{'n' * 200}", str(number).encode())


def make_hard_links(root: Path, _: Path) -> None:
    """Give a file the most hard links that ext4 allows, or more than 16 bits count on xfs."""
    (root / "0").write_text("0")
    with open_directory(root) as fd:
        for number in range(1, {"xfs": 66_000, "ext4": 65_000}[type_of(root)]):
            os.link("0", str(number), src_dir_fd=fd, dst_dir_fd=fd)


def type_of(path: Path) -> str:
    with open_directory(path) as fd:
        return linux.filesystem_type(fd)


@pytest.mark.parametrize(
    "build",
    [
        *(
            make_links,
            make_special_files,
            make_odd_names,
            make_deep,
            make_protected,
            make_huge_file,
            make_large_attributes,
        ),
        pytest.param(make_hard_links, marks=pytest.mark.long),
    ],
)
@long_on_xfs
def test_hostile_trees_can_be_committed_copied_verified_and_removed(
    engine: Snapshotter, outside: Path, build: Build
) -> None:
    """Two copies are verified against the digest of the original."""
    root = Path(engine.prepare("making").source)
    build(root, outside)
    usage = engine.usage("making")
    engine.commit("base", "making", digest=True)
    assert engine.usage("base") == usage
    engine.upkeep.verify("base")
    for key in ("copy", "again"):
        engine.prepare(key, "base")
        assert engine.usage(key).inodes == usage.inodes
        engine.commit(f"{key} of it", key, {DIGEST_LABEL: digest_of(engine)})
    for name in ("copy of it", "again of it", "base"):
        engine.upkeep.verify(name)
        engine.remove(name)
    engine.upkeep.cleanup()
    assert directories(engine) == set()
    assert engine.upkeep.check() == []


def digest_of(engine: Snapshotter) -> str:
    return engine.stat("base").labels[DIGEST_LABEL]


@contextmanager
def run_mutator(top: Path, outside: Path, seed: int) -> Iterator[Callable[[], object]]:
    """Run a process that changes the trees in ``top`` during the block.

    Yield a function that waits for the first change.
    """
    command = [
        sys.executable,
        "-m",
        "tests.support.tree_mutator",
        str(top),
        str(outside),
        str(seed),
    ]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield process.stdout.readline
        finally:
            process.kill()


def make_changing_files(root: Path) -> None:
    """Make the files that the mutator changes."""
    for outer in range(4):
        for inner in range(4):
            place = root / f"d{outer}" / f"d{inner}"
            place.mkdir(parents=True)
            for number in range(40):
                (place / str(number)).write_bytes(b"m" * 3000 * number)


@contextmanager
def accept_documented_errors() -> Iterator[None]:
    """Accept the errors that a call on a changing tree may raise."""
    with suppress(FailedPrecondition, DataLoss):
        yield


@long_on_xfs
@pytest.mark.parametrize("rounds", [2, pytest.param(6, marks=pytest.mark.long)])
def test_calls_on_changing_trees_never_copy_files_from_outside(
    engine: Snapshotter, outside: Path, rounds: int, run_seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The trees of active snapshots, of committed ones and of deletions change."""
    make_changing_files(Path(engine.prepare("making").source))
    engine.commit("base", "making", digest=True)
    with run_mutator(engine.state_directory / "snapshots", outside, run_seed) as await_change:
        engine.prepare("waiting", "base")
        assert await_change()
        engine.remove("waiting")
        for number in range(rounds):
            with accept_documented_errors():
                engine.upkeep.verify("base")
            key = f"work {number}"
            with accept_documented_errors():
                engine.prepare(key, "base")
                for _ in range(3):
                    with accept_documented_errors():
                        engine.usage(key)
                with accept_documented_errors():
                    engine.commit(f"done {number}", key, digest=bool(number % 2))
            for name in (key, f"done {number}"):
                with suppress(SnapdError):
                    engine.stat(name)
                    engine.remove(name)
            with accept_documented_errors():
                engine.upkeep.cleanup()
    assert not contains_secret(engine.state_directory / "snapshots")
    engine.remove("base")
    engine.upkeep.cleanup()
    assert directories(engine) == set()
    assert engine.upkeep.check() == []
    assert [record for record in caplog.records if record.exc_info] == []


ENTRIES = int(os.environ.get("SNAPD_NATIVE_WIDE", "100000"))
"""The number of entries in one directory. It is an environment variable to try a million."""

MAX_WORKER_MEMORY = 48 << 20
"""Maximum memory of a worker, in bytes."""


@pytest.mark.timeout(300 + ENTRIES // 100)
@pytest.mark.parametrize("name", ["ext4", "xfs"])
@pytest.mark.long
def test_a_wide_directory_does_not_grow_the_memory_of_daemon_and_workers(
    loop_directory: Path, on_bus: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a digest needs memory for each entry, because it sorts the names."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        seconds[what] = time.monotonic() - begun

    with (
        new_file_system(name, (2 << 30) + ENTRIES * (24 << 10), loop_directory) as disk,
        run_daemon(on_bus, disk.root / "state") as service,
        BlockingClient() as client,
    ):
        wide = Path(client.prepare("making").source) / "wide"
        wide.mkdir()
        with open_directory(wide) as fd:
            for number in range(ENTRIES):
                os.mknod(str(number), dir_fd=fd)
        before = peak_memory(service.pid)
        with timed("commit"):
            client.commit("base", "making")
        with timed("prepare"):
            client.prepare("copy", "base")
        assert client.usage("copy").inodes == client.usage("base").inodes == ENTRIES + 2
        workers = worker_pids(service)
        assert len(workers) <= len(os.sched_getaffinity(0))
        memory = max(map(peak_memory, workers))
        assert memory < MAX_WORKER_MEMORY
        with timed("commit with digest"):
            client.commit("done", "copy", digest=True)
        with timed("verify"):
            client.verify("done")
        digesting = max(map(peak_memory, worker_pids(service)))
        assert digesting < MAX_WORKER_MEMORY + 300 * ENTRIES
        with timed("remove and cleanup"):
            client.remove("done")
            client.cleanup()
        client.remove("base")
        client.cleanup()
        assert peak_memory(service.pid) - before < 16 << 20
        assert service.directories() == []
        figures = ", ".join(f"{what} {taken:.1f} s" for what, taken in seconds.items())
        if "SNAPD_NATIVE_WIDE" in os.environ:
            with capsys.disabled():
                print(
                    f"\n{name}, {ENTRIES} entries: {figures};"
                    f" daemon {peak_memory(service.pid) >> 20} MiB, worker {memory >> 20} MiB,"
                    f" with digest {digesting >> 20} MiB"
                )


def test_too_many_extended_attributes_raise_failed_precondition(xfs: FileSystem) -> None:
    """A file on xfs can have them, but they cannot be copied. The user must remove some."""
    with scratch_on(xfs) as scratch, open_engine(scratch / "state") as engine:
        path = Path(engine.prepare("making").source) / "file"
        path.touch()
        for number in range(300):
            os.setxattr(path, f"user.{number:03}{'n' * 240}", b"")
        with pytest.raises(FailedPrecondition, match="extended attributes"):
            engine.commit("base", "making", digest=True)
        engine.commit("base", "making")
        with pytest.raises(FailedPrecondition, match="extended attributes"):
            engine.prepare("key", "base")
        engine.remove("base")
        engine.upkeep.cleanup()
        assert directories(engine) == set()
