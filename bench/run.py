"""One run on one file system: all peers side by side, tree by tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.cases import Site, everything
from bench.disks import Disk
from bench.peers import Copier, Cp, Keeper, native
from bench.report import Printer, rows
from bench.results import Results
from bench.trees import Tree


def run(
    disk: Disk, trees: Sequence[Tree], peers: Sequence[str], rounds: int | None, results: Results
) -> None:
    """Measure everything on one file system, and print it tree by tree.

    Raises:
        Unavailable: a service is not installed, or does not start.
    """
    console = Console()
    printer = Printer(console)
    results.filesystems[disk.name] = disk.options()
    with ExitStack() as stack:
        site = stack.enter_context(_site(disk, peers, rounds, results))
        progress = stack.enter_context(_progress(console))
        task = progress.add_task("", total=len(trees))
        printer.heading(disk.name)
        for tree in trees:
            progress.update(task, description=f"{disk.name}: {tree.name}")
            everything(site, tree)
            printer.rows(rows(results, disk.name, [tree.name]))
            there, wanted = results.trees[tree.name].files, round(tree.files * results.scale)
            if there < wanted:
                console.print(f"{tree.name} has {there:,} files: there are no {wanted:,} here")
            progress.advance(task)
        for keeper in site.keepers:
            memory = {keeper.name: keeper.memory.process}
            if keeper.memory.children:
                memory[f"{keeper.name}, workers together"] = keeper.memory.children
            results.memory[disk.name] |= memory
    printer.memory(results.memory[disk.name])


@contextmanager
def _site(disk: Disk, peers: Sequence[str], rounds: int | None, results: Results) -> Iterator[Site]:
    """Start all peers, each with a directory of its own."""
    with ExitStack() as stack:
        originals, copies = disk.root / "originals", disk.root / "copies"
        originals.mkdir()
        copies.mkdir()
        ours = stack.enter_context(native(disk.root / "snapd-native"))
        keepers: list[Keeper] = [ours]
        if "containerd" in peers:
            # Only who compares with it needs grpcio.
            from bench.containerd import containerd

            keepers.append(stack.enter_context(containerd(disk.root / "containerd")))
        others: list[Copier] = [Cp(originals, copies)] if "cp" in peers else []
        yield Site(disk, originals, ours, keepers, [*keepers, *others], results, rounds)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
