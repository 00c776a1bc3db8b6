"""Fresh file systems on loop devices, of which nothing is left afterwards."""

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
"""Bytes of an image; it is sparse, and takes what its file system holds."""

MKFS: Mapping[str, tuple[str, ...]] = {
    # Tables that are initialised later would be so while something is measured.
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
        """Write all that is not written yet."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            linux.syncfs(descriptor)
        finally:
            os.close(descriptor)

    def trim(self) -> None:
        """Give the room of what was deleted back to the file system below."""
        self.sync()
        _run("fstrim", str(self.root))

    def options(self) -> str:
        """Return how it was made and mounted."""
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
        # Else everything is cached twice; not every file system below can do it.
        subprocess.run(
            ["losetup", "--direct-io=on", device], check=False, stderr=subprocess.DEVNULL
        )
        yield Disk(name, root)


def shortage(directory: Path, needed: int) -> str:
    """Return a sentence that says what is missing of ``needed`` bytes, or nothing."""
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
    """Unmount ``root``; by force only if something that failed still uses it."""
    for extra in ([], ["--lazy"]):
        if os.path.ismount(root):
            subprocess.run(["umount", *extra, str(root)], check=False)
