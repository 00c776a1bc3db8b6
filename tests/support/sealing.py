"""Change and copy committed trees, which are sealed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from snapd_native import linux
from snapd_native.snapshotter import Snapshotter
from tests.support.engine import id_of


def unsealed(tree: Path) -> Path:
    """Make a committed tree, or all below a directory, mutable, as only root can; return it."""
    # It fails at the first entry that cannot have the flag, after it has cleared all others.
    subprocess.run(["chattr", "-R", "-f", "-i", tree], check=False)
    return tree


def copy_state(state: Path, copy: Path) -> None:
    """Copy a state directory, with the flags that cp does not copy."""
    subprocess.run(["cp", "-a", state, copy], check=True)
    for tree in (state / "snapshots").iterdir():
        if tree.is_dir() and is_sealed(tree):
            subprocess.run(
                ["chattr", "-R", "-f", "+i", copy / "snapshots" / tree.name], check=False
            )


def is_sealed(path: Path) -> bool:
    """Tell whether a file is immutable."""
    return linux.is_immutable(linux.AT_FDCWD, str(path))


def tree_of(engine: Snapshotter, key: str) -> Path:
    """Return the tree of an active or committed snapshot."""
    return engine.state_directory / "snapshots" / id_of(engine, key)


def flags(tree: Path) -> dict[str, str]:
    """Return the flags immutable and append-only of a tree's directories and regular files."""
    found = {}
    for path in (tree, *tree.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            continue
        listed = subprocess.run(["lsattr", "-d", path], check=True, capture_output=True, text=True)
        found[str(path.relative_to(tree))] = "".join(
            flag for flag in listed.stdout.split()[0] if flag in "ia"
        )
    return found
