"""A real daemon on a real private bus, and the calls that tests make on it."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from dbus_next.message import Message

from snapd_native.client import BlockingClient, Client
from snapd_native.errors import AlreadyExists, FailedPrecondition, NotFound, SnapdError
from snapd_native.model import Info
from snapd_native.private import Daemon, private_bus, private_daemon
from snapd_native.wire.connection import Connection
from snapd_native.wire.names import BUS_NAME, MANAGER, OBJECT_PATH
from snapd_native.wire.values import Body
from tests.support import PROJECT
from tests.support.descriptors import wait_until_idle
from tests.support.file_systems import FileSystem, scratch_on

NOBODY = 65534
"""The uid of a user without any permission."""

HANG_TIMEOUT = 240
"""Seconds after which a test gives up an operation that hangs."""

UNIT_ENVIRONMENT = dict(
    setting.removeprefix("Environment=").split("=", 1)
    for setting in (PROJECT / "systemd" / "snapd-native.service").read_text().splitlines()
    if setting.startswith("Environment=")
)
"""The environment that the unit gives the daemon."""

_MARK = "SNAPD_NATIVE_TEST"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Service:
    """A daemon, its bus, and the mark in the environment of all its processes."""

    address: str
    daemon: Daemon
    mark: str

    @property
    def pid(self) -> int:
        return self.daemon.process.pid

    @property
    def state(self) -> Path:
        return self.daemon.state

    def directories(self) -> list[str]:
        """Return the paths of everything in the state directory's ``snapshots``."""
        top = self.state / "snapshots"
        return sorted(str(path.relative_to(top)) for path in top.rglob("*"))

    def busctl(self, *arguments: str, user: int = 0) -> subprocess.CompletedProcess[str]:
        """Run busctl on the service's bus, as the uid ``user``."""
        return subprocess.run(
            [*as_user(user), "busctl", f"--address={self.address}", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=HANG_TIMEOUT,
        )

    def call(
        self, member: str, *arguments: str, user: int = 0, interface: str = MANAGER
    ) -> subprocess.CompletedProcess[str]:
        """Call a method with busctl; ``arguments`` are written as a person types them."""
        return self.busctl("call", BUS_NAME, OBJECT_PATH, interface, member, *arguments, user=user)

    def dbus_send(self, member: str, *arguments: str, user: int = 0) -> tuple[str, str]:
        """Call a method that fails, with dbus-send; return the error's name and its message."""
        done = subprocess.run(
            [
                *as_user(user),
                "dbus-send",
                f"--bus={self.address}",
                "--print-reply",
                f"--dest={BUS_NAME}",
                OBJECT_PATH,
                f"{MANAGER}.{member}",
                *arguments,
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=HANG_TIMEOUT,
        )
        assert done.returncode == 1
        name, _, text = done.stderr.removeprefix("Error ").rstrip("\n").partition(": ")
        return name, text


def as_user(uid: int) -> list[str]:
    """Return the beginning of a command that runs the rest with ``uid``; empty for root."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []


def run_with_client(scenario: Callable[[Client], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine with its own connected client, and return its result."""

    async def connected() -> _T:
        async with asyncio.timeout(HANG_TIMEOUT), Client() as client:
            return await scenario(client)

    return asyncio.run(connected())


def call_method(member: str, signature: str, *body: object, interface: str = MANAGER) -> Body:
    """Call a method with any signature, right or wrong; raise the error of the reply."""

    async def calling() -> Body:
        async with asyncio.timeout(HANG_TIMEOUT), connection() as bus:
            return await bus.request(BUS_NAME, OBJECT_PATH, interface, member, signature, [*body])

    return asyncio.run(calling())


class connection(Connection):  # noqa: N801 - read as the function it stands for
    """A connection that is open inside ``async with``."""

    async def __aenter__(self) -> connection:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.disconnect()

    async def ask(self, **fields: Any) -> Message:  # noqa: ANN401 - whatever Message takes
        """Call a method of the manager, and return the reply; ``fields`` are those of `Message`."""
        given = {"destination": BUS_NAME, "path": OBJECT_PATH, "interface": MANAGER} | fields
        reply = await self.call(Message(**given))
        assert reply is not None
        return reply


@contextmanager
def run_daemon(
    address: str,
    state: Path,
    environment: Mapping[str, str] | None = None,
    status: int = 0,
) -> Iterator[Service]:
    """Run a daemon, which must end with ``status`` and leave no process.

    After a daemon is killed, its processes end only when they check whether it still runs.
    """
    mark = uuid.uuid4().hex
    with private_daemon(address, state, {**(environment or {}), _MARK: mark}) as daemon:
        service = Service(address, daemon, mark)
        yield service
        assert daemon.stop() == status
    for pid in processes_marked(mark) if status < 0 else []:
        wait_until_ended(pid)
    assert processes_marked(mark) == []


@contextmanager
def run_daemon_until_bus_ends(state: Path) -> Iterator[tuple[Service, Callable[[], None]]]:
    """Run a daemon on a bus of its own; also yield the function that ends the bus.

    The block must call it. The daemon then ends with 1.
    """
    with ExitStack() as bus, pytest.MonkeyPatch.context() as patch:
        address = bus.enter_context(private_bus())
        patch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        with run_daemon(address, state, status=1) as service:
            yield service, bus.close
            service.daemon.process.wait(HANG_TIMEOUT)


def wait_until_ended(pid: int) -> None:
    """Wait until a process has ended; it need not be a child of this process."""
    with suppress(ProcessLookupError):
        ended = os.pidfd_open(pid)
        try:
            select.select([ended], [], [], HANG_TIMEOUT)
        finally:
            os.close(ended)


def processes_marked(mark: str) -> list[int]:
    """Return the pids of all processes with ``mark`` in the environment, also indirect children."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{_MARK}={mark}".encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


@pytest.fixture(scope="session")
def bus() -> Iterator[str]:
    """Run a bus for daemons that live as long as one test, and yield its address."""
    with private_bus() as address:
        yield address


@pytest.fixture
def on_bus(bus: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every client in the test use the bus."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus)
    return bus


@pytest.fixture
def service(on_bus: str, scratch: Path) -> Iterator[Service]:
    """Run a daemon for one test, on each file system."""
    with run_daemon(on_bus, scratch / "state") as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[BlockingClient]:
    with BlockingClient() as connected:
        yield connected


@pytest.fixture(scope="session")
def lasting_service(filesystem: FileSystem) -> Iterator[Service]:
    with (
        private_bus() as address,
        scratch_on(filesystem) as scratch,
        run_daemon(address, scratch / "state") as running,
    ):
        yield running


@pytest.fixture
def shared_service(lasting_service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Yield a daemon that serves many tests, on each file system, and empty it after each test."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", lasting_service.address)
    yield lasting_service
    # Calls of clients that have disconnected may still run.
    wait_until_idle(lasting_service)
    with BlockingClient() as client:
        remove_all(client)
    assert lasting_service.directories() == []


@pytest.fixture
def shared_client(shared_service: Service) -> Iterator[BlockingClient]:
    with BlockingClient() as connected:
        yield connected


def remove_all(client: BlockingClient) -> None:
    """Remove every snapshot, children before parents."""
    while infos := list(client.walk()):
        for info in sorted(infos, key=lambda info: info.created, reverse=True):
            with suppress(FailedPrecondition):
                client.remove(info.name)
    client.cleanup()


def commit_snapshot(
    client: BlockingClient, name: str, parent: str = "", files: Mapping[str, str] | None = None
) -> Path:
    """Commit a snapshot that contains ``files``, and return the directory of its tree."""
    key = f"{name[:100]} in the making"
    root = Path(client.prepare(key, parent).source)
    for path, text in (files or {}).items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    client.commit(name, key)
    return root


async def wait_until_reserved(client: Client, key: str) -> None:
    """Wait until a running call holds ``key``. The check changes nothing."""
    while True:
        try:
            # Commit checks its name ``key`` before its key, which does not exist.
            await client.commit(key, "a key that nobody uses")
        except NotFound:
            continue
        except AlreadyExists:
            return


def snapshots_and_directories(
    client: BlockingClient, service: Service
) -> tuple[list[Info], list[str]]:
    """Return everything that a failed call must not change."""
    return list(client.walk()), service.directories()


@contextmanager
def expect_error(kind: type[SnapdError], *words: str) -> Iterator[None]:
    """Expect an error whose message passes `check_sentence` and contains all of ``words``."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    check_sentence(caught.value.message, *words)


def short_id(text: str) -> str:
    """Return a short, printable test id for any text."""
    return ascii(text[:20])


def check_sentence(text: str, *words: str) -> None:
    """Check that a message is one printable line without internals of the service."""
    assert text.isprintable()
    assert 10 < len(text) < 1000
    for inner in ("Traceback", "Error:", "/snapshots", ".py", "sqlite", " at 0x", "<class"):
        assert inner not in text
    for word in words:
        assert word in text
