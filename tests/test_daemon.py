"""The daemon as a process: its start, when there can be none, and what it tells systemd."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import stat
import struct
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.client import BlockingClient
from snapd_native.daemon import _Daemon
from snapd_native.errors import DataLoss
from snapd_native.private import private_bus
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire.names import BUS_NAME, DRIVER
from tests.daemons import Notifications, fails, started
from tests.filesystems import mounted
from tests.service import (
    NOBODY,
    PATIENCE,
    committed,
    connection,
    serving,
)


def test_the_name_is_taken_after_recovery(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with serving(on_bus, state), BlockingClient() as client:
        kept = committed(client, "base", files={"file": "text"})
    snapshots = state / "snapshots"
    for name in ("new-90", "rm-91", "92"):
        for number in range(200):
            (snapshots / name / str(number)).mkdir(parents=True)

    async def scenario() -> list[str]:
        async with asyncio.timeout(PATIENCE), connection() as bus:
            found: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

            def look(message: object) -> None:
                if getattr(message, "member", "") == "NameOwnerChanged" and not found.done():
                    found.set_result(os.listdir(snapshots))

            bus.add_message_handler(look)
            rule = f"type='signal',sender='{DRIVER}',member='NameOwnerChanged',arg0='{BUS_NAME}'"
            await bus.ask_driver("AddMatch", "s", [rule])
            await asyncio.to_thread(stack.enter_context, serving(on_bus, state))
            return await found

    with ExitStack() as stack:
        assert asyncio.run(scenario()) == [kept.name]


@pytest.mark.parametrize("watchdog", [False, True])
def test_what_systemd_is_told(
    on_bus: str, scratch: Path, notifications: Notifications, watchdog: bool
) -> None:
    state = scratch / "stäte"
    environment = {"WATCHDOG_USEC": "600000"} if watchdog else {}
    with started(on_bus, state, notifications, **environment) as daemon:
        before = notifications.until("READY=1")
        assert before[0].startswith("STATUS=")
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in before)
        assert before[-1] == f"STATUS=Serving {state}"
        assert "WATCHDOG=1" not in before
        for _ in range(3 if watchdog else 0):
            assert notifications.until("WATCHDOG=1")[-1] == "WATCHDOG=1"
        daemon.send_signal(signal.SIGTERM)
        after = notifications.until("STOPPING=1")
        assert ("WATCHDOG=1" in after) <= watchdog
        assert after[-1].startswith("STATUS=")


def test_a_disk_that_is_gone_stops_no_pings(
    on_bus: str, loop_directory: Path, notifications: Notifications
) -> None:
    """No restart would bring it back, and nobody would say what is the matter."""
    with (
        mounted("xfs", 320 << 20, loop_directory) as disk,
        started(on_bus, disk.root / "state", notifications, WATCHDOG_USEC="600000") as daemon,
        BlockingClient() as client,
    ):
        notifications.until("READY=1")
        shut_down(disk.root)
        with pytest.raises(DataLoss):
            client.list()
        for _ in range(3):
            notifications.until("WATCHDOG=1")
        daemon.send_signal(signal.SIGTERM)


def shut_down(root: Path) -> None:
    """Have a file system fail whatever is asked of it until it is unmounted."""
    fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # FS_IOC_SHUTDOWN with FSOP_GOING_FLAGS_NOLOGFLUSH.
        fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 2))
    finally:
        os.close(fd)


@pytest.mark.parametrize("lane", [Lane.READ, Lane.CHANGE])
def test_a_worker_that_hangs_stops_the_pings(
    scratch: Path, notifications: Notifications, monkeypatch: pytest.MonkeyPatch, lane: Lane
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(notifications.path))
    snapshotter = Snapshotter(scratch / "state", lambda *_: None)
    lanes, release = Lanes(), threading.Event()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        notifications.socket.setblocking(False)
        feeding = asyncio.ensure_future(
            _Daemon("a name", scratch, scratch, 0.1)._feed(0.001, lanes, snapshotter)
        )
        for _ in range(3):
            assert await loop.sock_recv(notifications.socket, 100) == b"WATCHDOG=1"
        hung = [
            asyncio.ensure_future(lanes.run(lane, 0, release.wait)) for _ in range(lane.threads)
        ]
        # One more than those that hang: the check of the watchdog itself, which waits.
        while lanes._admitted[lane, True] <= lane.threads:
            await asyncio.sleep(0)
        while True:
            try:
                notifications.socket.recv(100)
            except BlockingIOError:
                break
        for _ in range(1000):
            await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            notifications.socket.recv(100)
        release.set()
        assert await loop.sock_recv(notifications.socket, 100) == b"WATCHDOG=1"
        # A ping that nobody reads would hold up everything here.
        feeding.cancel()
        await asyncio.gather(*hung)

    try:
        asyncio.run(scenario())
    finally:
        release.set()
        lanes.close()
        snapshotter.close()


def test_one_daemon_a_state_directory(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with serving(on_bus, state), private_bus() as other, BlockingClient() as client:
        for address in (on_bus, other):
            status, line = fails(address, state)
            assert status == 1
            assert f"{state} is in use by another snapd-native daemon" in line
        client.prepare("key")


def test_one_daemon_a_bus(on_bus: str, scratch: Path) -> None:
    with serving(on_bus, scratch / "state"), BlockingClient() as client:
        status, line = fails(on_bus, scratch / "other")
        assert status == 1
        assert f"the name {BUS_NAME} is taken by another process" in line
        client.prepare("key")


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/socket", "nonsense", "unix:path="])
def test_without_a_bus_there_is_no_daemon(scratch: Path, address: str) -> None:
    status, line = fails(address, scratch / "state")
    assert status == 1
    assert "DBUS_SYSTEM_BUS_ADDRESS" in line


def test_a_bus_that_hangs_up_is_no_bus(scratch: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        status, line = fails(f"unix:path={tmp_path / 'socket'}", scratch / "state")
        thread.join()
    assert status == 1
    assert "the system bus does not answer" in line


def test_the_daemon_ends_with_its_bus(scratch: Path) -> None:
    with ExitStack() as stack:
        address = stack.enter_context(private_bus())
        with serving(address, scratch / "state", status=1) as service:
            stack.close()
            assert service.daemon.process.wait(PATIENCE) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends(on_bus: str, scratch: Path, number: signal.Signals) -> None:
    with serving(on_bus, scratch / "state") as service:
        service.daemon.process.send_signal(number)
        assert service.daemon.process.wait(PATIENCE) == 0


def test_only_root_may_start_it(on_bus: str, scratch: Path) -> None:
    status, line = fails(on_bus, scratch / "state", user=NOBODY)
    assert (status, line) == (11, "snapd-native: the daemon needs root: run it as root")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_nobody_else_may_look(on_bus: str, scratch: Path, mode: int | None) -> None:
    state = scratch / "state"
    if mode is not None:
        state.mkdir()
        state.chmod(mode)
        (state / "snapshots").mkdir()
        (state / "snapshots").chmod(mode)
    before = os.umask(0)
    try:
        with serving(on_bus, state), BlockingClient() as client:
            client.prepare("key")
            for path in (state, *state.iterdir()):
                allowed = 0o700 if path.is_dir() else 0o600
                assert stat.S_IMODE(path.stat().st_mode) == allowed
            assert {path.name for path in state.iterdir()} >= {"snapshots", "metadata.db"}
    finally:
        os.umask(before)


def test_a_start_in_a_place_that_cannot_be(on_bus: str, scratch: Path) -> None:
    (scratch / "file").touch()
    status, line = fails(on_bus, scratch / "file")
    assert status == 2
    assert "is a file" in line
    (scratch / "strange").mkdir(mode=0o700)
    (scratch / "strange" / "snapshots").symlink_to("/nowhere")
    status, line = fails(on_bus, scratch / "strange")
    assert status == 1
    assert "is not a directory" in line
    (scratch / "open" / "document").mkdir(parents=True)
    status, line = fails(on_bus, scratch / "open")
    assert status == 1
    assert "is not empty and open to others" in line
    (scratch / "foreign").mkdir()
    os.chown(scratch / "foreign", NOBODY, NOBODY)
    status, line = fails(on_bus, scratch / "foreign")
    assert status == 1
    assert f"belongs to uid {NOBODY}" in line
    (scratch / "broken" / "snapshots").mkdir(parents=True)
    (scratch / "broken" / "metadata.db").write_bytes(b"this is no database" * 1000)
    status, line = fails(on_bus, scratch / "broken")
    assert status == 1
    assert "restore it from a backup" in line
