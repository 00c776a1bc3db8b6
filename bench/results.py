"""Measurements and their summary."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median, quantiles

from bench.trees import Shape


class Case(StrEnum):
    """The quantity that is measured; the value is its name for people."""

    PREPARE = "Prepare"
    STANDBY = "Prepare, standby"
    COMMIT = "Commit"
    REMOVE = "Remove"
    VIEW_REMOVE = "View + Remove"
    STAT = "Stat"
    LIST = "List"
    BUSY_STAT = "Stat, busy"
    BUSY_VIEW_REMOVE = "View + Remove, busy"

    @property
    def on_trees(self) -> bool:
        """Whether it is measured on many trees, so that its name alone does not say enough."""
        return self in (Case.PREPARE, Case.STANDBY)

    @property
    def has_tail(self) -> bool:
        """Whether it is called so often that its slowest calls are of interest."""
        return self in (Case.STAT, Case.BUSY_STAT, Case.BUSY_VIEW_REMOVE)

    @property
    def rival(self) -> Case:
        """What those have to do instead who do not have this."""
        return Case.PREPARE if self is Case.STANDBY else self


@dataclass(frozen=True, slots=True)
class Subject:
    """One case on one file system and tree."""

    filesystem: str
    case: Case
    tree: str


@dataclass
class Results:
    """All samples in seconds, by peer and in their order, and what they belong to."""

    machine: Mapping[str, str]
    scale: float
    filesystems: dict[str, str] = field(default_factory=dict)
    trees: dict[str, Shape] = field(default_factory=dict)
    samples: dict[Subject, dict[str, list[float]]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, subject: Subject, peer: str, seconds: float) -> None:
        """Take in one sample."""
        self.samples.setdefault(subject, {}).setdefault(peer, []).append(seconds)

    def median(self, subject: Subject, peer: str) -> float | None:
        """Return the median of a peer's samples, if there are any."""
        samples = self.samples.get(subject, {}).get(peer)
        return median(samples) if samples else None

    def p99(self, subject: Subject, peer: str) -> float | None:
        """Return the 99th percentile of a peer's samples, or the highest one of a few."""
        samples = self.samples.get(subject, {}).get(peer)
        if not samples:
            return None
        return quantiles(samples, n=100)[-1] if len(samples) >= 100 else max(samples)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        found = {
            "machine": self.machine,
            "scale": self.scale,
            "filesystems": self.filesystems,
            "trees": {name: asdict(shape) for name, shape in self.trees.items()},
            "samples": [
                asdict(subject) | {"seconds": seconds} for subject, seconds in self.samples.items()
            ],
            "peak_memory_bytes": self.memory,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
