"""The output of commands: aligned text for people, JSON for programs."""

from __future__ import annotations

import codecs
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from snapd_native.client import Job, Progress, Standby
from snapd_native.model import Finding, Info, Kind, Mount, Mounted, Usage, shown

_STYLES = {Kind.COMMITTED: "green", Kind.ACTIVE: "yellow", Kind.VIEW: "cyan"}


def mount(value: Mount, *, as_json: bool) -> None:
    """Print a mount: type, source and options, separated by tabs."""
    if as_json:
        _print_json(asdict(value))
    else:
        print(f"{value.type}\t{value.source}\t{','.join(value.options)}")


def mounted(found: Sequence[Mounted], *, as_json: bool) -> None:
    """Print mounts."""
    if as_json:
        _print_json(
            [
                {name.replace("_", "-"): each for name, each in asdict(value).items()}
                for value in found
            ]
        )
        return
    grid = _grid("TARGET", "KEY", "OPTIONS", "LIFETIME", "UID", right=(4,))
    for value in found:
        grid.add_row(
            Text(shown(value.target)),
            Text(shown(value.key)),
            Text("ro" if value.read_only else "rw"),
            Text(value.lifetime.value),
            Text(str(value.uid)),
        )
    _print_rich(grid)


def findings(found: Sequence[Finding], *, as_json: bool) -> None:
    """Print findings: the kind, the key of the snapshot and a sentence, separated by tabs."""
    if as_json:
        _print_json([asdict(each) for each in found])
        return
    for each in found:
        print(f"{each.kind.value}\t{shown(each.key)}\t{shown(each.what)}")


def verified(name: str, digest: str) -> None:
    """Print the digest and the name of a verified snapshot, separated by a tab."""
    print(f"{digest}\t{shown(name)}", flush=True)


def all_verified(found: Iterable[tuple[str, str]]) -> None:
    """Print as JSON what `verified` prints."""
    _print_json([{"name": name, "digest": digest} for name, digest in found])


def fstab(value: Mount, target: str) -> None:
    """Print a line of /etc/fstab for the mount."""
    source, where = (_FSTAB.sub(_octal, path) for path in (value.source, target))
    print(f"{source} {where} none {','.join(value.options)} 0 0")


def mount_command(value: Mount, target: str) -> None:
    """Print the command for the mount."""
    print(shlex.join(["mount", "-o", ",".join(value.options), value.source, target]))


def stat(info: Info, *, as_json: bool, standby: Standby | None = None) -> None:
    """Print a record, and the number of standby clones if some are wanted."""
    clones = standby if standby and standby.wanted else None
    if as_json:
        _print_json(_plain(info) | ({"standby": asdict(clones)} if clones else {}))
        return
    table = _grid()
    rows = {
        "Name": shown(info.name),
        "Kind": info.kind.value,
        "Parent": shown(info.parent) or "-",
        "Created": f"{_local(info.created)} ({age(info.created)} ago)",
        "Updated": f"{_local(info.updated)} ({age(info.updated)} ago)",
    }
    if clones:
        rows["Standby"] = f"{clones.ready} of {clones.wanted} clones ready"
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    for number, text in enumerate(_labels(info) or ["-"]):
        table.add_row(Text("Labels" if number == 0 else "", "bold"), Text(text))
    _print_rich(table)


@contextmanager
def progress(doing: str, key: str) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows progress as a bar; None without a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[entries]}"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with ExitStack() as stack:
        tasks: list[TaskID] = []

        def show(now: Progress) -> None:
            if not tasks:
                # A quick call shows no progress bar.
                stack.enter_context(bar)
                tasks.append(bar.add_task(f"{doing} {escape(shown(key))}", entries="", total=None))
            bar.update(
                tasks[0],
                completed=now.done.size,
                total=now.total.size or None,
                entries=f"{now.done.inodes:,} inodes",
            )

        yield lambda now: show(now) if now.done.inodes else None


_FSTAB = re.compile(r"[\s\\#]")


def _octal(match: re.Match[str]) -> str:
    return "".join(f"\\{byte:03o}" for byte in match[0].encode())


def jobs(found: Sequence[tuple[Job, Progress]], *, as_json: bool) -> None:
    """Print jobs and their progress."""
    if as_json:
        _print_json([asdict(job) | asdict(now) for job, now in found])
        return
    grid = _grid("ID", "OPERATION", "KEY", "UID", "INODES", "SIZE", right=(0, 3, 4, 5))
    for job, now in found:
        counts = [f"{now.done.inodes:,}", size(now.done.size)]
        if now.total.inodes:
            totals = (f"{now.total.inodes:,}", size(now.total.size))
            counts = [f"{done} of {total}" for done, total in zip(counts, totals, strict=True)]
        grid.add_row(str(job.id), job.operation, Text(shown(job.key)), str(job.uid), *counts)
    _print_rich(grid)


def table(infos: Iterable[Info], *, as_json: bool) -> None:
    """Print records, one a line."""
    if as_json:
        _print_json([_plain(info) for info in infos])
        return
    grid = _grid("NAME", "KIND", "PARENT", "AGE", "LABELS")
    for info in infos:
        grid.add_row(
            Text(shown(info.name)),
            Text(info.kind.value, _STYLES[info.kind]),
            Text(shown(info.parent) or "-"),
            Text(age(info.created)),
            Text(", ".join(_labels(info)) or "-"),
        )
    _print_rich(grid)


def lineage(infos: Iterable[Info], *, as_json: bool) -> None:
    """Print records as a tree of parents and children."""
    children: dict[str, list[Info]] = {}
    for info in infos:
        children.setdefault(info.parent, []).append(info)
    if as_json:
        _print_json(_nested(children))
        return
    root = Tree("", hide_root=True)
    pending = [(root, info) for info in reversed(children.get("", []))]
    while pending:
        branch, info = pending.pop()
        line = Text(shown(info.name))
        line.append(f"  {info.kind.value}, {age(info.created)}", _STYLES[info.kind])
        node = branch.add(line)
        pending += [(node, child) for child in reversed(children.get(info.name, []))]
    if root.children:
        _print_rich(root)


def usage(usages: Sequence[tuple[str, Usage]], *, as_json: bool) -> None:
    """Print the usage of snapshots."""
    if as_json:
        _print_json([{"key": key} | asdict(used) for key, used in usages])
        return
    grid = _grid("KEY", "SIZE", "INODES", right=(1, 2))
    for key, used in usages:
        grid.add_row(Text(shown(key)), size(used.size), f"{used.inodes:,}")
    _print_rich(grid)


def size(count: int) -> str:
    """Return a number of bytes in binary units."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 6)
    return f"{count / (1 << 10 * power):.1f} {'KMGTPE'[power - 1]}iB"


def age(microseconds: int) -> str:
    """Return how long ago a time was, in the largest whole unit."""
    seconds = max(0, int(time.time() - microseconds / 1_000_000))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _plain(info: Info) -> dict[str, Any]:
    return asdict(info) | {"created": _utc(info.created), "updated": _utc(info.updated)}


def _nested(children: dict[str, list[Info]]) -> list[dict[str, Any]]:
    top: list[dict[str, Any]] = []
    pending = [(top, "")]
    while pending:
        siblings, parent = pending.pop()
        for info in children.get(parent, []):
            node = {**_plain(info), "children": []}
            siblings.append(node)
            pending.append((node["children"], info.name))
    return top


def _labels(info: Info) -> list[str]:
    return [f"{shown(key)}={shown(value)}" for key, value in sorted(info.labels.items())]


def _utc(microseconds: int) -> str:
    moment = datetime.fromtimestamp(microseconds / 1_000_000, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _local(microseconds: int) -> str:
    moment = datetime.fromtimestamp(microseconds / 1_000_000, UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S %Z")


def _grid(*headings: str, right: tuple[int, ...] = ()) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=bool(headings), header_style="bold")
    for number, heading in enumerate(headings or ("", "")):
        justify = "right" if number in right else "left"
        grid.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return grid


def _print_rich(thing: Table | Tree) -> None:
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(thing)
        return
    # A pipe has no width: the output is not cut or folded.
    wide = Console(highlight=False, width=1 << 20, color_system=None)
    with wide.capture() as capture:
        wide.print(thing)
    for line in capture.get().splitlines():
        print(line.rstrip())


def _print_json(value: Any) -> None:  # noqa: ANN401 - all that json takes
    # Other encodings can lack a character, for which JSON has escapes.
    is_utf_8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    json.dump(value, sys.stdout, ensure_ascii=not is_utf_8, indent=2)
    print()
