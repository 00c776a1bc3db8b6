"""The Debian package of this tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import PROJECT


def build_package(directory: Path) -> Path:
    """Build the package from this tree, including uncommitted changes, in ``directory``."""
    subprocess.run([PROJECT / "tools" / "build-deb", directory], check=True, capture_output=True)
    (package,) = directory.glob("*.deb")
    return package
