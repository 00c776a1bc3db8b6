"""Make and find mounts of the kernel."""

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
    """Return the topmost mount on a directory, as in /proc/self/mountinfo."""
    found = None
    for entry in Table.read():
        if entry.target == str(path):
            found = entry
    return found


def entry_on(path: Path | str) -> Entry:
    """Return the topmost mount on a directory, which must exist."""
    found = mounted_on(path)
    assert found is not None
    return found


def mounts_below(path: Path) -> list[str]:
    """Return the targets of all mounts below a directory, in order."""
    return [entry.target for entry in Table.read() if entry.target.startswith(f"{path}/")]


def is_writable(path: Path) -> bool:
    """Return whether the file ``new`` can be created in a directory."""
    try:
        (path / "new").write_text("text")
    except OSError as error:
        return error.errno != errno.EROFS
    return True


def propagation_of(path: Path | str) -> list[str]:
    """Return the propagation of a mount, as in /proc/self/mountinfo; empty if it is private."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(path):
            return fields[6 : fields.index("-")]
    raise AssertionError(f"nothing is mounted on {path}")


@contextmanager
def mount_by_hand(*arguments: str | Path) -> Iterator[Path]:
    """Run mount(8), and unmount the last of ``arguments`` at the end."""
    subprocess.run(["mount", *map(str, arguments)], check=True)
    target = Path(arguments[-1])
    try:
        yield target
    finally:
        subprocess.run(["umount", "-R", str(target)], check=False)


@contextmanager
def mount_tmpfs(target: Path) -> Iterator[Path]:
    """Mount an empty tmpfs."""
    with mount_by_hand("-t", "tmpfs", "-o", "size=1m", "tmpfs", target):
        yield target


@contextmanager
def run_process_in(path: Path | str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process ``cat`` in a directory; it ends with the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, cwd=path) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        # A process gets its name a moment after its start. Its first output proves the name.
        cat.stdin.write(b"\n")
        cat.stdin.flush()
        assert cat.stdout.readline() == b"\n"
        yield cat


@pytest.fixture
def places(scratch: Path) -> Iterator[Path]:
    """Yield a directory for mounts, and unmount everything at the end."""
    path = scratch / "places"
    path.mkdir()
    yield path
    for target in reversed(mounts_below(scratch)):
        with suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", target], check=True, capture_output=True)


def make_target(places: Path, name: str = "here") -> Path:
    """Create a directory to mount on."""
    path = places / name
    path.mkdir()
    return path


def mount_targets(engine: Snapshotter, key: str = "") -> list[str]:
    """Return the targets of all mounts of an engine."""
    return [mounted.target for mounted in engine.mounter.list_mounts(key)]
