"""Watch jobs on the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from snapd_native.client import BlockingClient
from snapd_native.errors import NotFound
from snapd_native.wire.connection import Connection
from snapd_native.wire.names import BUS_NAME, JOB, JOB_PATH, MANAGER, OBJECT_PATH, PROPERTIES
from snapd_native.wire.values import Body
from tests.support.holding import hold_workers
from tests.support.service import HANG_TIMEOUT, Service, call_method, connection

_T = TypeVar("_T")


class Watcher:
    """A connection, and all messages of the service to it, in order."""

    def __init__(self, bus: Connection) -> None:
        self.bus = bus
        self.arrived: list[Message] = []
        self.times: list[float] = []
        """The time of arrival of each message, in seconds."""
        self._more = asyncio.Event()
        bus.add_message_handler(self._arrive)

    def _arrive(self, message: Message) -> None:
        self.arrived.append(message)
        self.times.append(time.monotonic())
        self._more.set()

    async def call(
        self, member: str, signature: str = "", *body: object, path: str = OBJECT_PATH
    ) -> Body:
        """Call a method of the manager, or of the job at ``path``; raise the error."""
        interface = MANAGER if path == OBJECT_PATH else JOB
        return await self.bus.request(BUS_NAME, path, interface, member, signature, [*body])

    async def properties(self, path: str) -> dict[str, Any]:
        """Return all properties of a job, as variants."""
        (values,) = await self.bus.request(BUS_NAME, path, PROPERTIES, "GetAll", "s", [JOB])
        assert isinstance(values, dict)
        return values

    async def wait_for_signal(self, member: str, path: str | None = None) -> Body:
        """Wait for the first signal ``member`` of the job at ``path``; return its arguments."""
        return (await self.wait_for_signals(member, 1, path))[0].body

    async def wait_for_signals(
        self, member: str, count: int, path: str | None = None
    ) -> list[Message]:
        """Wait for ``count`` signals ``member`` of the job at ``path``; return all so far."""
        while True:
            self._more.clear()
            found = [
                message
                for message in self.signals(member)
                if path in (None, message.path, *message.body[1:2])
            ]
            if len(found) >= count:
                return found
            await self._more.wait()

    def signals(self, *members: str) -> list[Message]:
        """Return the signals so far: all, or those named in ``members``."""
        return [
            message
            for message in self.arrived
            if message.message_type is MessageType.SIGNAL
            and (not members or message.member in members)
        ]

    def message_order(self) -> list[str]:
        """Return the names of the signals so far, and ``reply`` for each reply, in order.

        Signals of progress are left out, because they can come at any time.
        """
        return [
            message.member if message.message_type is MessageType.SIGNAL else "reply"
            for message in self.arrived
            if message.member != "PropertiesChanged"
        ]

    def forget(self) -> None:
        """Forget the messages so far."""
        self.arrived.clear()
        self.times.clear()


@asynccontextmanager
async def watching() -> AsyncIterator[Watcher]:
    """Watch the service from now on."""
    async with connection() as bus:
        await bus.ask_driver("AddMatch", "s", [f"type='signal',sender='{BUS_NAME}'"])
        yield Watcher(bus)


def run_with_watcher(scenario: Callable[[Watcher], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine with a new `Watcher`, and return its result."""

    async def connected() -> _T:
        async with asyncio.timeout(HANG_TIMEOUT), watching() as watcher:
            return await scenario(watcher)

    return asyncio.run(connected())


@pytest.fixture
def service_with_base(shared_service: Service, shared_client: BlockingClient) -> Service:
    """Make the committed snapshot `base`, and `work` from it."""
    root = Path(shared_client.prepare("making").source)
    (root / "file").write_text("text")
    shared_client.commit("base", "making")
    shared_client.prepare("work", "base")
    return shared_service


@pytest.fixture
def waiting_job(service_with_base: Service, shared_client: BlockingClient) -> Iterator[str]:
    """Yield the path of a job whose workers are stopped: a Prepare of `key` from `base`."""
    with hold_workers(service_with_base):
        (path,) = call_method("PrepareJob", "ssa{sv}", "key", "base", {})
        yield path
        with suppress(NotFound):
            shared_client.cancel(int(path.removeprefix(f"{JOB_PATH}/")))
