"""The start of the daemon process, its refusals to start, and its notifications to systemd."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.client import BlockingClient
from snapd_native.daemon import _WAITING, _Daemon
from snapd_native.errors import DataLoss, SnapdError
from snapd_native.private import private_bus
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire.names import BUS_NAME, DRIVER
from tests.support.daemon_process import Notifications, expect_start_failure, start_daemon
from tests.support.file_systems import long_on_xfs, new_file_system, shut_down
from tests.support.service import (
    HANG_TIMEOUT,
    NOBODY,
    commit_snapshot,
    connection,
    run_daemon,
)

pytestmark = long_on_xfs


def test_the_daemon_takes_its_bus_name_after_recovery(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with run_daemon(on_bus, state), BlockingClient() as client:
        kept = commit_snapshot(client, "base", files={"file": "text"})
    snapshots = state / "snapshots"
    for name in ("new-90", "rm-91", "92"):
        for number in range(200):
            (snapshots / name / str(number)).mkdir(parents=True)

    async def scenario() -> list[str]:
        async with asyncio.timeout(HANG_TIMEOUT), connection() as bus:
            found: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

            def look(message: object) -> None:
                if getattr(message, "member", "") == "NameOwnerChanged" and not found.done():
                    found.set_result(os.listdir(snapshots))

            bus.add_message_handler(look)
            rule = f"type='signal',sender='{DRIVER}',member='NameOwnerChanged',arg0='{BUS_NAME}'"
            await bus.ask_driver("AddMatch", "s", [rule])
            await asyncio.to_thread(stack.enter_context, run_daemon(on_bus, state))
            return await found

    with ExitStack() as stack:
        assert asyncio.run(scenario()) == [kept.name]


@pytest.mark.parametrize("watchdog", [False, True])
def test_the_daemon_notifies_systemd_of_ready_watchdog_and_stopping(
    on_bus: str, scratch: Path, notifications: Notifications, watchdog: bool
) -> None:
    state = scratch / "stäte"
    environment = {"WATCHDOG_USEC": "600000"} if watchdog else {}
    with start_daemon(on_bus, state, notifications, **environment) as daemon:
        before = notifications.read_until("READY=1")
        assert before[0].startswith("STATUS=")
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in before)
        assert before[-1] == f"STATUS=Serving {state}"
        assert "WATCHDOG=1" not in before
        for _ in range(3 if watchdog else 0):
            assert notifications.read_until("WATCHDOG=1")[-1] == "WATCHDOG=1"
        daemon.send_signal(signal.SIGTERM)
        after = notifications.read_until("STOPPING=1")
        assert ("WATCHDOG=1" in after) <= watchdog
        assert after[-1].startswith("STATUS=")


def test_watchdog_pings_continue_after_the_disk_is_gone(
    on_bus: str, loop_directory: Path, notifications: Notifications
) -> None:
    """A restart would not help, and callers would no longer get the reason."""
    with (
        new_file_system("xfs", 320 << 20, loop_directory) as disk,
        start_daemon(on_bus, disk.root / "state", notifications, WATCHDOG_USEC="600000") as daemon,
        BlockingClient() as client,
    ):
        notifications.read_until("READY=1")
        shut_down(disk.root)
        # Reads may be answered from memory.
        with pytest.raises(DataLoss):
            client.view("view")
        for _ in range(3):
            notifications.read_until("WATCHDOG=1")
        daemon.send_signal(signal.SIGTERM)


def test_watchdog_pings_continue_while_the_file_system_is_frozen(
    on_bus: str, loop_directory: Path, notifications: Notifications
) -> None:
    """A backup can freeze a file system for a while. A restart would only interrupt calls."""
    with (
        new_file_system("ext4", 64 << 20, loop_directory) as disk,
        start_daemon(on_bus, disk.root / "state", notifications, WATCHDOG_USEC="600000") as daemon,
    ):
        notifications.read_until("READY=1")
        # One thread of the lane waits for the disk, and the others wait for that thread.
        with ThreadPoolExecutor() as pool, freeze_file_system(disk.root):
            calls = [
                pool.submit(make_view, f"view {number}")
                for number in range(2 * Lane.CHANGE.threads)
            ]
            for _ in range(3):
                seen = notifications.read_until(_WAITING)
                assert "WATCHDOG=1" in seen
        for call in calls:
            call.result(HANG_TIMEOUT)
        notifications.read_until(f"STATUS=Serving {disk.root}/state")
        daemon.send_signal(signal.SIGTERM)


def make_view(key: str) -> None:
    """Make a view. A call that waits too long for the others can be refused."""
    with BlockingClient() as client, suppress(SnapdError):
        client.view(key)


@contextmanager
def freeze_file_system(root: Path) -> Iterator[None]:
    """Freeze a file system during the block: writes to it wait."""
    subprocess.run(["fsfreeze", "--freeze", root], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", root], check=True)


@pytest.mark.parametrize("lane", [Lane.READ, Lane.CHANGE])
def test_watchdog_pings_stop_while_all_threads_of_a_lane_hang(
    scratch: Path, notifications: Notifications, monkeypatch: pytest.MonkeyPatch, lane: Lane
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(notifications.path))
    snapshotter = Snapshotter(scratch / "state", lambda *_: None)
    lanes, release = Lanes(), threading.Event()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        notifications.socket.setblocking(False)
        feeding = asyncio.ensure_future(
            _Daemon("a name", Snapshotter)._feed(0.001, lanes, snapshotter)
        )
        for _ in range(3):
            assert await loop.sock_recv(notifications.socket, 100) == b"WATCHDOG=1"
        hung = [
            asyncio.ensure_future(lanes.run(lane, 0, release.wait)) for _ in range(lane.threads)
        ]
        # Wait until the check of the watchdog waits for a thread too.
        while lanes._workers[lane, True].admitted.total() <= lane.threads:
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
        # When the socket is full of pings, the next ping blocks the event loop.
        feeding.cancel()
        await asyncio.gather(*hung)

    try:
        asyncio.run(scenario())
    finally:
        release.set()
        lanes.close()
        snapshotter.close()


def test_a_second_daemon_on_a_state_directory_exits_with_1(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with run_daemon(on_bus, state), private_bus() as other, BlockingClient() as client:
        for address in (on_bus, other):
            status, line = expect_start_failure(address, state)
            assert status == 1
            assert f"{state} is in use by another snapd-native daemon" in line
        client.prepare("key")


def test_a_second_daemon_on_a_bus_exits_with_1(on_bus: str, scratch: Path) -> None:
    with run_daemon(on_bus, scratch / "state"), BlockingClient() as client:
        status, line = expect_start_failure(on_bus, scratch / "other")
        assert status == 1
        assert f"the name {BUS_NAME} is taken by another process" in line
        client.prepare("key")


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/socket", "nonsense", "unix:path="])
def test_the_daemon_exits_with_1_without_a_bus(scratch: Path, address: str) -> None:
    status, line = expect_start_failure(address, scratch / "state")
    assert status == 1
    assert "DBUS_SYSTEM_BUS_ADDRESS" in line


def test_the_daemon_exits_with_1_when_the_bus_closes_the_connection(
    scratch: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        status, line = expect_start_failure(f"unix:path={tmp_path / 'socket'}", scratch / "state")
        thread.join()
    assert status == 1
    assert f"the system bus at unix:path={tmp_path}/socket does not answer (" in line


def test_the_daemon_exits_with_1_when_its_bus_ends(scratch: Path) -> None:
    with ExitStack() as stack:
        address = stack.enter_context(private_bus())
        with run_daemon(address, scratch / "state", status=1) as service:
            stack.close()
            assert service.daemon.process.wait(HANG_TIMEOUT) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_exits_with_0_on_a_signal(
    on_bus: str, scratch: Path, number: signal.Signals
) -> None:
    with run_daemon(on_bus, scratch / "state") as service:
        service.daemon.process.send_signal(number)
        assert service.daemon.process.wait(HANG_TIMEOUT) == 0


def test_only_root_can_start_the_daemon(on_bus: str, scratch: Path) -> None:
    status, line = expect_start_failure(on_bus, scratch / "state", user=NOBODY)
    assert (status, line) == (11, "snapd-native: the daemon needs root: run it as root")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_the_daemon_closes_its_state_directory_to_other_users(
    on_bus: str, scratch: Path, mode: int | None
) -> None:
    state = scratch / "state"
    if mode is not None:
        state.mkdir()
        state.chmod(mode)
        (state / "snapshots").mkdir()
        (state / "snapshots").chmod(mode)
    before = os.umask(0)
    try:
        with run_daemon(on_bus, state), BlockingClient() as client:
            client.prepare("key")
            for path in (state, *state.iterdir()):
                allowed = 0o700 if path.is_dir() else 0o600
                assert stat.S_IMODE(path.stat().st_mode) == allowed
            assert {path.name for path in state.iterdir()} >= {"snapshots", "metadata.db"}
    finally:
        os.umask(before)


def test_the_daemon_refuses_a_bad_state_directory(on_bus: str, scratch: Path) -> None:
    (scratch / "file").touch()
    status, line = expect_start_failure(on_bus, scratch / "file")
    assert status == 2
    assert "is a file" in line
    (scratch / "strange").mkdir(mode=0o700)
    (scratch / "strange" / "snapshots").symlink_to("/nowhere")
    status, line = expect_start_failure(on_bus, scratch / "strange")
    assert status == 1
    assert "is not a directory" in line
    (scratch / "open" / "document").mkdir(parents=True)
    status, line = expect_start_failure(on_bus, scratch / "open")
    assert status == 1
    assert "is not empty and open to others" in line
    (scratch / "foreign").mkdir()
    os.chown(scratch / "foreign", NOBODY, NOBODY)
    status, line = expect_start_failure(on_bus, scratch / "foreign")
    assert status == 1
    assert f"belongs to uid {NOBODY}" in line
    (scratch / "broken" / "snapshots").mkdir(parents=True)
    (scratch / "broken" / "metadata.db").write_bytes(b"this is no database" * 1000)
    status, line = expect_start_failure(on_bus, scratch / "broken")
    assert status == 1
    assert "restore it from a backup" in line


def test_the_daemon_uses_utf_8_for_paths_in_every_locale(on_bus: str, scratch: Path) -> None:
    """D-Bus has no other encoding; see PEP 540."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    here = scratch / "ключ"
    here.mkdir()
    with run_daemon(on_bus, scratch / "stäte", ascii_only), BlockingClient() as client:
        assert Path(client.prepare("Käse").source).is_relative_to(scratch / "stäte")
        assert client.mount("Käse", str(here)) == str(here)
        assert [mounted.target for mounted in client.list_mounts()] == [str(here)]
        client.unmount(str(here))
