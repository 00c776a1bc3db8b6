"""The package that is installed in the machine. It is rebuilt only if its source has changed."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

from tools.vm.steps import ROOT, Steps

DIST = ROOT / "dist"
BUILT_FROM = DIST / ".built-from"
"""A file with the digest of the source, and of the package that was built from it."""


def newest() -> Path | None:
    """Return the package that was built last."""
    packages = DIST.glob("snapd-native_*_all.deb")
    return max(packages, key=lambda package: package.stat().st_mtime, default=None)


def build(steps: Steps) -> None:
    """Build the package, and record the digest of its source."""
    source = _source()
    steps.step("package", 900, [ROOT / "tools/build-deb"])
    package = newest()
    if source is not None and package is not None:
        BUILT_FROM.write_text(_note(source, package))


def is_current() -> bool:
    """Return whether the newest package was built from the source as it is now."""
    source, package = _source(), newest()
    try:
        noted = BUILT_FROM.read_text()
    except (OSError, ValueError):
        return False
    return source is not None and package is not None and noted == _note(source, package)


def dependencies(package: Path) -> list[str]:
    """Return the names of the packages that a package depends on; the first of alternatives."""
    fields = subprocess.run(
        ["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, check=True
    ).stdout
    return sorted({word.strip() for word in re.findall(r"(?:^|,)\s*([^\s,:(|]+)", fields)})


def _note(source: str, package: Path) -> str:
    return f"{source} {hashlib.sha256(package.read_bytes()).hexdigest()}\n"


def _source() -> str | None:
    """Return a digest of all tracked files that may be in the package, or None without git."""
    listed = subprocess.run(
        # The repository may belong to another user.
        [
            *("git", "-c", f"safe.directory={ROOT}"),
            *("ls-files", "-z", "--", ".", ":!tests", ":!bench", ":!tools/vm"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        return None
    digest = hashlib.sha256()
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{name}\0{path.stat().st_mode:o}\0{content}\0".encode())
    return digest.hexdigest()
