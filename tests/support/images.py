"""Container images, and a containerd that unpacks and runs them."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.commands import run_command
from tests.support.service import HANG_TIMEOUT
from tests.support.waiting import wait_until
from tools import oci

IMAGE = "example.com/test:1"


def layer(*entries: tarfile.TarInfo | tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    """Return a layer as an uncompressed archive; a pair is a regular file."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info, data = entry if isinstance(entry, tuple) else (entry, b"")
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def special(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o755,
    to: str = "",
    attributes: Mapping[str, str] | None = None,
) -> tarfile.TarInfo:
    """Return an entry that is not an ordinary file; ``to`` is the target of a link."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = kind, mode, to
    info.uid, info.gid, info.mtime = 1000, 1001, 1_600_000_000
    info.devmajor, info.devminor = 1, 7
    info.pax_headers = {f"SCHILY.xattr.{key}": text for key, text in (attributes or {}).items()}
    return info


def write_image(
    path: Path,
    layers: Sequence[bytes],
    name: str = IMAGE,
    command: Sequence[str] = ("/bin/sh",),
) -> None:
    """Write an image to a file."""
    oci.write_image(path, [io.BytesIO(data) for data in layers], name, command)


def programs() -> bytes:
    """Return a layer with a shell."""
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    return layer(
        special("bin", tarfile.DIRTYPE),
        (special("bin/busybox"), busybox),
        *(special(f"bin/{name}", tarfile.LNKTYPE, to="bin/busybox") for name in ("sh", "cat")),
    )


PAUSE = "example.com/pause:1"
"""The image of the container that keeps a pod's namespaces."""

_COMMON = """
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"{disabled}]
[grpc]
address = "{directory}/containerd.sock"
[proxy_plugins.snapd-native]
type = "snapshot"
address = "{socket}"
"""

_CONFIGURATIONS = {
    1: f"version = 2{_COMMON}",
    2: f"""version = 3{_COMMON}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "snapd-native"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "native"
""",
}
"""The configuration of each generation of containerd."""

# Without CAP_SYS_RESOURCE, runc cannot lower the score for the OOM killer.
_CRI_CONFIGURATIONS = {
    1: f"""
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
stats_collect_period = 1
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "snapd-native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{{directory}}/cni"
conf_dir = "{{directory}}/cni"
""",
    2: f"""
[plugins."io.containerd.cri.v1.images"]
snapshotter = "snapd-native"
stats_collect_period = 1
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{{directory}}/cni"]
conf_dir = "{{directory}}/cni"
""",
}
"""What a containerd that serves Kubernetes needs besides."""


def _generation() -> int:
    """Return the first number of containerd's version."""
    said = run_command("containerd", "--version")
    found = re.search(r" v?(\d+)\.\d+\.\d+", said)
    assert found, said
    return int(found[1])


@dataclass
class Containerd:
    """A running containerd."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start containerd, and wait until it answers."""
        log = self.directory / "log"
        with log.open("ab") as stderr:
            command = ["containerd", "--config", f"{self.directory}/config.toml"]
            process = subprocess.Popen(command, stderr=stderr, process_group=0)
        self.process = process
        wait_until(lambda: process.poll() is not None or self._answers())
        assert process.poll() is None, log.read_text()[-2000:]

    def kill(self) -> None:
        """Kill containerd."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End containerd, and unmount what a killed one has left, the innermost mounts first."""
        assert self.process
        self.process.terminate()
        self.process.wait(HANG_TIMEOUT)
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        for target in reversed([line.split()[4] for line in mounts]):
            if target.startswith(f"{self.directory}/"):
                subprocess.run(["umount", target], check=True)

    def wait_until_connected(self) -> None:
        """Wait until containerd has connected to the plugin again.

        It tries this again after at most three seconds.
        """
        list_all = ["snapshots", "--snapshotter", "snapd-native", "ls"]
        command = ["ctr", "--address", self.address, *list_all]
        wait_until(
            lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0
        )

    def _answers(self) -> bool:
        if not os.path.exists(self.address):
            return False
        command = ["ctr", "--address", self.address, "version"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    @property
    def address(self) -> str:
        return f"{self.directory}/containerd.sock"

    def ctr(self, *arguments: str, fails: bool = False, space: str = "default") -> str:
        """Run ctr in a namespace of containerd.

        It must succeed, and its output is returned; if it ``fails``, the error.
        """
        done = subprocess.run(
            ["ctr", "--address", self.address, "--namespace", space, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=HANG_TIMEOUT,
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    def run(self, snapshotter: str, script: str) -> str:
        """Run a shell in a new container of `IMAGE`, and return its output."""
        name = f"c{uuid.uuid4().hex}"
        # On a busy machine ctr ends before it has opened the pipe with the output.
        output = self.directory / name
        options = [
            "--rm",
            "--net-host",
            "--snapshotter",
            snapshotter,
            "--log-uri",
            f"file://{output}",
        ]
        self.ctr("run", *options, IMAGE, name, "/bin/sh", "-ec", script)
        return output.read_text()

    def snapshots(self, snapshotter: str) -> list[str]:
        """Return the keys of the snapshots that containerd knows."""
        lines = self.ctr("snapshots", "--snapshotter", snapshotter, "ls").splitlines()[1:]
        return [line.split()[0] for line in lines]

    def collect(self, space: str = "default") -> None:
        """Run the garbage collection, and wait for its end; ``space`` contains `IMAGE`."""
        self.ctr("images", "tag", "--force", IMAGE, "example.com/unused:1", space=space)
        self.ctr("images", "rm", "--sync", "example.com/unused:1", space=space)


@contextmanager
def containerd(socket: Path, *, cri: bool = False) -> Iterator[Containerd]:
    """Run a containerd with the plugin on ``socket`` as its snapshotter ``snapd-native``.

    With ``cri`` it serves Kubernetes.
    """
    generation = _generation()
    configuration = _CONFIGURATIONS[generation]
    if cri:
        configuration += _CRI_CONFIGURATIONS[generation]
    # The path of a socket is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="snapd-native-containerd-") as directory:
        (Path(directory) / "config.toml").write_text(
            configuration.format(
                directory=directory,
                socket=socket,
                disabled="" if cri else ', "io.containerd.grpc.v1.cri"',
            )
        )
        running = Containerd(Path(directory))
        running.start()
        try:
            yield running
        finally:
            running.stop()
