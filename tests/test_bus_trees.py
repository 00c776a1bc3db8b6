"""OpenTree over the bus leaves nothing open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import (
    AbstractAsyncContextManager,
)
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message
from dbus_next.signature import Variant

from snapd_native.wire.names import BUS_NAME, MANAGER, OBJECT_PATH
from tests.bus_mounting import (
    MOUNT,
    OPEN_TREE,
    UNMOUNT,
    has_open,
    stranger,
)
from tests.filesystems import on_ext4
from tests.mounting import below, place
from tests.service import (
    PATIENCE,
    Service,
    connection,
)
from tests.waiting import eventually

pytestmark = on_ext4


async def open_trees_and_close_them(bus: connection) -> None:
    for _ in range(200):
        calls = [
            bus.request_fd(BUS_NAME, OBJECT_PATH, MANAGER, "OpenTree", OPEN_TREE, [key, {}])
            for key in ["work", "look"] * 25
        ]
        for fd in await asyncio.gather(*calls):
            os.close(fd)


async def want_no_reply(bus: connection) -> None:
    for _ in range(50):
        for _ in range(200):
            await bus.send(open_tree(MessageFlag.NO_REPLY_EXPECTED))
        # One that is answered when most of the others are done, so that there are never too many.
        await bus.ask(member="ListMounts", signature="s", body=[""])


async def leave_before_the_reply(__: connection) -> None:
    for _ in range(200):
        async with connection() as bus:
            calls = [asyncio.ensure_future(bus.call(open_tree())) for _ in range(50)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*calls, return_exceptions=True)


async def read_nothing(__: connection) -> None:
    for _ in range(100):
        async with connection() as bus:
            asyncio.get_running_loop().remove_reader(bus._fd)
            await asyncio.gather(*(bus.send(open_tree()) for _ in range(100)))


def open_tree(flags: MessageFlag = MessageFlag.NONE) -> Message:
    return Message(
        destination=BUS_NAME,
        path=OBJECT_PATH,
        interface=MANAGER,
        member="OpenTree",
        signature=OPEN_TREE,
        body=["work", {}],
        flags=flags,
    )


@pytest.mark.parametrize(
    "scenario",
    [open_trees_and_close_them, want_no_reply, leave_before_the_reply, read_nothing],
)
def test_ten_thousand_trees_leave_nothing_open(
    stocked: Service, scenario: Callable[[connection], Coroutine[Any, Any, None]]
) -> None:
    async def asking() -> None:
        async with asyncio.timeout(PATIENCE), connection() as bus:
            await bus.ask(member="ListMounts", signature="s", body=[""])
            before = stocked.descriptors()
            await scenario(bus)
            await asyncio.to_thread(eventually, lambda: has_open(stocked, before))
            # It is answered as ever.
            await bus.ask(member="ListMounts", signature="s", body=[""])

    asyncio.run(asking())


@pytest.mark.parametrize("who", [connection, stranger])
def test_descriptors_that_come_with_a_call_are_not_kept(
    stocked: Service, places: Path, who: Callable[[], AbstractAsyncContextManager[connection]]
) -> None:
    here = str(place(places))
    before = stocked.descriptors()

    async def scenario() -> set[str]:
        names = set()
        option = {"read-only": Variant("h", 0)}
        async with who() as bus:
            with open("/dev/null", "rb") as file:
                for _ in range(250):
                    for member, signature, body in (
                        ("Mount", MOUNT, ["work", here, option]),
                        ("Unmount", UNMOUNT, [here, {"lazy": Variant("h", 3)}]),
                        ("OpenTree", OPEN_TREE, ["work", option]),
                        ("ListMounts", "h", [2]),
                    ):
                        fds = [file.fileno()] * 4
                        reply = await bus.ask(
                            member=member, signature=signature, body=body, unix_fds=fds
                        )
                        names.add(reply.error_name.rpartition(".")[2])
            eventually(lambda: has_open(stocked, before))
        return names

    assert asyncio.run(scenario()) == {"AccessDenied" if who is stranger else "InvalidArgument"}
    assert below(places) == []
