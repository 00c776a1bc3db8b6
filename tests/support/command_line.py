"""Run the program as users do, on the bus of `on_bus`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from snapd_native.cli.exits import STATUSES
from snapd_native.errors import SnapdError
from tests.support import PROJECT
from tests.support.service import HANG_TIMEOUT, as_user

PROGRAM = (sys.executable, "-m", "snapd_native")


def run_program(
    *arguments: str | bytes,
    user: int = 0,
    cwd: Path = PROJECT,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program as the uid ``user``, with additions to its environment."""
    return subprocess.run(
        [*as_user(user), *PROGRAM, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_TIMEOUT,
    )


def output_of(*arguments: str, cwd: Path = PROJECT) -> str:
    """Run the program, which must succeed, and return its output."""
    outcome = run_program(*arguments, cwd=cwd)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return outcome.stdout


def expect_failure(
    kind: type[SnapdError],
    *arguments: str | bytes,
    user: int = 0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run the program, which must fail with the error ``kind``, and return its only line."""
    outcome = run_program(*arguments, user=user, environment=environment)
    assert (outcome.returncode, outcome.stdout) == (STATUSES[kind], "")
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    return line
