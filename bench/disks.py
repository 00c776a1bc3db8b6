"""New file systems on loop devices, which are deleted afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapd_native import linux

SIZE = 32 << 30
"""Bytes of an image. It is sparse, and uses only what its file system contains."""

MKFS: Mapping[str, tuple[str, ...]] = {
    # Lazy initialisation of tables would run during measurements.
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
}
"""How each file system is made."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A mounted file system, all of it free for use."""

    name: str
    root: Path

    def sync(self) -> None:
        """Write everything to the disk."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            linux.syncfs(descriptor)
        finally:
            os.close(descriptor)

    def trim(self) -> None:
        """Return the space of deleted files to the file system below."""
        self.sync()
        _run("fstrim", str(self.root))

    def options(self) -> str:
        """Return the options of mkfs and mount."""
        mounted = _run("findmnt", "-no", "OPTIONS", str(self.root)).strip()
        return f"{' '.join(MKFS[self.name])}; {mounted}"


@contextmanager
def mounted(name: str, directory: Path) -> Iterator[Disk]:
    """Mount a new file system, its image in ``directory``.

    The image has no name once it is mounted, so nothing of it survives the mount.
    """
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix=f"snapd-native-bench-{name}-", dir=directory))
        stack.callback(root.rmdir)
        with tempfile.NamedTemporaryFile(suffix=".img", dir=directory) as image:
            os.truncate(image.fileno(), SIZE)
            _run(*MKFS[name], image.name)
            stack.callback(_unmount, root)
            _run("mount", "-o", "loop", image.name, str(root))
        device = _run("findmnt", "-no", "SOURCE", str(root)).strip()
        # Without direct I/O everything is cached twice; not every file system supports it.
        subprocess.run(
            ["losetup", "--direct-io=on", device], check=False, stderr=subprocess.DEVNULL
        )
        yield Disk(name, root)


def shortage(directory: Path, needed: int) -> str:
    """Return a sentence if less than ``needed`` bytes are free; else empty."""
    free = shutil.disk_usage(directory).free
    if free >= needed:
        return ""
    return (
        f"{directory} has {free / (1 << 30):.1f} GiB free, and {needed / (1 << 30):.1f} GiB are"
        " needed: choose another with --directory, or less with --scale or --trees"
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _unmount(root: Path) -> None:
    """Unmount ``root``; lazily if a failed measurement still uses it."""
    for extra in ([], ["--lazy"]):
        if os.path.ismount(root):
            subprocess.run(["umount", *extra, str(root)], check=False)
