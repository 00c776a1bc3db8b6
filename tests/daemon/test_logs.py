"""The log of the daemon, in the journal of systemd or on standard error without one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapd_native import logs
from snapd_native.bus.incoming import Call
from snapd_native.bus.log import logged
from snapd_native.client import BlockingClient
from snapd_native.errors import (
    DataLoss,
    Internal,
    NotFound,
    ResourceExhausted,
    SnapdError,
    Unavailable,
)
from snapd_native.private import private_bus
from tests.support.service import NOBODY, as_user
from tests.support.waiting import wait_until

RUN_JOURNALD = """
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
exec /lib/systemd/systemd-journald
"""

Entry = dict[str, Any]


class Journal:
    """systemd's journal in a mount namespace of its own."""

    def __init__(self, pid: int) -> None:
        self._enter = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "--"]

    def command(self, *command: str) -> list[str]:
        """Return a command line that runs ``command`` with the journal as standard error."""
        journal = [
            "sh",
            "-c",
            'JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec "$@"',
            "sh",
        ]
        return [*self._enter, "systemd-cat", "--identifier=stderr", *journal, *command]

    def entries(self, *matches: str) -> list[Entry]:
        done = subprocess.run(
            [*self._enter, "journalctl", "--no-pager", "--quiet", "--output=json", *matches],
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def journal() -> Iterator[Journal]:
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", RUN_JOURNALD], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ready = Path(f"/proc/{process.pid}/root/run/systemd/journal/stdout")
            wait_until(lambda: ready.exists() or process.poll() is not None)
            yield Journal(process.pid)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with private_bus() as address:
        yield address


@contextmanager
def run_daemon_as_unit(
    prefix: Callable[..., list[str]], state: Path, *options: str
) -> Iterator[Path]:
    """Run a daemon as a unit does, during the block; yield the file with its standard error."""
    command = prefix(
        *(sys.executable, "-m", "snapd_native", "daemon", *options),
        *("--state-directory", str(state), "--runtime-directory", f"{state}-run"),
    )
    said = state.with_name("stderr")
    with said.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            with BlockingClient() as client:
                wait_until(lambda: is_serving(client))
            yield said
        finally:
            process.terminate()


def is_serving(client: BlockingClient) -> bool:
    try:
        client.service()
    except Unavailable:
        return False
    return True


def without_journal(*command: str) -> list[str]:
    return [*command]


@pytest.fixture(autouse=True)
def on_bus(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)


ODD_KEY = "a\nPRIORITY=0\nb"


def make_calls() -> None:
    with BlockingClient() as client:
        client.prepare("work")
        client.commit("base", "work", progress=lambda _: None)
        client.stat("base")
        client.view(ODD_KEY, "base")
        with pytest.raises(NotFound):
            client.remove("missing")
        subprocess.run(
            [*as_user(NOBODY), sys.executable, "-m", "snapd_native", "rm", "base"],
            capture_output=True,
            check=False,
        )
        client.update("base", {"a": "b"})


def test_the_journal_has_an_entry_for_each_change(journal: Journal, host_state: Path) -> None:
    with run_daemon_as_unit(journal.command, host_state) as said:
        begun = time.monotonic()
        make_calls()
        most = 1000 * (time.monotonic() - begun)
        wait_until(lambda: bool(journal.entries("SNAPD_NATIVE_OPERATION=Update")))
    assert said.read_text() == ""
    found = journal.entries("SYSLOG_IDENTIFIER=snapd-native")
    assert found[0]["MESSAGE"].startswith(f"serving {host_state} on ")
    operations = [entry for entry in found if "SNAPD_NATIVE_OPERATION" in entry]
    assert [(e["SNAPD_NATIVE_OPERATION"], e["SNAPD_NATIVE_KEY"]) for e in operations] == [
        ("Prepare", "work"),
        ("Commit", ["work", "base"]),
        ("View", ODD_KEY),
        ("Remove", "missing"),
        ("Update", "base"),
    ]
    for entry in operations:
        assert entry["PRIORITY"] == "6"
        assert entry["SNAPD_NATIVE_CALLER_UID"] == "0"
        assert entry["SNAPD_NATIVE_SENDER"].startswith(":1.")
        milliseconds = int(entry["SNAPD_NATIVE_DURATION_USEC"]) / 1000
        assert 0 < milliseconds <= most
        assert f"(uid 0, {milliseconds:.1f} ms)" in entry["MESSAGE"]
    prepared, committed, odd, removed, _ = operations
    assert prepared["MESSAGE"].startswith('Prepare key="work": done (')
    assert committed["SNAPD_NATIVE_NAME"] == "base"
    assert odd["MESSAGE"].startswith(r'View key="a\nPRIORITY=0\nb" parent="base": done (')
    assert 'Remove key="missing": ' in removed["MESSAGE"]
    assert removed["SNAPD_NATIVE_ERROR"] == "org.snapdnative1.Error.NotFound"
    assert "SNAPD_NATIVE_ERROR" not in committed
    keyed = journal.entries("SNAPD_NATIVE_KEY=missing")
    assert [entry["MESSAGE"] for entry in keyed] == [removed["MESSAGE"]]


LEVELS = {(): 5, ("--verbose",): 6, ("--quiet",): 0}


@pytest.mark.parametrize("options", LEVELS)
def test_the_daemon_logs_to_standard_error_without_a_journal(
    host_state: Path, options: tuple[str, ...]
) -> None:
    with run_daemon_as_unit(without_journal, host_state, *options) as said:
        make_calls()
    lines = said.read_text().splitlines()
    about_calls = [line for line in lines if "snapd_native.bus.log: " in line]
    assert len(about_calls) == LEVELS[options]
    assert len(lines) > len(about_calls) or options == ("--quiet",)
    assert all(line.startswith(("INFO", "DEBUG")) for line in lines)


def test_a_record_that_the_journal_rejects_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logs._JournalHandler(tmp_path / "no socket")
    record = logging.makeLogRecord({"name": "name", "msg": "one\ntwo", "levelno": logging.WARNING})
    handler.emit(record)
    handler.close()
    assert capsys.readouterr().err == "<4>one\n<4>two\n"


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (NotFound, logging.INFO),
        (ResourceExhausted, logging.WARNING),
        (DataLoss, logging.ERROR),
        (ZeroDivisionError, logging.ERROR),
    ],
)
def test_the_log_level_of_a_failed_call_depends_on_its_error(
    caplog: pytest.LogCaptureFixture, error: type[Exception], level: int
) -> None:
    call = Call(1, 0, ":1.1", "/", "", "Remove", "", 0, b"", 0)
    caplog.set_level(logging.DEBUG)
    kind = error if issubclass(error, SnapdError) else Internal
    with pytest.raises(kind) as caught, logged(call, 7, {"key": "k"}, changes=True):
        raise error("the text of the error")
    last = caplog.records[-1]
    assert last.levelno == level
    assert f'Remove key="k": {caught.value} (uid 7, ' in last.getMessage()
    # The traceback of the bug is logged once, and not sent to the client.
    assert sum(bool(record.exc_info) for record in caplog.records) == (kind is Internal)
    assert "ZeroDivisionError" not in str(caught.value)
