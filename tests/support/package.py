"""The Debian packages of this tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support import PROJECT
from tests.support.commands import run_command


@dataclass(frozen=True)
class Packages:
    """The files of both packages."""

    service: Path
    plugin: Path


def build_packages(directory: Path) -> Packages:
    """Build the packages from this tree, including uncommitted changes, in ``directory``."""
    printed = run_command(PROJECT / "tools" / "build-deb", directory)
    plugin, service = map(Path, printed.splitlines())
    return Packages(service, plugin)
