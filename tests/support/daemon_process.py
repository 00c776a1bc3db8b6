"""Daemons as processes: start them, and receive their notifications to systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.service import HANG_TIMEOUT, as_user


def daemon_command(state: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "snapd_native", "daemon"),
        *("--state-directory", str(state)),
        *("--runtime-directory", f"{state}-run"),
    ]


def expect_start_failure(
    address: str, state: Path, user: int = 0, through: Sequence[str] = ()
) -> tuple[int, str]:
    """Start a daemon that must fail, with another program if ``through`` names one.

    Return its exit status and its only line.
    """
    done = subprocess.run(
        [*through, *as_user(user), *daemon_command(state)],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG_TIMEOUT,
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.returncode, line


class Notifications:
    """The notifications of a daemon to systemd; see sd_notify(3)."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(HANG_TIMEOUT)

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            yield self.socket.recv(4096).decode().splitlines()

    def read_until(self, line: str) -> list[str]:
        """Return all lines up to the first ``line``."""
        seen: list[str] = []
        for lines in self:
            seen += lines
            if line in lines:
                return seen
        raise AssertionError


DAEMON_WITHOUT_GRACE = """
import sys
from pathlib import Path
from snapd_native import daemon
daemon.GRACE = 0
sys.exit(daemon.run("org.snapdnative1", Path({state!r}), Path({state!r} + "-run"), 0.1))
"""
"""A daemon that gives running calls no time when it ends."""


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[Notifications]:
    made = Notifications(tmp_path)
    yield made
    made.socket.close()


@contextmanager
def start_daemon(
    bus: str, state: Path, notifications: Notifications, program: str = "", **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a daemon, or ``program``. The block must end it."""
    process = subprocess.Popen(
        [sys.executable, "-c", program] if program else daemon_command(state),
        env={
            **os.environ,
            **environment,
            "DBUS_SYSTEM_BUS_ADDRESS": bus,
            "NOTIFY_SOCKET": str(notifications.path),
        },
    )
    try:
        yield process
        assert process.wait(HANG_TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
