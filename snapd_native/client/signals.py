"""Receive signals of the service, and translate them to changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from dbus_next.constants import MessageType
from dbus_next.message import Message

from snapd_native.errors import Unavailable
from snapd_native.model import Added, Change, Committed, Kind, Removed, Updated
from snapd_native.wire.connection import Connection
from snapd_native.wire.names import DRIVER, OBJECT_PATH, PEER
from snapd_native.wire.values import Body


@asynccontextmanager
async def signals(
    connection: Connection, name: str, *rules: str
) -> AsyncIterator[AsyncIterator[Message]]:
    """Yield the signals of the service ``name`` that match one of ``rules``, from now on.

    The iterator raises Unavailable when the service has ended or the bus is lost.
    """
    # Like any call, this starts a service that is activated by the bus.
    await connection.request(name, OBJECT_PATH, PEER, "Ping")
    arrived: asyncio.Queue[Message | None] = asyncio.Queue()
    lost = f"sender='{DRIVER}',member='NameOwnerChanged',arg0='{name}'"

    def on_message(message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            if message.sender != DRIVER:
                arrived.put_nowait(message)
            elif message.member == "NameOwnerChanged" and message.body[0] == name:
                arrived.put_nowait(None)

    with ExitStack() as undo:
        connection.add_message_handler(on_message)
        undo.callback(connection.remove_message_handler, on_message)
        undo.enter_context(connection.watched(lambda: arrived.put_nowait(None)))
        for rule in (lost, *(f"sender='{name}',{rule}" for rule in rules)):
            match = f"type='signal',{rule}"
            undo.callback(connection.tell_driver, "RemoveMatch", "s", [match])
            await connection.ask_driver("AddMatch", "s", [match])
        (owner,) = await connection.ask_driver("GetNameOwner", "s", [name])
        yield _drained(arrived, owner)


async def changes_of(arrived: AsyncIterator[Message]) -> AsyncIterator[Change]:
    """Translate signals to changes."""
    async for message in arrived:
        change = _change(message.member, message.body)
        if change is not None:
            yield change


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


async def _drained(queue: asyncio.Queue[Message | None], sender: str) -> AsyncIterator[Message]:
    while (message := await queue.get()) is not None:
        # Other senders can send signals of the same name.
        if message.sender == sender:
            yield message
    raise Unavailable("the service or the system bus is gone: connect again")
