"""Measure the containerd plugin beside containerd's own snapshotters.

containerd unpacks an image and calls each snapshotter. They take turns, so that other load of the
machine disturbs all equally. The results are medians.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import click
import grpc
from rich.console import Console
from rich.table import Table

from bench.containerd import Containerd, await_answer, connected, containerd
from bench.disks import MKFS, Disk, mounted, shortage
from bench.memory import Peak
from bench.peers import Native, native
from bench.report import duration
from bench.trees import ROOTFS, scaled
from snapd_native.errors import SnapdError, Unavailable
from tools import oci

SNAPSHOTTERS = ("snapd-native", "native", "overlayfs")

LAYERS = 6

ROUNDS = 5
"""How often the image is unpacked, and a container is prepared on it."""

STATS = 1000

NEEDED = 8 << 30
"""Bytes: the image in several forms, and what two snapshotters make of it on ext4."""

_CONFIGURATION = """
[proxy_plugins.snapd-native]
type = "snapshot"
address = "{socket}"
"""


@dataclass
class Site:
    """A containerd with all snapshotters on a file system."""

    disk: Disk
    snapshotters: dict[str, Containerd]
    plugin: Containerd
    """The plugin by its own socket."""
    plugin_pid: int
    service: Native
    digest: str
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """All samples, by row and by column."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the unpacked image by snapshotter."""
    cpu: float = 0
    """Seconds of processor time that the plugin takes for a Stat."""

    def measure(self, row: str, column: str, call: Callable[[], object]) -> None:
        """Measure the time of one call."""
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        self.seconds.setdefault(row, {}).setdefault(column, []).append(taken)

    def in_turn(self, number: int) -> Iterator[tuple[str, Containerd]]:
        """Iterate over the snapshotters, and begin with another one each time."""
        first = number % len(SNAPSHOTTERS)
        for name in (*SNAPSHOTTERS[first:], *SNAPSHOTTERS[:first]):
            yield name, self.snapshotters[name]

    def used(self) -> int:
        """Return the bytes that the file system uses, after all is written."""
        self.disk.sync()
        found = os.statvfs(self.disk.root)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


def everything(site: Site, rounds: int, stats: int) -> None:
    """Run all measurements."""
    _images(site, rounds)
    _stats(site, stats)


def _images(site: Site, rounds: int) -> None:
    for number in range(rounds):
        for name, peer in site.in_turn(number):
            _remove_all(peer)
            site.service.settle()
            before = site.used()
            unpack = partial(_ctr, peer, "snapshots", "unpack", "--snapshotter", name, site.digest)
            site.measure(f"unpack {LAYERS} layers", name, unpack)
            site.sizes[name] = site.used() - before
    tops = {name: _top(peer) for name, peer in site.snapshotters.items()}
    for number in range(rounds):
        for name, peer in site.in_turn(number):
            site.disk.sync()
            site.measure("Prepare", name, partial(peer.prepare, "container", tops[name]))
            site.measure("Remove", name, partial(peer.remove, "container"))
            peer.settle()


def _stats(site: Site, stats: int) -> None:
    tops = {name: _top(peer) for name, peer in site.snapshotters.items()}
    # containerd numbers the snapshots of its namespaces.
    (below,) = [name for name in site.plugin.parents() if name.endswith(tops["snapd-native"])]
    stored = f"containerd/{below}"
    for number in range(stats):
        for name, peer in site.in_turn(number):
            site.measure("Stat", name, partial(peer.stat, tops[name]))
    before_cpu = _cpu(site.plugin_pid)
    for _ in range(stats):
        site.measure("Stat of the plugin alone", "snapd-native", partial(site.plugin.stat, below))
    site.cpu = (_cpu(site.plugin_pid) - before_cpu) / stats
    for _ in range(stats):
        stat = partial(site.service.stat, stored)
        site.measure("Stat over D-Bus", "snapd-native", stat)


def _remove_all(peer: Containerd) -> None:
    """Remove the snapshot of the last layer; the garbage collector removes those below it."""
    while parents := peer.parents():
        for name in parents.keys() - parents.values():
            peer.remove(name)
        peer.settle()


def _top(peer: Containerd) -> str:
    """Return the name of the snapshot of the last layer."""
    parents = peer.parents()
    (top,) = parents.keys() - parents.values()
    return top


def _cpu(pid: int) -> float:
    """Return the seconds of processor time of all threads of a process."""
    threads = Path("/proc", str(pid), "task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _ctr(peer: Containerd, *arguments: str) -> None:
    command = ["ctr", "--address", peer.address.removeprefix("unix:"), "--namespace", "bench"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)


def _write_image(tree: Path, path: Path) -> str:
    """Write an image with the files of a tree in `LAYERS` layers; return its digest."""
    files = sorted(found for found in tree.rglob("*") if found.is_symlink() or found.is_file())
    share = -(-len(files) // LAYERS)
    with ExitStack() as layers:
        written = []
        for number in range(LAYERS):
            layer = layers.enter_context(tempfile.TemporaryFile(dir=path.parent))
            _write_layer(layer, tree, files[number * share : (number + 1) * share])
            written.append(layer)
        return oci.write_image(path, written, "example.com/bench:1")


def _write_layer(file: io.BufferedIOBase, tree: Path, files: Sequence[Path]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as layer:
        there: set[Path] = {tree}
        for path in files:
            for directory in reversed(path.parents):
                if directory.is_relative_to(tree) and directory not in there:
                    there.add(directory)
                    layer.add(directory, str(directory.relative_to(tree)), recursive=False)
            layer.add(path, str(path.relative_to(tree)))


@contextmanager
def site(disk: Disk, scale: float) -> Iterator[Site]:
    """Start everything, and import the image."""
    with ExitStack() as stack:
        tree, image = disk.root / "tree", disk.root / "image.tar"
        tree.mkdir()
        ROOTFS.make(tree, scale)
        digest = _write_image(tree, image)
        private = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="snapd-native-bench-"))
        )
        service = stack.enter_context(native(disk.root / "snapd-native"))
        socket = private / "plugin.sock"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "snapd_native", "containerd", "--socket", str(socket)],
            stderr=stack.enter_context((private / "log").open("wb")),
            process_group=0,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        channel = stack.enter_context(connected(f"unix:{socket}"))
        try:
            await_answer(channel)
        except grpc.FutureTimeoutError:
            raise Unavailable("the plugin did not start") from None
        more = _CONFIGURATION.format(socket=socket)
        daemon = stack.enter_context(containerd(disk.root / "containerd", more))
        _ctr(daemon, "images", "import", "--no-unpack", str(image))
        snapshotters = {name: daemon.on(name) for name in SNAPSHOTTERS}
        plugin = Containerd(channel, f"unix:{socket}", Peak(process.pid), "snapd-native")
        yield Site(disk, snapshotters, plugin, process.pid, service, digest)


def table(done: Site) -> Table:
    """Return the results on one file system."""
    made = Table(title=done.disk.name)
    made.add_column("")
    for name in SNAPSHOTTERS:
        made.add_column(name, justify="right")
    for row, samples in done.seconds.items():
        found = [median(samples[name]) if name in samples else None for name in SNAPSHOTTERS]
        made.add_row(row, *map(duration, found))
    made.add_row("Stat, CPU time of the plugin", duration(done.cpu))
    sizes = [f"{done.sizes[name] / 1e6:,.0f} MB" for name in SNAPSHOTTERS]
    made.add_row("space of the unpacked image", *sizes)
    return made


@click.command()
@click.option("--scale", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    default="/var/tmp",  # noqa: S108 - on disk, unlike /tmp
    show_default=True,
    help="Where the file systems' images are made.",
)
def main(scale: float, rounds: int, directory: Path) -> None:
    """Measure the containerd plugin beside containerd's own snapshotters."""
    if short := shortage(directory, round(NEEDED * scale)):
        raise click.ClickException(short)
    console = Console()
    try:
        for name in MKFS:
            with mounted(name, directory) as disk, site(disk, scale) as running:
                everything(running, rounds, scaled(STATS, scale))
                console.print(table(running))
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"{error} {error.stderr or ''}") from None
    except (SnapdError, OSError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
