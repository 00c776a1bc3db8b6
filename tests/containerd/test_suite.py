"""containerd's own tests of a snapshotter, through its client for snapshots plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import PROJECT
from tests.support.service import HANG_TIMEOUT, Service

pytestmark = pytest.mark.long

CASES = 21
"""Cases in the suite of containerd 1.6, Debian 12's."""

SOURCES = Path("/usr/share/gocode")
"""Where Debian's packages of Go libraries have their sources."""

ISSUES = SOURCES / "src/github.com/containerd/containerd/snapshots/testsuite/issues.go"

SKIP = '\tt.Skip("rename test still fails on some kernels with overlay")\n'
"""A line of ISSUES, by which one case skips itself for every snapshotter."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the suite with all its cases, and return the program."""
    directory = tmp_path_factory.mktemp("suite")
    source = ISSUES.read_text()
    assert SKIP in source
    (directory / "issues.go").write_text(source.replace(SKIP, ""))
    replaced = {"Replace": {str(ISSUES): f"{directory}/issues.go"}}
    (directory / "overlay.json").write_text(json.dumps(replaced))
    subprocess.run(
        [
            *("go", "test", "-c", "-o", directory / "suite"),
            *("-overlay", directory / "overlay.json"),
            Path(__file__).parent / "suite" / "suite_test.go",
        ],
        env={
            **os.environ,
            "GO111MODULE": "off",
            "GOPATH": str(SOURCES),
            "GOCACHE": f"{directory}/cache",
        },
        check=True,
    )
    return directory / "suite"


def test_the_plugin_passes_containerds_own_suite(shared_service: Service, suite: Path) -> None:
    # The path of a socket is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="snapd-native-suite-") as directory:
        done = subprocess.run(
            [suite, "-test.v", f"-test.timeout={HANG_TIMEOUT}s"],
            cwd=PROJECT,
            env={**os.environ, "PYTHON": sys.executable, "TMPDIR": directory},
            check=False,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-5000:]
    ended = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("    --- ")]
    assert ended == ["PASS:"] * CASES
