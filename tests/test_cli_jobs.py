"""Long work on the command line: jobs, cancel, the progress bar, Ctrl-C, and standby clones."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native import errors
from snapd_native.cli.exits import INTERRUPTED, STATUSES
from snapd_native.client import BlockingClient, Job
from snapd_native.model import DIGEST_LABEL, STANDBY_LABEL
from tests.filesystems import FileSystem, scratch_on
from tests.service import PATIENCE, Service, committed, committed_big, serving
from tests.waiting import eventually
from tests.watching import workers

FILES = 20_000

PROGRAM = [sys.executable, "-m", "snapd_native"]

PIPE = subprocess.PIPE


@pytest.fixture(scope="module")
def lasting(bus: str, ext4: FileSystem) -> Iterator[Service]:
    """Run a daemon for all tests here; it has `big`, and a crew."""
    with (
        pytest.MonkeyPatch.context() as patch,
        scratch_on(ext4) as scratch,
        serving(bus, scratch / "state") as service,
    ):
        patch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus)
        with BlockingClient() as client:
            committed_big(client, "big", FILES)
        yield service


@pytest.fixture
def served(lasting: Service, on_bus: str) -> Iterator[Service]:
    """Lend the daemon, of which nothing but `big` may be left by then."""
    assert on_bus == lasting.address
    yield lasting
    with BlockingClient() as client:
        eventually(lambda: not client.jobs())
        infos = list(client.walk(["name!=big"]))
        for info in sorted(infos, key=lambda info: info.created, reverse=True):
            client.remove(info.name)
        client.cleanup()
        eventually(lambda: len(os.listdir(lasting.state / "snapshots")) == 1)


@pytest.fixture
def client(served: Service) -> Iterator[BlockingClient]:
    with BlockingClient() as connected:
        yield connected


@contextmanager
def stopped_crew(service: Service) -> Iterator[Callable[[], None]]:
    """Have all copying and measuring wait; what has begun goes on only afterwards.

    Yields what stops those workers too that were hired since.
    """
    pids: set[int] = set()

    def stop() -> None:
        for pid in workers(service):
            os.kill(pid, signal.SIGSTOP)
            pids.add(pid)

    with BlockingClient() as client:
        # Cancelling has ended those that were there.
        client.prepare("hiring")
        client.usage("hiring")
        client.remove("hiring")
        client.cleanup()
    stop()
    assert pids
    try:
        yield stop
    finally:
        # Those of a cancelled job are killed.
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def begun(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program meanwhile."""
    with subprocess.Popen([*PROGRAM, *arguments], stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def out(*arguments: str) -> str:
    outcome = program(*arguments)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return outcome.stdout


def job_of(client: BlockingClient, key: str) -> Job:
    """Return the job on ``key`` when it is shown."""
    found: list[Job] = []

    def shown() -> bool:
        found[:] = [job for job in client.jobs() if job.key == key]
        return bool(found)

    eventually(shown)
    return found[0]


def nothing_of(client: BlockingClient, service: Service, key: str) -> None:
    """Check that a Prepare has left nothing, and that its key is free."""
    with pytest.raises(errors.NotFound):
        client.stat(key)
    assert [info.name for info in client.walk()] == ["big"]
    assert len(os.listdir(service.state / "snapshots")) == 1
    client.prepare(key)


def test_without_jobs_there_is_only_a_heading(served: Service) -> None:
    assert out("jobs").split() == ["ID", "OPERATION", "KEY", "UID", "INODES", "SIZE"]
    assert json.loads(out("jobs", "--json")) == []


def test_jobs_shows_what_is_done_for_whom_and_how_far_it_is(
    served: Service, client: BlockingClient
) -> None:
    total = client.usage("big")
    with stopped_crew(served), begun("prepare", "k\n1", "big") as process:
        job = job_of(client, "k\n1")
        (row,) = json.loads(out("jobs", "--json"))
        assert row.pop("done").keys() == {"size", "inodes"}
        assert row == {
            "id": job.id,
            "operation": "prepare",
            "key": "k\n1",
            "uid": 0,
            "total": {"size": total.size, "inodes": total.inodes},
        }
        _, line = out("jobs").splitlines()
        assert line.split()[:4] == [str(job.id), "prepare", "k\\n1", "0"]
        assert line.count(f" of {total.inodes:,}") == 1
        assert out("cancel", str(job.id)) == ""
        assert process.wait(PATIENCE) == STATUSES[errors.Cancelled]
        assert out("jobs").count("\n") == 1


def test_what_somebody_else_cancels_ends_with_a_status_of_its_own(
    served: Service, client: BlockingClient
) -> None:
    with stopped_crew(served) as stop, begun("prepare", "one", "big") as one:
        first = job_of(client, "one")
        with begun("prepare", "two", "big") as two:
            second = job_of(client, "two")
            stop()
            assert out("cancel", str(first.id), str(second.id)) == ""
            for process, key in ((one, "one"), (two, "two")):
                stdout, stderr = process.communicate(timeout=PATIENCE)
                assert process.returncode == STATUSES[errors.Cancelled] == 9
                assert stdout == ""
                (line,) = stderr.splitlines()
                assert line.startswith("snapd-native: ")
                assert f'"{key}" was cancelled' in line
    nothing_of(client, served, "one")
    client.prepare("two")


def test_a_commit_is_cancelled_and_its_key_is_as_before(
    served: Service, client: BlockingClient
) -> None:
    client.prepare("key", "big", {"a": "b"})
    before = client.stat("key")
    with stopped_crew(served), begun("commit", "name", "key") as process:
        job = job_of(client, "key")
        assert job.operation == "commit"
        assert out("cancel", str(job.id)) == ""
        assert process.wait(PATIENCE) == 9
    assert client.stat("key") == before
    client.commit("name", "key")


@pytest.mark.parametrize("ids", [["0"], ["4294967295"], ["99999999999999999999"]])
def test_a_job_that_is_not_there_cannot_be_cancelled(served: Service, ids: Sequence[str]) -> None:
    outcome = program("cancel", *ids)
    assert outcome.returncode == STATUSES[errors.NotFound]
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("snapd-native: ")
    assert ids[0] in line


@pytest.mark.parametrize("ids", [[], ["x"], ["-1"], ["1.5"]])
def test_cancel_of_no_number_is_wrong_usage(served: Service, ids: Sequence[str]) -> None:
    outcome = program("cancel", *ids)
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1


def test_ctrl_c_in_a_prepare_leaves_nothing(served: Service, client: BlockingClient) -> None:
    with stopped_crew(served), begun("prepare", "key", "big") as process:
        job_of(client, "key")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == INTERRUPTED == 130
        assert stdout == ""
        assert "Traceback" not in stderr
        # It returned when all was undone.
        assert client.jobs() == []
    nothing_of(client, served, "key")


def test_ctrl_c_in_the_middle_of_a_copy_leaves_nothing(
    served: Service, client: BlockingClient
) -> None:
    top = served.state / "snapshots"

    def half_done() -> bool:
        return any(
            len(os.listdir(top / name)) > 3 for name in os.listdir(top) if name.startswith("new-")
        )

    with begun("prepare", "key", "big") as process:
        eventually(half_done)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert (process.returncode, stdout, stderr.strip()) == (INTERRUPTED, "", "")
    nothing_of(client, served, "key")


def test_ctrl_c_in_a_commit_changes_nothing(served: Service, client: BlockingClient) -> None:
    client.prepare("key", "big")
    before = client.stat("key")
    with stopped_crew(served), begun("commit", "name", "key") as process:
        job_of(client, "key")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == INTERRUPTED
        assert "Traceback" not in stderr
        assert client.jobs() == []
    assert client.stat("key") == before


@pytest.fixture
def sealed(client: BlockingClient) -> None:
    """Commit `done` and `gone`, and have somebody who can verify them."""
    for name in ("done", "gone"):
        client.prepare(f"{name} in the making", "big")
        client.commit(name, f"{name} in the making", digest=True)
    client.verify("done")


@pytest.mark.usefixtures("sealed")
def test_ctrl_c_in_a_verify_ends_its_job(served: Service, client: BlockingClient) -> None:
    with stopped_crew(served), begun("verify", "done") as process:
        assert job_of(client, "done").operation == "verify"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert (process.returncode, stdout, stderr.strip()) == (INTERRUPTED, "", "")
        assert client.jobs() == []
    client.verify("done")


@pytest.mark.usefixtures("sealed")
def test_what_is_removed_before_it_is_verified_is_no_failure(
    served: Service, client: BlockingClient
) -> None:
    client.prepare("work", labels={DIGEST_LABEL: "yes"})
    with ExitStack() as stack:
        with stopped_crew(served):
            process = stack.enter_context(begun("verify"))
            job_of(client, "done")
            client.remove("gone")
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert (process.returncode, stderr) == (0, "")
        assert [line.split()[-1] for line in stdout.splitlines()] == ["done"]
    assert program("verify", "gone").returncode == STATUSES[errors.NotFound]


@pytest.mark.usefixtures("sealed")
def test_a_verify_on_a_terminal_shows_a_bar(served: Service) -> None:
    with on_terminal("verify", "done") as (master, process):
        shown = read_terminal(master)
        assert process.wait(PATIENCE) == 0
    assert "Verifying done" in shown
    assert "━" in shown


@contextmanager
def on_terminal(
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


def read_terminal(master: int) -> str:
    shown = b""
    # EIO is how a terminal says that nobody writes any more.
    with suppress(OSError):
        while chunk := os.read(master, 4096):
            shown += chunk
    return shown.decode()


def test_a_prepare_on_a_terminal_shows_a_bar(served: Service, client: BlockingClient) -> None:
    with on_terminal("prepare", "k[red]\x1b", "big") as (master, process):
        shown = read_terminal(master)
        assert process.wait(PATIENCE) == 0
        assert process.stdout is not None
        assert process.stdout.read().startswith("bind\t")
    assert "Preparing k[red]\\x1b" in shown
    assert "━" in shown
    counts = [int(count.replace(",", "")) for count in re.findall(r"([0-9,]+) inodes", shown)]
    assert counts
    assert counts == sorted(counts)
    assert 0 < counts[0] <= client.usage("big").inodes


def test_what_is_quick_shows_no_bar(served: Service) -> None:
    with on_terminal("prepare", "quick") as (master, process):
        assert read_terminal(master) == ""
        assert process.wait(PATIENCE) == 0


def test_a_bar_that_is_interrupted_leaves_the_terminal_as_it_was(
    served: Service, client: BlockingClient
) -> None:
    with on_terminal("prepare", "key", "big") as (master, process):
        shown = ""
        while "Preparing" not in shown:
            shown += os.read(master, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        shown += read_terminal(master)
        assert process.wait(PATIENCE) == INTERRUPTED
    assert "Traceback" not in shown
    # The cursor was hidden while the bar moved.
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    nothing_of(client, served, "key")


def test_without_a_terminal_there_is_no_bar(served: Service, client: BlockingClient) -> None:
    outcome = program("prepare", "key", "big")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert len(outcome.stdout.splitlines()) == 1
    outcome = program("commit", "name", "key")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")


def test_stat_shows_standby_clones_where_some_are_wanted(
    served: Service, client: BlockingClient
) -> None:
    committed(client, "base", files={"file": "text"})
    assert "Standby" not in out("stat", "base")
    assert "standby" not in json.loads(out("stat", "--json", "base"))
    out("label", "base", f"{STANDBY_LABEL}=2")
    eventually(lambda: client.standby("base").ready == 2)
    assert re.search(r"^Standby +2 of 2 clones ready$", out("stat", "base"), re.MULTILINE)
    assert json.loads(out("stat", "--json", "base"))["standby"] == {"ready": 2, "wanted": 2}
    assert served.call("Standby", "s", "base").stdout == "uu 2 2\n"
    out("prepare", "work", "base")
    assert "Standby" not in out("stat", "work")
    out("label", "base", f"{STANDBY_LABEL}-")
    assert "Standby" not in out("stat", "base")
    assert served.call("Standby", "s", "base").stdout == "uu 0 0\n"


def test_a_label_that_is_no_number_of_clones_is_refused(
    served: Service, client: BlockingClient
) -> None:
    client.prepare("key")
    for arguments in (
        ("label", "big", f"{STANDBY_LABEL}=65"),
        ("prepare", "new", "-l", f"{STANDBY_LABEL}=x"),
        ("commit", "name", "key", "-l", f"{STANDBY_LABEL}=-1"),
    ):
        outcome = program(*arguments)
        assert outcome.returncode == STATUSES[errors.InvalidArgument]
        (line,) = outcome.stderr.splitlines()
        assert STANDBY_LABEL in line
    assert [info.name for info in client.walk()] == ["big", "key"]


@pytest.mark.parametrize("percent", ["-1", "101", "x"])
def test_a_percentage_that_cannot_be_is_wrong_usage(tmp_path: Path, percent: str) -> None:
    state = tmp_path / "state"
    outcome = program("daemon", "--state-directory", str(state), "--standby-free", percent)
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert not state.exists()
