"""The plan of a command: its steps, and how long each of them took the last time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

TESTS = "tests/vm"

STEPS = {
    "packages": "install the Debian packages that are missing",
    "package": "build the package",
    "box": "build the box, unless the last one still fits",
    "libvirt": "start libvirt, unless it runs",
    "kvm": "try whether KVM works",
    "up": "start a machine and install the package",
    "ssh": "let root log in",
    "answer": "log in to the kept machine",
    "update": "install the package, if it changed",
    "tests": "run the tests",
    "destroy": "destroy the machine, its disks and its network",
}


class Command(Enum):
    """The command of the user."""

    TEST = "test"
    POWERCUT = "powercut"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True)
class Situation:
    """The state before the first step."""

    kept: bool = False
    """`up` has made a machine, and `down` has not destroyed it."""
    remains: bool = False
    """There is a machine, kept or not, or a part of one."""
    packages: bool = True
    """All Debian packages that the steps need are installed."""
    package: bool = True
    """The package was built from this source."""
    box: bool = True
    """The box has all dependencies of the package. False if that is not known yet."""
    driver: bool = True
    """The driver of the machine is known without trying KVM."""


def planned(command: Command, now: Situation) -> list[str]:
    """Return the names of the steps of a command, in order."""
    if command is Command.DOWN:
        return ["destroy"] if now.remains else []
    needed = {
        "packages": not now.packages,
        "package": not now.package,
        "box": not now.box,
        "kvm": not now.driver,
    }
    steps = (
        ["answer", "package", "update"]
        if now.kept
        else ["packages", "package", "box", "libvirt", "kvm", "up", "ssh"]
    )
    if command is not Command.UP:
        steps += ["tests"] if now.kept else ["tests", "destroy"]
    return [step for step in steps if needed.get(step, True)]


def machine_of(command: Command, now: Situation) -> str:
    """Describe the machine that a command uses, and whether the machine stays."""
    if command is Command.DOWN:
        return "the kept machine" if now.kept else "what an earlier run has left"
    if now.kept:
        return "the kept machine, which stays"
    if command is Command.UP:
        return "a new machine, which stays until make vm-down"
    return "a new machine, which is destroyed at the end"


def chosen(only: str | None, root: Path) -> list[str]:
    """Return arguments for pytest: all tests, or the paths or the -k expression in ``only``."""
    if not only:
        return [TESTS]
    words = only.split()
    if all((root / word.partition("::")[0]).exists() for word in words):
        return words
    return [TESTS, "-k", only]


class Durations:
    """A file with the seconds that each step took when it last succeeded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, float]:
        """Return all durations; none if the file is missing, unreadable or damaged."""
        try:
            read = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(read, dict) or not all(
            type(each) in (int, float) for each in read.values()
        ):
            return {}
        return read

    def record(self, step: str, seconds: float) -> None:
        """Replace the duration of one step."""
        after = self.read() | {step: round(seconds, 1)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(after, indent=2, sort_keys=True) + "\n")
        os.replace(new, self._path)


def key(step: str, tests: Sequence[str]) -> str:
    """Return the name of a step's duration: one for each choice of tests."""
    return " ".join([step, *tests]) if step == "tests" else step


def lines(steps: Sequence[str], tests: Sequence[str], last: dict[str, float]) -> Iterator[str]:
    """Yield a line for each step: its description, and its last duration."""
    for step in steps:
        seconds = last.get(key(step, tests))
        took = "not run yet" if seconds is None else f"{seconds:.1f} s last time"
        yield f"  {step:<9} {STEPS[step]:<47} {took}"
