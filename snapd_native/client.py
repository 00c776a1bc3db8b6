"""A typed client of the service.

`Client` is for programs with an event loop, `BlockingClient` for those without. Both raise the
exceptions of `snapd_native.errors`, as the engine does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from dbus_next.constants import MessageType
from dbus_next.errors import SignatureBodyMismatchError
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.errors import InvalidArgument, ResourceExhausted, Unavailable
from snapd_native.model import (
    Added,
    Change,
    Committed,
    Info,
    Kind,
    Mount,
    Removed,
    Updated,
    Usage,
)
from snapd_native.wire.connection import Connection
from snapd_native.wire.names import BUS_NAME, MANAGER, OBJECT_PATH, PROPERTIES
from snapd_native.wire.values import Body, info_from_wire, mount_from_wire

PAGE = 1000
"""Snapshots that `Client.walk` asks for at once; fewer, if they are too large together."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Service:
    """What the service says of itself."""

    version: str
    state_directory: str
    filesystem_type: str
    reflink: bool


class Client:
    """The Manager's methods as coroutines. Use it as ``async with Client() as client``."""

    def __init__(self) -> None:
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        """Connect to the system bus.

        Raises:
            Unavailable: it cannot be reached.
        """
        self._connection = Connection()
        await self._connection.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    async def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> Mount:
        """Make an active snapshot and return its mount."""
        return await self._create("Prepare", key, parent, labels)

    async def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> Mount:
        """Make a view and return its mount."""
        return await self._create("View", key, parent, labels)

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = ""
    ) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name``, durably."""
        options = _labels(labels)
        if parent:
            options["parent"] = Variant("s", parent)
        await self._call("Commit", "ssa{sv}", name, key, options)

    async def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view."""
        (mounts,) = await self._call("Mounts", "s", key)
        return mount_from_wire(mounts[0])

    async def stat(self, key: str) -> Info:
        """Return a snapshot's record."""
        (info,) = await self._call("Stat", "s", key)
        return info_from_wire(info)

    async def update(
        self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()
    ) -> Info:
        """Set labels and return the record as it is then."""
        (info,) = await self._call("Update", "sa{ss}as", name, dict(labels), list(fieldpaths))
        return info_from_wire(info)

    async def usage(self, key: str) -> Usage:
        """Return what a snapshot takes."""
        size, inodes = await self._call("Usage", "s", key)
        return Usage(size, inodes)

    async def list(
        self, filters: Sequence[str] = (), after: str = "", limit: int | None = None
    ) -> list[Info]:
        """Return a page of snapshots, by name in byte order; `walk` goes through all pages."""
        options: dict[str, Variant] = {}
        if after:
            options["after"] = Variant("s", after)
        if limit is not None:
            options["limit"] = _limit(limit)
        (infos,) = await self._call("List", "asa{sv}", [*filters], options)
        return [info_from_wire(info) for info in infos]

    async def walk(self, filters: Sequence[str] = ()) -> AsyncIterator[Info]:
        """Iterate over all snapshots that match, by name in byte order."""
        after, limit = "", PAGE
        while True:
            try:
                page = await self.list(filters, after, limit)
            except ResourceExhausted:
                # So many labels do not fit one message.
                if limit == 1:
                    raise
                limit //= 2
                continue
            for info in page:
                yield info
            if len(page) < limit:
                return
            after = page[-1].name

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its data is deleted in the background."""
        await self._call("Remove", "sa{sv}", key, {})

    async def cleanup(self) -> None:
        """Return when every deferred deletion is done."""
        await self._call("Cleanup", "a{sv}", {})

    async def service(self) -> Service:
        """Return what the service says of itself."""
        (values,) = await self._connected().request(
            BUS_NAME, OBJECT_PATH, PROPERTIES, "GetAll", "s", [MANAGER]
        )
        return Service(
            values["Version"].value,
            values["StateDirectory"].value,
            values["FilesystemType"].value,
            values["Reflink"].value,
        )

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[AsyncIterator[Change]]:
        """Yield the changes that happen from now on, in their order.

        The iterator raises Unavailable when the connection to the bus is lost.
        """
        connection = self._connected()
        arrived: asyncio.Queue[Change | None] = asyncio.Queue()
        rule = f"type='signal',sender='{BUS_NAME}',interface='{MANAGER}',path='{OBJECT_PATH}'"

        def on_message(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL and message.interface == MANAGER:
                change = _change(message.member, message.body)
                if change is not None:
                    arrived.put_nowait(change)

        connection.add_message_handler(on_message)
        try:
            with connection.watched(lambda: arrived.put_nowait(None)):
                await connection.ask_driver("AddMatch", "s", [rule])
                yield _drained(arrived)
        finally:
            connection.remove_message_handler(on_message)
            if connection.connected:
                await connection.ask_driver("RemoveMatch", "s", [rule])

    async def _create(
        self, member: str, key: str, parent: str, labels: Mapping[str, str] | None
    ) -> Mount:
        (mounts,) = await self._call(member, "ssa{sv}", key, parent, _labels(labels))
        return mount_from_wire(mounts[0])

    async def _call(self, member: str, signature: str, *arguments: object) -> Body:
        return await self._connected().request(
            BUS_NAME, OBJECT_PATH, MANAGER, member, signature, [*arguments]
        )

    def _connected(self) -> Connection:
        if self._connection is None:
            raise Unavailable("the client is not connected: use it in a with statement")
        return self._connection


class BlockingClient:
    """`Client` for programs without an event loop; use it as ``with BlockingClient() as client``.

    Not for several threads: each takes a client of its own.
    """

    def __init__(self) -> None:
        self._client = Client()
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        """Connect to the system bus.

        Raises:
            Unavailable: it cannot be reached.
        """
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self._wait(self._client.__aexit__(kind, error, trace))
        self._runner.close()

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Mount:
        """Make an active snapshot and return its mount."""
        return self._wait(self._client.prepare(key, parent, labels))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Mount:
        """Make a view and return its mount."""
        return self._wait(self._client.view(key, parent, labels))

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = ""
    ) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name``, durably."""
        self._wait(self._client.commit(name, key, labels, parent))

    def mounts(self, key: str) -> Mount:
        """Return the mount of an active snapshot or a view."""
        return self._wait(self._client.mounts(key))

    def stat(self, key: str) -> Info:
        """Return a snapshot's record."""
        return self._wait(self._client.stat(key))

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Info:
        """Set labels and return the record as it is then."""
        return self._wait(self._client.update(name, labels, fieldpaths))

    def usage(self, key: str) -> Usage:
        """Return what a snapshot takes."""
        return self._wait(self._client.usage(key))

    def remove(self, key: str) -> None:
        """Forget a snapshot; its data is deleted in the background."""
        self._wait(self._client.remove(key))

    def cleanup(self) -> None:
        """Return when every deferred deletion is done."""
        self._wait(self._client.cleanup())

    def service(self) -> Service:
        """Return what the service says of itself."""
        return self._wait(self._client.service())

    def list(
        self, filters: Sequence[str] = (), after: str = "", limit: int | None = None
    ) -> list[Info]:
        """Return a page of snapshots, by name in byte order."""
        return self._wait(self._client.list(filters, after, limit))

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """Iterate over all snapshots that match, by name in byte order."""
        infos = self._client.walk(filters)
        while (info := self._wait(anext(infos, None))) is not None:
            yield info

    def _wait(self, coming: Awaitable[_T]) -> _T:
        async def wait() -> _T:
            return await coming

        return self._runner.run(wait())


def _labels(labels: Mapping[str, str] | None) -> dict[str, Variant]:
    return {"labels": Variant("a{ss}", dict(labels))} if labels else {}


def _limit(limit: int) -> Variant:
    try:
        return Variant("u", limit)
    except SignatureBodyMismatchError:
        raise InvalidArgument(f"the limit {limit} cannot be: give a positive number") from None


def _change(member: str, body: Body) -> Change | None:
    match member:
        case "SnapshotAdded":
            key, kind, parent = body
            return Added(key, Kind(kind), parent)
        case "SnapshotCommitted":
            return Committed(*body)
        case "SnapshotUpdated":
            return Updated(*body)
        case "SnapshotRemoved":
            return Removed(*body)
        case _:
            return None


async def _drained(queue: asyncio.Queue[Change | None]) -> AsyncIterator[Change]:
    while (change := await queue.get()) is not None:
        yield change
    raise Unavailable("the system bus is gone: connect again")
