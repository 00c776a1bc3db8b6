"""The daemon as a process: its start, its end by will or by force, and what it tells systemd."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from snapd_native.bus.lanes import Lane, Lanes
from snapd_native.client import BlockingClient, Client
from snapd_native.daemon import _Daemon
from snapd_native.errors import DataLoss, NotFound, Unavailable
from snapd_native.model import Kind
from snapd_native.private import private_bus
from snapd_native.snapshotter import Snapshotter
from snapd_native.wire.names import BUS_NAME, DRIVER
from tests.filesystems import mounted
from tests.service import (
    NOBODY,
    PATIENCE,
    as_user,
    committed,
    committed_big,
    connection,
    refused,
    run,
    serving,
    wait_until_held,
)

FILES = 10_000
"""In the tree that is copied when the end comes."""

ENTRIES = FILES + FILES // 1000 + 1
"""With its directories and its root."""


def command(state: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "snapd_native", "daemon"),
        *("--state-directory", str(state)),
        *("--runtime-directory", f"{state}-run"),
    ]


def fails(address: str, state: Path, user: int = 0) -> tuple[int, str]:
    """Start a daemon that cannot serve; return its exit status and its one line."""
    done = subprocess.run(
        [*as_user(user), *command(state)],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.returncode, line


class Notifications:
    """What a daemon tells systemd."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(PATIENCE)

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            yield self.socket.recv(4096).decode().splitlines()

    def until(self, line: str) -> list[str]:
        """Return all lines up to the first ``line``."""
        seen: list[str] = []
        for lines in self:
            seen += lines
            if line in lines:
                return seen
        raise AssertionError


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[Notifications]:
    made = Notifications(tmp_path)
    yield made
    made.socket.close()


@contextmanager
def started(
    bus: str, state: Path, notifications: Notifications, program: str = "", **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a daemon, or ``program``, and leave it as it is; it must have ended at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", program] if program else command(state),
        env={
            **os.environ,
            **environment,
            "DBUS_SYSTEM_BUS_ADDRESS": bus,
            "NOTIFY_SOCKET": str(notifications.path),
        },
    )
    try:
        yield process
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


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
    environment = {"WATCHDOG_USEC": "60000"} if watchdog else {}
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
        started(on_bus, disk.root / "state", notifications, WATCHDOG_USEC="60000") as daemon,
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
        await asyncio.gather(*hung)
        feeding.cancel()

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


def consistent(on_bus: str, state: Path) -> Mapping[str, Kind]:
    """Start the service again and return what it has; every record has a tree, and no more."""
    with serving(on_bus, state) as service, BlockingClient() as client:
        infos = list(client.walk())
        trees = set(os.listdir(state / "snapshots"))
        assert len(trees) == len(infos)
        for info in infos:
            if info.kind is not Kind.COMMITTED:
                assert Path(client.mounts(info.name).source).name in trees
            assert client.usage(info.name).inodes == ENTRIES
        client.cleanup()
        assert set(os.listdir(state / "snapshots")) == trees
        assert service.daemon.process.poll() is None
        return {info.name: info.kind for info in infos}


Begin = Callable[[Client], "asyncio.Future[object]"]

LONG: dict[str, tuple[Begin, str, list[set[str]]]] = {
    "Prepare": (
        lambda c: asyncio.ensure_future(c.prepare("new", "big")),
        "new",
        [{"big", "key"}, {"big", "key", "new"}],
    ),
    "Commit": (
        lambda c: asyncio.ensure_future(c.commit("new", "key")),
        "new",
        [{"big", "key"}, {"big", "new"}],
    ),
}
"""A call that takes long, the name that it holds meanwhile, and what there may be afterwards."""


@pytest.mark.parametrize("member", LONG)
def test_a_running_call_is_finished_at_the_end(on_bus: str, scratch: Path, member: str) -> None:
    state = scratch / "state"
    begin, name, (_, done) = LONG[member]
    with serving(on_bus, state) as service:

        async def scenario(client: Client) -> None:
            running = begin(client)
            async with Client() as other:
                await wait_until_held(other, name)
                service.daemon.process.terminate()
                with refused(Unavailable, "is stopping"):
                    while not running.done():
                        await other.stat("big")
                await running

        with BlockingClient() as client:
            committed_big(client, "big", FILES)
            client.prepare("key", "big")
        run(scenario)
    assert consistent(on_bus, state).keys() == done


IMPATIENT = """
import sys
from pathlib import Path
from snapd_native import daemon
daemon.GRACE = 0
sys.exit(daemon.run("org.snapdnative1", Path({state!r}), Path({state!r} + "-run"), 0.1))
"""


def test_a_copy_that_takes_too_long_at_the_end_is_undone(
    on_bus: str, scratch: Path, notifications: Notifications
) -> None:
    state = scratch / "state"
    program = IMPATIENT.format(state=str(state))
    with started(on_bus, state, notifications, program) as daemon:
        notifications.until("READY=1")

        async def scenario(client: Client) -> None:
            running = asyncio.ensure_future(client.prepare("new", "big"))
            async with Client() as other:
                await wait_until_held(other, "new")
            daemon.terminate()
            with refused(Unavailable, "is stopping"):
                await running

        with BlockingClient() as client:
            committed_big(client, "big", FILES)
        run(scenario)
    assert len(os.listdir(state / "snapshots")) == 1
    assert consistent(on_bus, state).keys() == {"big"}


def test_a_deletion_does_not_hold_up_the_end(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with serving(on_bus, state) as service:
        with BlockingClient() as client:
            committed_big(client, "big", FILES)
            client.remove("big")
        service.daemon.process.terminate()
    assert consistent(on_bus, state) == {}


@pytest.mark.parametrize("member", LONG)
@pytest.mark.parametrize("directories", [0, FILES // 2000])
def test_a_crash_leaves_all_or_nothing(
    on_bus: str, scratch: Path, member: str, directories: int
) -> None:
    """Killed as soon as the call has begun, or with about half of the tree done."""
    state = scratch / "state"
    begin, name, allowed = LONG[member]
    with serving(on_bus, state, status=-signal.SIGKILL) as service:

        async def scenario(client: Client) -> None:
            running = begin(client)
            async with Client() as other:
                await wait_until_held(other, name)
                while half_done(state) < directories and not running.done():
                    await other.stat("big")
                service.daemon.process.kill()
                await asyncio.wait({running})
                running.exception()

        with BlockingClient() as client:
            committed_big(client, "big", FILES)
            client.prepare("key", "big")
        run(scenario)
    assert consistent(on_bus, state).keys() in allowed


def half_done(state: Path) -> int:
    """Count the directories in the tree that is being copied; 99 if there is none."""
    for name in os.listdir(state / "snapshots"):
        if name.startswith("new-"):
            try:
                return len(os.listdir(state / "snapshots" / name))
            except FileNotFoundError:
                break
    return 99


def test_what_was_acknowledged_survives_a_crash(on_bus: str, scratch: Path) -> None:
    state = scratch / "state"
    with serving(on_bus, state, status=-signal.SIGKILL) as service, BlockingClient() as client:
        for number in range(20):
            committed(client, f"{number}", str(number - 1) if number else "", {f"{number}": "text"})
        client.prepare("key", "19", {"a": "1"})
        client.view("view", "19")
        client.update("view", {"b": "2"})
        client.remove("view")
        service.daemon.process.kill()
        before = {"key"} | {str(number) for number in range(20)}
        service.daemon.process.wait(PATIENCE)
    with serving(on_bus, state), BlockingClient() as client:
        assert {info.name for info in client.list()} == before
        root = Path(client.mounts("key").source)
        assert {path.name: path.read_text() for path in root.iterdir()} == {
            str(number): "text" for number in range(20)
        }
        assert client.stat("key").labels == {"a": "1"}
        with refused(NotFound, '"view"'):
            client.stat("view")


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
