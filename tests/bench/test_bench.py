"""The benchmark, run on trees that are too small to measure speed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import metastore
from bench.disks import shortage
from bench.results import Case
from bench.trees import GROWTH, ROOTFS, TREES
from tests.support import PROJECT
from tests.support.file_systems import FileSystem
from tests.support.service import HANG_TIMEOUT, processes_marked

# Only the benchmark needs containerd, grpc and matplotlib, so they may be missing.
PEERS = ["containerd", "cp"] if shutil.which("containerd") and find_spec("grpc") else ["cp"]
HAS_MATPLOTLIB = find_spec("matplotlib") is not None


class Benchmark:
    """A benchmark on one file system that keeps all its files in one directory."""

    def __init__(self, directory: Path, filesystem: str) -> None:
        self._mark = uuid.uuid4().hex
        self._directory = directory
        self._temporary = directory / "tmp"
        self._temporary.mkdir()
        self._command = [
            *(sys.executable, "-m", "bench", "--scale", "0.002", "--rounds", "1"),
            *("--peers", ",".join(PEERS), "--filesystems", filesystem),
            *("--directory", str(directory)),
        ]

    def start(self, *options: str | Path) -> subprocess.Popen[str]:
        """Start the benchmark as a shell does, in a new process group."""
        return subprocess.Popen(
            [*self._command, *options],
            cwd=PROJECT,
            env={**os.environ, "TMPDIR": str(self._temporary), "SNAPD_NATIVE_TEST": self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def check_nothing_left(self) -> None:
        """Check that no process, file or mount is left; `loop_directory` checks loop devices."""
        assert processes_marked(self._mark) == []
        assert list(self._temporary.iterdir()) == []
        assert list(self._directory.iterdir()) == [self._temporary]
        assert str(self._directory) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def benchmark(ext4: FileSystem, loop_directory: Path) -> Iterator[Benchmark]:
    # If no file system can be mounted, the fixture `ext4` skips the test.
    with tempfile.TemporaryDirectory(dir=loop_directory) as directory:
        yield Benchmark(Path(directory), ext4.name)


@pytest.mark.long
def test_the_benchmark_measures_every_case(benchmark: Benchmark, tmp_path: Path) -> None:
    found, document, plot = (tmp_path / name for name in ("found.json", "found.md", "plot.svg"))
    document.write_text("above\n<!-- results: begin -->\nold\n<!-- results: end -->\nbelow\n")
    drawing: list[str | Path] = ["--plot", plot] if HAS_MATPLOTLIB else []
    running = benchmark.start("--json", found, "--document", document, *drawing)
    out, error = running.communicate(timeout=HANG_TIMEOUT)
    assert running.returncode == 0, error
    benchmark.check_nothing_left()

    results = json.loads(found.read_text())
    keepers = {"snapd-native", *PEERS} - {"cp"}
    measured = {(one["case"], one["tree"]): set(one["seconds"]) for one in results["samples"]}
    expected = {(case, ROOTFS.name): keepers for case in Case if not case.on_trees}
    expected |= {(Case.PREPARE, tree): {"snapd-native", *PEERS} for tree in TREES}
    ready = [tree.name for tree in (ROOTFS, *GROWTH)]
    expected |= {(Case.STANDBY, tree): {"snapd-native"} for tree in ready}
    assert measured == expected
    taken = [values for one in results["samples"] for values in one["seconds"].values()]
    assert all(value > 0 for values in taken for value in values)
    assert keepers <= set(results["peak_memory_bytes"]["ext4"])
    assert set(results["filesystems"]) == {"ext4"}

    text = document.read_text()
    for case in ("Prepare rootfs", "Prepare small-10k", "Stat, p99", "View + Remove, busy"):
        assert case in out
        assert f"| {case} |" in text
    assert text.startswith("above\n<!-- results: begin -->\n\n|")
    assert text.endswith("|\n\n<!-- results: end -->\nbelow\n")
    assert plot.exists() == HAS_MATPLOTLIB


@pytest.mark.parametrize("interrupt", ["ctrl-c", "sigterm"])
def test_an_interrupted_benchmark_leaves_no_process_file_or_mount(
    benchmark: Benchmark, tmp_path: Path, interrupt: str
) -> None:
    running = benchmark.start("--json", tmp_path / "found.json")
    assert running.stdout is not None
    # The benchmark prints the heading when all services run.
    while "vs cp" not in running.stdout.readline():
        assert running.poll() is None
    if interrupt == "ctrl-c":
        os.killpg(running.pid, signal.SIGINT)
    else:
        running.terminate()
    running.communicate(timeout=HANG_TIMEOUT)
    assert running.returncode == 1
    benchmark.check_nothing_left()
    assert not (tmp_path / "found.json").exists()


def test_an_unknown_tree_name_exits_with_2(benchmark: Benchmark) -> None:
    running = benchmark.start("--trees", "rootfs,forest")
    _, error = running.communicate(timeout=HANG_TIMEOUT)
    assert running.returncode == 2
    assert "'forest' is none of rootfs, " in error
    benchmark.check_nothing_left()


def test_shortage_states_the_space_that_is_needed(tmp_path: Path) -> None:
    assert shortage(tmp_path, 0) == ""
    assert "GiB are needed" in shortage(tmp_path, 1 << 60)


@pytest.mark.long
@pytest.mark.skipif("containerd" not in PEERS, reason="needs containerd and grpcio")
def test_the_plugin_benchmark_measures_every_call(
    ext4: FileSystem, xfs: FileSystem, loop_directory: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=loop_directory) as directory:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench.plugin", "--scale", "0.002", "--rounds", "1"),
                *("--directory", directory),
            ],
            cwd=PROJECT,
            check=False,
            capture_output=True,
            text=True,
            timeout=HANG_TIMEOUT,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert list(Path(directory).iterdir()) == []
    for row in ("unpack", "Prepare", "Remove", "Stat of the plugin", "Stat over D-Bus", "space"):
        assert done.stdout.count(f"│ {row}") == 2


def test_the_metastore_benchmark_measures_every_call(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metastore, "SIZES", (100, 200))
    calls = {name: (call, 2) for name, (call, _) in metastore.CALLS.items()}
    monkeypatch.setattr(metastore, "CALLS", calls)
    output = scratch / "output.json"
    options = ["--directory", str(scratch), "--json", str(output)]
    outcome = CliRunner().invoke(metastore.main, options, catch_exceptions=False)
    assert outcome.exit_code == 0
    medians = json.loads(output.read_text())["median_seconds"]
    assert list(medians) == list(calls)
    assert all(seconds > 0 for pair in medians.values() for seconds in pair)
    assert [path.name for path in scratch.iterdir()] == ["output.json"]
