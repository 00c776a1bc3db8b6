"""Draw the results; the same numbers give the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from bench.report import OURS, duration
from bench.results import Case, Results, Subject
from bench.trees import GROWTH, TREES

# The colours of Okabe and Ito, which colour-blind people can distinguish, and grey for the rest.
COLOURS: Mapping[str, str] = {OURS: "#0072b2", "containerd": "#e69f00", "cp": "#a0a7ad"}
"""The colour of each peer."""

_STANDBY = f"{OURS}, standby clone ready"

_STYLE = {
    "svg.hashsalt": "snapd-native",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
}


def draw(results: Results, path: Path) -> None:
    """Draw Prepare on each tree as bars, and its growth as curves, for each file system."""
    with mpl.rc_context(_STYLE):
        names = list(results.filesystems)
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12, rect=(0, 0.035, 1, 0.965))
        figure = Figure(figsize=(10, 7.5), layout=layout, facecolor="white")
        grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
        for column, name in enumerate(names):
            _bars(grid[0][column], results, name)
            _growth(grid[1][column], results, name)
        for row in grid:
            row[0].set_ylabel("seconds")
        handles, labels = grid[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        figure.text(0.01, 0.012, _caption(results.machine), color="#666666", fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _caption(machine: Mapping[str, str]) -> str:
    named = ", ".join(machine[key] for key in ("processor", "memory", "kernel"))
    versions = ", ".join(f"{key} {machine[key]}" for key in (OURS, "containerd") if key in machine)
    return f"Medians on {named}; {versions}. Images on {machine['disk']}."


def _bars(axes: Any, results: Results, filesystem: str) -> None:  # noqa: ANN401 - optional
    trees = [name for name in results.trees if TREES[name] not in GROWTH[:-1]]
    width = 0.8 / len(COLOURS)
    for place, (peer, colour) in enumerate(COLOURS.items()):
        for position, tree in enumerate(trees):
            seconds = results.median(Subject(filesystem, Case.PREPARE, tree), peer)
            if seconds is None:
                continue
            at = position + (place - (len(COLOURS) - 1) / 2) * width
            axes.bar(at, seconds, width * 0.92, color=colour)
            # If a bar is too short to be visible, the number shows its length.
            text = duration(seconds).replace(" ", "\N{NARROW NO-BREAK SPACE}")
            axes.annotate(
                text, (at, seconds), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=6.5, color="#333333", rotation=90,
            )  # fmt: skip
    axes.set_title(f"Prepare on {filesystem}")
    axes.set_xticks(range(len(trees)), trees)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.2)


def _growth(axes: Any, results: Results, filesystem: str) -> None:  # noqa: ANN401 - optional
    lines = [(peer, peer, Case.PREPARE, "-") for peer in COLOURS]
    lines.append((_STANDBY, OURS, Case.STANDBY, ":"))
    for label, peer, case, style in lines:
        points = [
            (results.trees[tree.name].files, seconds)
            for tree in GROWTH
            if (seconds := results.median(Subject(filesystem, case, tree.name), peer)) is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), style, color=COLOURS[peer], label=label,
                marker="o", markersize=4, linewidth=1.8,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="files of 1 to 8 KiB")
    axes.set_title(f"Prepare on {filesystem} as the tree grows")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
