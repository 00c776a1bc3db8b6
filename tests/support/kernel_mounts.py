"""Helpers for mounts of the kernel."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native.mounts import Entry, Table
from snapd_native.snapshotter import Snapshotter


def mounted_on(path: Path | str) -> Entry | None:
    """Return the last mount on a directory, as the kernel lists it."""
    found = None
    for entry in Table.read():
        if entry.target == str(path):
            found = entry
    return found


def below(path: Path) -> list[str]:
    """Return where something is mounted below a directory, in its order."""
    return [entry.target for entry in Table.read() if entry.target.startswith(f"{path}/")]


def writable(path: Path) -> bool:
    """Tell whether a file can be made in a directory; one is, called ``new``."""
    try:
        (path / "new").write_text("text")
    except OSError as error:
        return error.errno != errno.EROFS
    return True


def propagation(path: Path | str) -> list[str]:
    """Return what the kernel says of a mount's propagation; nothing if it is private."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(path):
            return fields[6 : fields.index("-")]
    raise AssertionError(f"nothing is mounted on {path}")


@contextmanager
def by_hand(*arguments: str | Path) -> Iterator[Path]:
    """Run mount(8), and unmount the last of ``arguments`` in the end."""
    subprocess.run(["mount", *map(str, arguments)], check=True)
    target = Path(arguments[-1])
    try:
        yield target
    finally:
        subprocess.run(["umount", "-R", str(target)], check=False)


@contextmanager
def tmpfs(target: Path) -> Iterator[Path]:
    """Mount an empty tmpfs."""
    with by_hand("-t", "tmpfs", "-o", "size=1m", "tmpfs", target):
        yield target


@contextmanager
def user_in(path: Path | str) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process called ``cat`` in a directory, which has ended at the end of the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, cwd=path) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        # A process has its name a moment after it was started.
        cat.stdin.write(b"\n")
        cat.stdin.flush()
        assert cat.stdout.readline() == b"\n"
        yield cat


@pytest.fixture
def places(scratch: Path) -> Iterator[Path]:
    """Lend a directory in which things may be mounted; all is unmounted in the end."""
    path = scratch / "places"
    path.mkdir()
    yield path
    for target in reversed(below(scratch)):
        with suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", target], check=True, capture_output=True)


def place(places: Path, name: str = "here") -> Path:
    """Make a directory to mount on."""
    path = places / name
    path.mkdir()
    return path


def targets(engine: Snapshotter, key: str = "") -> list[str]:
    """Return where the engine says that something is mounted."""
    return [mounted.target for mounted in engine.mounter.list_mounts(key)]
