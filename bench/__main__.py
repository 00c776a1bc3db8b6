"""The command line of the benchmark."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from bench.disks import MKFS, mounted, shortage
from bench.machine import machine
from bench.report import write_document
from bench.results import Results
from bench.run import run
from bench.trees import TREES
from snapd_native.errors import SnapdError

MARGIN = 1 << 30
"""Bytes for everything but the trees."""

RIVALS = ("containerd", "cp")
"""The peers that the service is compared with."""

_FILE = click.Path(path_type=Path, dir_okay=False)
_DOCUMENT = click.Path(path_type=Path, dir_okay=False, exists=True)


def _some_of(
    words: Sequence[str],
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Parse an option whose value is some of the words, separated by commas."""

    def convert(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
        chosen = value.split(",")
        for word in chosen:
            if word not in words:
                raise click.BadParameter(f"{word!r} is none of {', '.join(words)}")
        return [word for word in words if word in chosen]

    return convert


@click.command()
@click.option(
    "--filesystems", callback=_some_of([*MKFS]), default=",".join(MKFS), show_default=True
)
@click.option("--trees", callback=_some_of([*TREES]), default=",".join(TREES), show_default=True)
@click.option(
    "--peers",
    callback=_some_of(RIVALS),
    default=",".join(RIVALS),
    show_default=True,
    help="Whom to compare with.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), help="How often trees are copied; else by their cost."
)
@click.option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="A fraction of all sizes, for trying out.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    default="/var/tmp",  # noqa: S108 - on disk, unlike /tmp
    show_default=True,
    help="Where the file systems' images are made.",
)
@click.option(
    "--json",
    "output",
    type=_FILE,
    default="bench/results.json",
    show_default=True,
    help="Where all samples are written.",
)
@click.option("--plot", type=_FILE, help="Draw the results, as SVG.")
@click.option("--document", type=_DOCUMENT, help="Put the results into a Markdown document.")
def main(
    filesystems: list[str],
    trees: list[str],
    peers: list[str],
    rounds: int | None,
    scale: float,
    directory: Path,
    output: Path,
    plot: Path | None,
    document: Path | None,
) -> None:
    """Measure the service beside containerd's native snapshotter and cp."""
    chosen = [TREES[name] for name in trees]
    if os.geteuid() != 0:
        raise click.ClickException("needs root, because it mounts file systems")
    # Every peer keeps each tree, and the peers make copies one after the other.
    sizes = [tree.size for tree in chosen]
    needed = MARGIN + round(scale * (3 * sum(sizes) + max(sizes)))
    if short := shortage(directory, needed):
        raise click.ClickException(short)
    # SIGTERM cleans everything up, as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    results = Results(machine(directory, peers), scale)
    try:
        for name in filesystems:
            with mounted(name, directory) as disk:
                run(disk, chosen, peers, rounds, results)
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"{error} {error.stderr or ''}") from None
    except (SnapdError, OSError) as error:
        raise click.ClickException(str(error)) from None
    results.save(output)
    _publish(results, document, plot)


def _publish(results: Results, document: Path | None, plot: Path | None) -> None:
    if document:
        write_document(results, document)
    if plot:
        # Only the picture needs matplotlib.
        from bench.plot import draw

        draw(results, plot)


if __name__ == "__main__":
    main()
