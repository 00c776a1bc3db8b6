"""The script that runs the tests again and again until a run fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import PROJECT
from tests.support.markers import needs_program
from tests.support.waiting import WAIT_TIMEOUT, wait_until

SCRIPT = PROJECT / "tools" / "test-repeat"


def repeat(runs: int, kept: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, str(runs), kept, "sh", "-c", command], capture_output=True, text=True, check=False
    )


@pytest.mark.long
@needs_program("stress")
def test_every_second_run_runs_beside_a_load(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    done = repeat(4, kept, "pgrep -x stress >/dev/null && echo loaded || echo idle")
    assert (done.returncode, done.stderr) == (0, "")
    said = [line.split(": ") for line in done.stdout.splitlines()]
    assert [line[0] for line in said] == [
        "run 1 of 4",
        "run 2 of 4, beside a load",
        "run 3 of 4",
        "run 4 of 4, beside a load",
    ]
    # Other tests can run a load at the same time, so the other runs can see one too.
    assert [line[1].split(",")[0] for line in said][1::2] == ["loaded", "loaded"]
    assert [path.name for path in kept.iterdir()] == ["output"]


@pytest.mark.long
@needs_program("stress")
def test_a_run_ends_when_the_script_is_terminated(tmp_path: Path) -> None:
    begun, second = tmp_path / "begun", tmp_path / "second"
    second.touch()
    command = f"[ -e {begun} ] && echo $$ > {second} && exec sleep infinity; touch {begun}"
    script = [str(SCRIPT), "2", str(tmp_path / "kept"), "sh", "-c", command]
    with subprocess.Popen(script, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: second.read_text() != "")
        run = int(second.read_text())
        process.terminate()
        assert process.wait(WAIT_TIMEOUT) == 1
    assert not Path(f"/proc/{run}").exists()


@needs_program("stress")
def test_the_script_stops_at_the_first_failure_and_keeps_a_report(tmp_path: Path) -> None:
    kept, count = tmp_path / "kept", tmp_path / "count"
    done = repeat(9, kept, f"echo x >> {count}; echo last words; [ $(wc -l < {count}) -lt 2 ]")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert f"failed with status 1: see {kept}" in done.stderr
    assert sorted(path.name for path in kept.iterdir()) == [
        "dmesg",
        "mounts",
        "output",
        "processes",
    ]
    assert (kept / "output").read_text() == "last words\n"
