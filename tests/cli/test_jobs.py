"""Long commands: jobs, cancel, the progress bar, Ctrl-C, and standby clones."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native import errors
from snapd_native.cli.exits import INTERRUPTED, STATUSES
from snapd_native.client import BlockingClient, Job
from snapd_native.model import DIGEST_LABEL, STANDBY_LABEL
from tests.support.command_line import PROGRAM, output_of, run_program
from tests.support.file_systems import FileSystem, scratch_on
from tests.support.holding import hold_at_files
from tests.support.service import HANG_TIMEOUT, Service, commit_snapshot, run_daemon
from tests.support.waiting import wait_until, wait_until_equal

DIRECTORIES = 20
"""Directories in the tree that is copied, each with one file."""

MIDDLE = "7"
"""The directory at which tests hold up a copy."""

PIPE = subprocess.PIPE


@pytest.fixture(scope="module")
def module_service(bus: str, ext4: FileSystem) -> Iterator[Service]:
    """Run a daemon with the committed snapshot `big` for all tests of this file."""
    with (
        pytest.MonkeyPatch.context() as patch,
        scratch_on(ext4) as scratch,
        run_daemon(bus, scratch / "state") as service,
    ):
        patch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus)
        with BlockingClient() as client:
            files = {f"{number}/file": "text" for number in range(DIRECTORIES)}
            commit_snapshot(client, "big", files=files)
        yield service


@pytest.fixture
def emptied_service(module_service: Service, on_bus: str) -> Iterator[Service]:
    """Lend the daemon; after the test, delete everything but `big`."""
    assert on_bus == module_service.address
    yield module_service
    with BlockingClient() as client:
        wait_until_equal(client.jobs, [])
        infos = list(client.walk(["name!=big"]))
        for info in sorted(infos, key=lambda info: info.created, reverse=True):
            client.remove(info.name)
        client.cleanup()
        wait_until_equal(lambda: len(os.listdir(module_service.state / "snapshots")), 1)


@pytest.fixture
def big_tree(emptied_service: Service) -> Path:
    """Return the path of the tree of `big`."""
    (tree,) = (emptied_service.state / "snapshots").iterdir()
    return tree


@pytest.fixture
def client(emptied_service: Service) -> Iterator[BlockingClient]:
    with BlockingClient() as connected:
        yield connected


@contextmanager
def start_program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program during the block."""
    with subprocess.Popen([*PROGRAM, *arguments], stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_job(client: BlockingClient, key: str) -> Job:
    """Wait until a job on ``key`` is shown, and return it."""
    found: list[Job] = []

    def shown() -> bool:
        found[:] = [job for job in client.jobs() if job.key == key]
        return bool(found)

    wait_until(shown)
    return found[0]


def check_nothing_left_of(client: BlockingClient, service: Service, key: str) -> None:
    """Check that a Prepare has left nothing, and that its key is free."""
    with pytest.raises(errors.NotFound):
        client.stat(key)
    assert [info.name for info in client.walk()] == ["big"]
    assert len(os.listdir(service.state / "snapshots")) == 1
    client.prepare(key)


def test_jobs_prints_only_a_heading_when_no_job_runs(emptied_service: Service) -> None:
    assert output_of("jobs").split() == ["ID", "OPERATION", "KEY", "UID", "INODES", "SIZE"]
    assert json.loads(output_of("jobs", "--json")) == []


def test_jobs_shows_operation_key_uid_and_progress(client: BlockingClient, big_tree: Path) -> None:
    total = client.usage("big")
    with hold_at_files(big_tree / MIDDLE), start_program("prepare", "k\n1", "big") as process:
        job = wait_for_job(client, "k\n1")
        (row,) = json.loads(output_of("jobs", "--json"))
        assert row.pop("done").keys() == {"size", "inodes"}
        assert row == {
            "id": job.id,
            "operation": "prepare",
            "key": "k\n1",
            "uid": 0,
            "total": {"size": total.size, "inodes": total.inodes},
        }
        _, line = output_of("jobs").splitlines()
        assert line.split()[:4] == [str(job.id), "prepare", "k\\n1", "0"]
        assert line.count(f" of {total.inodes:,}") == 1
        assert output_of("cancel", str(job.id)) == ""
        assert process.wait(HANG_TIMEOUT) == STATUSES[errors.Cancelled]
        assert output_of("jobs").count("\n") == 1


def test_a_command_cancelled_by_another_process_exits_with_cancelled(
    emptied_service: Service, client: BlockingClient, big_tree: Path
) -> None:
    with hold_at_files(big_tree / MIDDLE), start_program("prepare", "one", "big") as one:
        first = wait_for_job(client, "one")
        with start_program("prepare", "two", "big") as two:
            second = wait_for_job(client, "two")
            assert output_of("cancel", str(first.id), str(second.id)) == ""
            for process, key in ((one, "one"), (two, "two")):
                stdout, stderr = process.communicate(timeout=HANG_TIMEOUT)
                assert process.returncode == STATUSES[errors.Cancelled] == 9
                assert stdout == ""
                (line,) = stderr.splitlines()
                assert line.startswith("snapd-native: ")
                assert f'"{key}" was cancelled' in line
    check_nothing_left_of(client, emptied_service, "one")
    client.prepare("two")


def test_a_cancelled_commit_leaves_the_active_snapshot_unchanged(
    client: BlockingClient,
) -> None:
    tree = Path(client.prepare("key", "big", {"a": "b"}).source)
    before = client.stat("key")
    with hold_at_files(tree / MIDDLE / "file"), start_program("commit", "name", "key") as process:
        job = wait_for_job(client, "key")
        assert job.operation == "commit"
        assert output_of("cancel", str(job.id)) == ""
        assert process.wait(HANG_TIMEOUT) == 9
    assert client.stat("key") == before
    client.commit("name", "key")


@pytest.mark.parametrize("ids", [["0"], ["4294967295"], ["99999999999999999999"]])
def test_cancel_of_an_unknown_job_exits_with_not_found(
    emptied_service: Service, ids: Sequence[str]
) -> None:
    outcome = run_program("cancel", *ids)
    assert outcome.returncode == STATUSES[errors.NotFound]
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    assert ids[0] in line


@pytest.mark.parametrize("ids", [[], ["x"], ["-1"], ["1.5"]])
def test_cancel_without_a_valid_number_is_wrong_usage(
    emptied_service: Service, ids: Sequence[str]
) -> None:
    outcome = run_program("cancel", *ids)
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1


def test_ctrl_c_in_the_middle_of_a_copy_undoes_prepare(
    emptied_service: Service, client: BlockingClient, big_tree: Path
) -> None:
    with (
        hold_at_files(big_tree / MIDDLE) as copy,
        start_program("prepare", "key", "big") as process,
    ):
        copy.wait_until_reached()
        wait_for_job(client, "key")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_TIMEOUT)
        assert (process.returncode, stdout, stderr.strip()) == (INTERRUPTED, "", "")
        assert INTERRUPTED == 130
        # The program ends after its job is undone.
        assert client.jobs() == []
    check_nothing_left_of(client, emptied_service, "key")


def test_ctrl_c_during_commit_changes_nothing(client: BlockingClient) -> None:
    tree = Path(client.prepare("key", "big").source)
    before = client.stat("key")
    with hold_at_files(tree / MIDDLE / "file"), start_program("commit", "name", "key") as process:
        wait_for_job(client, "key")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG_TIMEOUT)
        assert process.returncode == INTERRUPTED
        assert "Traceback" not in stderr
        assert client.jobs() == []
    assert client.stat("key") == before


@pytest.fixture
def tree_with_digest(client: BlockingClient) -> Path:
    """Commit `done` and `gone` with digests; return the path of the tree of `done`."""
    for name in ("gone", "done"):
        tree = Path(client.prepare(f"{name} in the making", "big").source)
        client.commit(name, f"{name} in the making", digest=True)
    return tree


def test_ctrl_c_during_verify_ends_its_job(client: BlockingClient, tree_with_digest: Path) -> None:
    with hold_at_files(tree_with_digest / MIDDLE), start_program("verify", "done") as process:
        assert wait_for_job(client, "done").operation == "verify"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_TIMEOUT)
        assert (process.returncode, stdout, stderr.strip()) == (INTERRUPTED, "", "")
        assert client.jobs() == []
    client.verify("done")


def test_verify_of_all_ignores_a_snapshot_removed_before_its_turn(
    client: BlockingClient, tree_with_digest: Path
) -> None:
    client.prepare("work", labels={DIGEST_LABEL: "yes"})
    with ExitStack() as stack:
        with hold_at_files(tree_with_digest / MIDDLE):
            process = stack.enter_context(start_program("verify"))
            wait_for_job(client, "done")
            client.remove("gone")
        stdout, stderr = process.communicate(timeout=HANG_TIMEOUT)
        assert (process.returncode, stderr) == (0, "")
        assert [line.split()[-1] for line in stdout.splitlines()] == ["done"]
    assert run_program("verify", "gone").returncode == STATUSES[errors.NotFound]


def test_verify_on_a_terminal_shows_a_progress_bar(tree_with_digest: Path) -> None:
    with ExitStack() as stack:
        with hold_at_files(tree_with_digest / MIDDLE):
            master, process = stack.enter_context(start_on_terminal("verify", "done"))
            shown = read_terminal(master, "inodes")
        shown += read_terminal(master)
        assert process.wait(HANG_TIMEOUT) == 0
    assert "Verifying done" in shown
    assert "━" in shown


@contextmanager
def start_on_terminal(
    *arguments: str, term: str = "xterm"
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run the program with its stderr on a terminal, and its stdout in a pipe."""
    master, slave = pty.openpty()
    try:
        with subprocess.Popen(
            [*PROGRAM, *arguments],
            stdout=PIPE,
            stderr=slave,
            text=True,
            env={**os.environ, "COLUMNS": "120", "TERM": term},
        ) as process:
            os.close(slave)
            try:
                yield master, process
            finally:
                process.kill()
    finally:
        os.close(master)


def read_terminal(master: int, until: str = "") -> str:
    """Read the output of a terminal until it contains ``until``, or to its end."""
    shown = b""
    # A read fails with EIO when no process has the terminal open any more.
    with suppress(OSError):
        while (not until or until.encode() not in shown) and (chunk := os.read(master, 4096)):
            shown += chunk
    return shown.decode(errors="replace")


def test_prepare_on_a_terminal_shows_a_progress_bar(client: BlockingClient, big_tree: Path) -> None:
    with ExitStack() as stack:
        # The root counts as one of these opens.
        with hold_at_files(big_tree, after=DIRECTORIES // 2):
            master, process = stack.enter_context(start_on_terminal("prepare", "k[red]\x1b", "big"))
            shown = read_terminal(master, "inodes")
        shown += read_terminal(master)
        assert process.wait(HANG_TIMEOUT) == 0
        assert process.stdout is not None
        assert process.stdout.read().startswith("bind\t")
    assert "Preparing k[red]\\x1b" in shown
    assert "━" in shown
    counts = [int(count.replace(",", "")) for count in re.findall(r"([0-9,]+) inodes", shown)]
    assert counts
    assert counts == sorted(counts)
    assert 0 < counts[0] <= client.usage("big").inodes


def test_a_quick_command_shows_no_progress_bar(emptied_service: Service) -> None:
    with start_on_terminal("prepare", "quick") as (master, process):
        assert read_terminal(master) == ""
        assert process.wait(HANG_TIMEOUT) == 0


def test_ctrl_c_during_the_progress_bar_restores_the_terminal(
    emptied_service: Service, client: BlockingClient, big_tree: Path
) -> None:
    with (
        hold_at_files(big_tree, after=DIRECTORIES // 2),
        start_on_terminal("prepare", "key", "big") as (master, process),
    ):
        shown = read_terminal(master, "Preparing")
        process.send_signal(signal.SIGINT)
        shown += read_terminal(master)
        assert process.wait(HANG_TIMEOUT) == INTERRUPTED
    assert "Traceback" not in shown
    # The cursor was hidden while the bar moved.
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    check_nothing_left_of(client, emptied_service, "key")


def test_a_command_without_a_terminal_shows_no_progress_bar(
    emptied_service: Service, client: BlockingClient
) -> None:
    outcome = run_program("prepare", "key", "big")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert len(outcome.stdout.splitlines()) == 1
    outcome = run_program("commit", "name", "key")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")


def test_stat_shows_standby_clones_only_for_a_snapshot_with_the_label(
    emptied_service: Service, client: BlockingClient
) -> None:
    commit_snapshot(client, "base", files={"file": "text"})
    assert "Standby" not in output_of("stat", "base")
    assert "standby" not in json.loads(output_of("stat", "--json", "base"))
    output_of("label", "base", f"{STANDBY_LABEL}=2")
    wait_until_equal(lambda: client.standby("base").ready, 2)
    assert re.search(r"^Standby +2 of 2 clones ready$", output_of("stat", "base"), re.MULTILINE)
    assert json.loads(output_of("stat", "--json", "base"))["standby"] == {"ready": 2, "wanted": 2}
    assert emptied_service.call("Standby", "s", "base").stdout == "uu 2 2\n"
    output_of("prepare", "work", "base")
    assert "Standby" not in output_of("stat", "work")
    output_of("label", "base", f"{STANDBY_LABEL}-")
    assert "Standby" not in output_of("stat", "base")
    assert emptied_service.call("Standby", "s", "base").stdout == "uu 0 0\n"


def test_a_bad_standby_label_exits_with_invalid_argument(
    emptied_service: Service, client: BlockingClient
) -> None:
    client.prepare("key")
    for arguments in (
        ("label", "big", f"{STANDBY_LABEL}=65"),
        ("prepare", "new", "-l", f"{STANDBY_LABEL}=x"),
        ("commit", "name", "key", "-l", f"{STANDBY_LABEL}=-1"),
    ):
        outcome = run_program(*arguments)
        assert outcome.returncode == STATUSES[errors.InvalidArgument]
        (line,) = outcome.stderr.splitlines()
        assert STANDBY_LABEL in line
    assert [info.name for info in client.walk()] == ["big", "key"]


@pytest.mark.parametrize("percent", ["-1", "101", "x"])
def test_a_bad_standby_free_percentage_is_wrong_usage(tmp_path: Path, percent: str) -> None:
    state = tmp_path / "state"
    outcome = run_program("daemon", "--state-directory", str(state), "--standby-free", percent)
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert not state.exists()
