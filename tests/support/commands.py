"""Run commands."""

from __future__ import annotations

import subprocess
from pathlib import Path


def run_command(*command: str | Path) -> str:
    """Run a command that must succeed, and return its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
