"""The results as tables: on the terminal while they come, and in a document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.results import Case, Results, Subject
from bench.trees import TREES, Shape

OURS = "snapd-native"

HEADINGS = ("", OURS, "containerd", "cp", "vs containerd", "vs cp")
"""Above the columns; a ratio over 1 says that we are faster."""

_WIDTHS = (26, 12, 10, 8, 13, 6)

_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a median or a 99th percentile of each peer, in seconds."""

    title: str
    ours: float | None
    containerd: float | None
    cp: float | None

    def cells(self) -> tuple[str, ...]:
        """Return what is shown in each column."""
        seconds = (self.ours, self.containerd, self.cp)
        ratios = (_ratio(self.containerd, self.ours), _ratio(self.cp, self.ours))
        return (self.title, *map(duration, seconds), *ratios)


def rows(results: Results, filesystem: str, trees: Sequence[str]) -> Iterator[Row]:
    """Make the lines of the trees that were measured on a file system, in the cases' order."""
    for case in Case:
        for tree in trees:
            subject = Subject(filesystem, case, tree)
            if subject in results.samples:
                yield from _rows(results, subject)


def _rows(results: Results, subject: Subject) -> Iterator[Row]:
    title = str(subject.case)
    if subject.case.on_trees:
        name, comma, rest = title.partition(",")
        title = f"{name} {subject.tree}{comma}{rest}"
    rival = Subject(subject.filesystem, subject.case.rival, subject.tree)
    subjects = ((subject, OURS), (rival, "containerd"), (rival, "cp"))
    yield Row(title, *(results.median(*each) for each in subjects))
    if subject.case.has_tail:
        yield Row(f"{title}, p99", *(results.p99(*each) for each in subjects))


class Printer:
    """Prints tables of which the lines come one after the other."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def heading(self, title: str) -> None:
        """Begin a table."""
        self._console.print(f"\n[bold]{title}[/bold]")
        self._console.print(_table(*HEADINGS, style="dim"))

    def rows(self, found: Iterator[Row]) -> None:
        """Go on with the table."""
        for row in found:
            self._console.print(_table(*row.cells()))

    def memory(self, peaks: Mapping[str, int]) -> None:
        """Print how much memory processes have taken at most, in bytes."""
        found = ", ".join(f"{name} {_mebibytes(peak)}" for name, peak in peaks.items())
        self._console.print(f"Peak memory: {found}")


def _table(*cells: str, style: str = "") -> Table:
    table = Table.grid(padding=(0, 1))
    for number, width in enumerate(_WIDTHS):
        table.add_column(width=width, no_wrap=True, justify="right" if number else "left")
    table.add_row(*cells, style=style)
    return table


def duration(seconds: float | None) -> str:
    """Return a duration with three digits, for people."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        value = seconds / size
        if value >= 0.9995 or unit == "µs":
            break
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _ratio(theirs: float | None, ours: float | None) -> str:
    if theirs is None or ours is None:
        return ""
    ratio = theirs / ours
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def write_document(results: Results, document: Path) -> None:
    """Put the results between the two comments in a Markdown document that mark their place.

    Raises:
        ValueError: the document has no such place.
    """
    before, found, rest = document.read_text().partition(_BEGIN)
    _, found_end, after = rest.partition(_END)
    if not (found and found_end):
        raise ValueError(f"{document} has no place for the results: {_BEGIN} and {_END}")
    lines = [_BEGIN, "", *_document(results), _END]
    document.write_text(before + "\n".join(lines) + after)


def _document(results: Results) -> Iterator[str]:
    yield from _markdown(("", "of the last run"), results.machine.items())
    yield from _markdown(
        ("tree", "what it is", "files", "directories", "MB"),
        (_tree(name, shape) for name, shape in results.trees.items()),
    )
    for filesystem, made in results.filesystems.items():
        yield f"### {filesystem}\n"
        yield f"`{made}`\n"
        found = rows(results, filesystem, list(results.trees))
        yield from _markdown(HEADINGS, (row.cells() for row in found))
        peaks = results.memory[filesystem].items()
        yield from _markdown(
            ("peak memory", ""), ((name, _mebibytes(peak)) for name, peak in peaks)
        )


def _tree(name: str, shape: Shape) -> Sequence[str]:
    counts = (shape.files, shape.directories, round(shape.size / 1e6))
    return (name, TREES[name].description, *(f"{count:,}" for count in counts))


def _markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    for cells in lines:
        yield f"| {' | '.join(cells)} |"
    yield ""
