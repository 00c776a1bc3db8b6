"""Releases of Debian in directories, with processes in their own namespaces."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.commands import run_command
from tests.support.package import Packages

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

SUITES = {"bookworm": (), "trixie": (), "testing": ("--aptopt=Acquire::Check-Valid-Until false",)}
"""Releases of Debian, and options of mmdebstrap. A mirror may have an old state of testing."""

START_SCRIPT = """
set -eu
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/run"
mount --rbind /dev "$1/dev"
mount --rbind /sys "$1/sys"
cp -a "$2"/. "$1/root"
# A container with the network of the host gets these files of the host.
touch "$1/etc/hosts" "$1/etc/resolv.conf"
# A process that enters the namespace of a container has the root of the namespace, so that must be
# the release: chroot alone would not change it.
cd "$1"
pivot_root . mnt
# The shell is the first process in the namespace, and reaps the others.
exec chroot . sh -c 'umount --lazy /mnt; echo ready; cat; exit'
"""


class Machine:
    """A Debian in a directory, with its own namespaces, which end with its first process."""

    def __init__(self, pid: int) -> None:
        self._enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "--root", "--wd"]

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._enter, "env", "-i", f"PATH={PATH}", "LC_ALL=C.UTF-8", "sh", "-euc", script],
            capture_output=True,
            text=True,
            check=False,
        )

    def __call__(self, script: str) -> str:
        outcome = self.run(script)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    def expect_failure(self, script: str) -> str:
        outcome = self.run(script)
        assert outcome.returncode != 0
        return outcome.stderr


@contextmanager
def start_machine(root: Path, files: Path) -> Iterator[Machine]:
    """Start a release in ``root``, with copies of ``files`` in its /root."""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "sh", "-c", START_SCRIPT, "sh", root, files], stdin=pipe, stdout=pipe
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (inside,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        try:
            yield Machine(int(inside))
        finally:
            process.communicate()


def install_release(suite: str, root: Path, packages: list[str]) -> None:
    """Install a release of Debian with some packages in a new directory."""
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *SUITES[suite]),
            *(f"--include={','.join(sorted(set(packages)))}", suite, str(root)),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": PATH},
    )


@contextmanager
def lend_release(suite: str, directory: Path, packages: list[str]) -> Iterator[Path]:
    """Lend a release that all processes of a test run share; the last one deletes it.

    ``directory`` is the same for all of them. Nobody may change the release.
    """
    directory.mkdir(exist_ok=True)
    root = directory / suite
    with open(directory / f"{suite}.lock", "w") as users:
        is_there = False
        while not is_there:
            fcntl.flock(users, fcntl.LOCK_EX)
            try:
                if not root.exists():
                    install_release(suite, root, packages)
            except BaseException:
                shutil.rmtree(root, ignore_errors=True)
                raise
            # For a moment there is no lock, in which another process can delete it.
            fcntl.flock(users, fcntl.LOCK_SH)
            is_there = root.exists()
        try:
            yield root
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root)


def dependencies(built: Packages) -> list[str]:
    """Name the packages of Debian that both packages depend on; of alternatives the first."""
    fields = [
        run_command("dpkg-deb", "--field", package, "Depends")
        for package in (built.service, built.plugin)
    ]
    names = re.findall(r"(?:^|, )([a-z0-9.+-]+)", "".join(fields), re.MULTILINE)
    return [name for name in names if name != "snapd-native"]
